"""The two halves of linear attention as differentiable operations, on which its relatives stand.

    gather: kv_b = Σ_t φ(k_t) v_tᵀ, total_b = Σ_t φ(k_t)         over the tiles of bag b
    ask:    out_t = φ(q_t) kv_b [ / (φ(q_t) · total_b + ε) ]      with the bag b of tile t

Shapes: k and q (T, H, d), v (T, H, dv), kv (B, H, d, dv) and total (B, H, d) float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagscope.kernels.dispatch import choose, own_arithmetic
from bagscope.kernels.linear_attention import cpu
from bagscope.kernels.segments import require_borders

OP = "linear_attention"
_WIDEST = 128


def gather(
    k: Tensor, v: Tensor, cu_seqlens: Tensor, feature_map: str = "identity"
) -> tuple[Tensor, Tensor]:
    """Return kv (B, H, d, dv) and total (B, H, d)."""
    found: tuple[Tensor, Tensor] = _gather(k, v, cu_seqlens, feature_map)
    return found


def ask(
    q: Tensor,
    kv: Tensor,
    cu_seqlens: Tensor,
    feature_map: str = "identity",
    *,
    total: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Return (T, H, dv), divided where `total` is given."""
    divide = total is not None
    given = kv.new_zeros(kv.shape[:-1]) if total is None else total
    out: Tensor = _ask(q, kv, given, cu_seqlens, feature_map, divide, eps)
    return out


def bag_mean(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the mean (B, H, d) of the tiles of each bag, 0 for an empty one."""
    ones = x.new_ones(1, 1, 1).expand(*x.shape[:2], 1)
    total, _ = gather(ones, x, cu_seqlens)
    return total.squeeze(2) / lengths(cu_seqlens, total)


def lengths(cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """Return the tiles of each bag, at least 1, shaped for division of (B, H, d)."""
    return cu_seqlens.diff().clamp(min=1).to(like.dtype)[:, None, None]


def _way(x: Tensor, widest: int) -> Any:
    refuses = f"heads are wider than {_WIDEST}" if widest > _WIDEST else ""
    if choose(OP, x, refuses=refuses) in ("triton", "interpret") and len(x):
        from bagscope.kernels.linear_attention import triton

        return triton
    return cpu


@torch.library.custom_op("bagscope::linear_attention_gather", mutates_args=())
def _gather(k: Tensor, v: Tensor, cu_seqlens: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    require_borders(cu_seqlens, len(k))
    with own_arithmetic():
        found: tuple[Tensor, Tensor] = _way(k, max(k.shape[2], v.shape[2])).gather(
            k, v, cu_seqlens, feature_map
        )
    return found


@torch.library.custom_op("bagscope::linear_attention_gather_backward", mutates_args=())
def _gather_backward(
    k: Tensor, v: Tensor, cu_seqlens: Tensor, feature_map: str, grad_kv: Tensor, grad_total: Tensor
) -> tuple[Tensor, Tensor]:
    with own_arithmetic():
        grads: tuple[Tensor, Tensor] = _way(k, max(k.shape[2], v.shape[2])).gather_backward(
            k, v, cu_seqlens, feature_map, grad_kv, grad_total
        )
    return grads


@torch.library.custom_op("bagscope::linear_attention_ask", mutates_args=())
def _ask(
    q: Tensor, kv: Tensor, total: Tensor, cu_seqlens: Tensor, feature_map: str,
    divide: bool, eps: float,
) -> Tensor:  # fmt: skip
    require_borders(cu_seqlens, len(q))
    with own_arithmetic():
        out: Tensor = _way(q, max(kv.shape[2:])).ask(
            q, kv, total, cu_seqlens, feature_map, divide, eps
        )
    return out


@torch.library.custom_op("bagscope::linear_attention_ask_backward", mutates_args=())
def _ask_backward(
    q: Tensor, kv: Tensor, total: Tensor, cu_seqlens: Tensor, feature_map: str,
    divide: bool, eps: float, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with own_arithmetic():
        grads: tuple[Tensor, Tensor, Tensor] = _way(q, max(kv.shape[2:])).ask_backward(
            q, kv, total, cu_seqlens, feature_map, divide, eps, grad
        )
    return grads


@_gather.register_fake
def _(k: Tensor, v: Tensor, cu_seqlens: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(k.dtype, torch.float32)
    shape = (cu_seqlens.shape[0] - 1, *k.shape[1:])
    return k.new_empty(*shape, v.shape[2], dtype=exact), k.new_empty(shape, dtype=exact)


@_gather_backward.register_fake
def _(
    k: Tensor, v: Tensor, cu_seqlens: Tensor, feature_map: str, grad_kv: Tensor, grad_total: Tensor
) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


@_ask.register_fake
def _(
    q: Tensor, kv: Tensor, total: Tensor, cu_seqlens: Tensor, feature_map: str,
    divide: bool, eps: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:2], kv.shape[-1])


@_ask_backward.register_fake
def _(
    q: Tensor, kv: Tensor, total: Tensor, cu_seqlens: Tensor, feature_map: str,
    divide: bool, eps: float, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), kv.new_empty(kv.shape), total.new_empty(total.shape)


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.feature_map = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_gather(ctx: Any, grad_kv: Tensor, grad_total: Tensor) -> Any:
    grads = _gather_backward(
        *ctx.saved_tensors, ctx.feature_map, grad_kv.contiguous(), grad_total.contiguous()
    )
    return *grads, None, None


def _keep_ask(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.feature_map, ctx.divide, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_ask(ctx: Any, grad: Tensor) -> Any:
    settings = (ctx.feature_map, ctx.divide, ctx.eps)
    grads = _ask_backward(*ctx.saved_tensors, *settings, grad.contiguous())
    return *grads, None, None, None, None


_gather.register_autograd(_differentiate_gather, setup_context=_keep_gather)
_ask.register_autograd(_differentiate_ask, setup_context=_keep_ask)
