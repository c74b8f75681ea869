"""A few queries that look at every tile of a bag: attention pooling with heads.

    ξ_t    = softmax over the bag's tiles of scale · q · k_t
    pooled = Σ_t ξ_t v_t        lse = log Σ_t exp(scale · q · k_t)

Shapes: T tiles, B bags, m queries, H heads, d and dv features per head. q (m, H, d) shared by all
bags, or (B, m, H, d); k (T, H, d); v (T, H, dv); pooled (B, m, H, dv); lse (B, m, H) float32;
weights ξ (T, m, H) float32. An empty bag has pooled 0 and lse −inf.

Kept for backward: the inputs, pooled and lse; the weights are computed again. Memory beyond that is
a chunk of rows (CPU), or at most 1/8 of k and v (GPU). 4·T·H·m·(d + dv) operations forward, 2.5
times as many backward; with few queries it reads k and v at the memory's speed.

Hopfield retrieval is the same with `scale` as β and `update_steps`: q ← Σ_t ξ_t k_t, until the
steps are done or, head by head and bag by bag, ‖Δξ‖ ≤ `update_eps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagscope.kernels.cross_attention_pool import cpu
from bagscope.kernels.cross_attention_pool.reference import cross_attention_pool_reference
from bagscope.kernels.dispatch import choose, own_arithmetic
from bagscope.kernels.segments import bag_of_tile, require_borders

__all__ = ["cross_attention_pool", "cross_attention_pool_reference", "retrieve"]

_OP = "cross_attention_pool"
_WIDEST = 128


def cross_attention_pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    update_steps: int = 0,
    update_eps: float = 1e-4,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return pooled (B, m, H, dv), lse (B, m, H) and weights (T, m, H), None unless asked for.

    Gradients flow through all three.

    Args:
        q: queries, (m, H, d) or (B, m, H, d).
        k: keys, (T, H, d).
        v: values, (T, H, dv).
        cu_seqlens: (B + 1,) int32.
        scale: of the scores, 1/√d by default; Hopfield's β.
        update_steps: how often at most the queries move to what they retrieve; needs keys alone.
        update_eps: a change of the weights (Frobenius norm per bag and head) that ends it early.
        return_weights: whether to return the weights of the tiles.

    Raises:
        ValueError: shapes or borders do not belong together.
    """
    bags = len(cu_seqlens) - 1
    q = _per_bag(q, k, bags)
    if q.ndim != 4 or k.ndim != 3 or v.ndim != 3 or len(k) != len(v):
        raise ValueError(_shapes(q, k, v))
    if len(q) != bags or q.shape[2:] != k.shape[1:] or k.shape[1] != v.shape[1]:
        raise ValueError(_shapes(q, k, v))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if update_steps:
        q = retrieve(q, k, cu_seqlens, scale=scale, steps=update_steps, eps=update_eps)
    pooled, lse, weights = _pool(q, k, v, cu_seqlens, scale, return_weights)
    return pooled.to(v.dtype), lse, weights if return_weights else None


def _per_bag(q: Tensor, k: Tensor, bags: int) -> Tensor:
    # Few numbers: kept in full, so that gradients of shared queries are summed in full too.
    q = q.to(torch.promote_types(k.dtype, torch.float32))
    return q.expand(bags, *q.shape) if q.ndim == 3 else q


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    return f"q, k, v are {shapes}; pass (bags, m, H, d) or (m, H, d), (T, H, d) and (T, H, dv)"


def _pool(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, return_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (q.contiguous(), k, v, cu_seqlens, scale, return_weights)
    if not torch.compiler.is_compiling() and choose(_OP, k, refuses=_refuses(k, v)) == "reference":
        return cross_attention_pool_reference(*inputs)
    found: tuple[Tensor, Tensor, Tensor] = _forward(*inputs)
    return found


def retrieve(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, *, scale: float, steps: int, eps: float = 1e-4
) -> Tensor:
    """Return the queries (B, m, H, d) after at most `steps` updates, each head of each bag alone.

    Arguments are those of `cross_attention_pool`, which does it where it is given `update_steps`.
    """
    q = _per_bag(q, k, len(cu_seqlens) - 1)
    before: Tensor | None = None
    active = torch.ones(len(q), 1, q.shape[2], 1, dtype=torch.bool, device=q.device)
    bags = bag_of_tile(cu_seqlens, len(k))
    for _ in range(steps):
        moved, _lse, weights = _pool(q, k, k, cu_seqlens, scale, True)
        weights = weights.detach()
        if before is not None:
            square = (weights - before).square_().sum(1)
            change = square.new_zeros(len(q), q.shape[2]).index_add_(0, bags, square).sqrt()
            active = active & (change > eps)[:, None, :, None]
        before = weights
        q = torch.where(active, moved.to(q.dtype), q)
    return q


def _refuses(k: Tensor, v: Tensor) -> str:
    if k.dtype != v.dtype:
        return "k and v differ in dtype"
    return f"heads are wider than {_WIDEST}" if max(k.shape[-1], v.shape[-1]) > _WIDEST else ""


def _way(k: Tensor, v: Tensor) -> Any:
    if choose(_OP, k, refuses=_refuses(k, v)) in ("triton", "interpret") and len(k):
        from bagscope.kernels.cross_attention_pool import triton

        return triton
    return cpu


@torch.library.custom_op("bagscope::cross_attention_pool", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, return_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    require_borders(cu_seqlens, len(k))
    with own_arithmetic():
        found: tuple[Tensor, Tensor, Tensor] = _way(k, v).forward(
            q, k, v, cu_seqlens, scale, return_weights
        )
    return found


@torch.library.custom_op("bagscope::cross_attention_pool_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, lse: Tensor,
    grad: Tensor, delta: Tensor, grad_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with own_arithmetic():
        grads: tuple[Tensor, Tensor, Tensor] = _way(k, v).backward(
            q, k, v, cu_seqlens, scale, lse, grad, delta, grad_weights
        )
    return tuple(g.contiguous() for g in grads)  # type: ignore[return-value]


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, return_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    pooled = q.new_empty(*q.shape[:-1], v.shape[-1])
    rows = k.shape[0] if return_weights else 0
    return pooled, q.new_empty(q.shape[:-1]), q.new_empty(rows, *q.shape[1:3])


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, lse: Tensor,
    grad: Tensor, delta: Tensor, grad_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)
    # Retrieval looks at the weights and learns nothing through them: no gradient is made for it.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, grad_weights: Tensor | None
) -> Any:
    q, k, v, cu_seqlens, pooled, lse, weights = ctx.saved_tensors
    grad = torch.zeros_like(pooled) if grad is None else grad
    delta = (grad * pooled).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    if grad_weights is None or not len(grad_weights):
        grad_weights = lse.new_zeros(0, *lse.shape[1:])
    else:
        bags = bag_of_tile(cu_seqlens, len(k))
        delta = delta.index_add(0, bags, weights * grad_weights)
    grads = _backward(q, k, v, cu_seqlens, ctx.scale, lse, grad, delta, grad_weights)
    return *grads, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
