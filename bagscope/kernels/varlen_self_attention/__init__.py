"""Exact attention inside each bag, between all its tiles or between neighbours on the lattice.

    out_i = Σ_j softmax_j(scale · q_i · k_j) v_j        j: tiles of i's bag, or those within r steps

Shapes: T tiles, B bags, H heads, d and dv features per head: q and k (T, H, d), v (T, H, dv), out
(T, H, dv). k and v may have fewer heads, if their number divides q's. "Within r steps" means that
neither column nor row differs by more than r: a square of (2r + 1)² places, of which the tissue
fills some.

Between all tiles, torch's own attention runs: flash attention bag by bag on the CPU; on CUDA the
variable-length kernel for 16-bit numbers where this torch has it, else attention over a jagged
tensor. Between neighbours, blocks of 64 tiles along a Hilbert curve look at the blocks near them.

Kept for backward: the inputs, out and lse (T, H); weights are computed again. Memory beyond that is
a few blocks, and for neighbours sorted copies of q, k, v and out (on the CPU also two float32 sums
of k's and v's size). 2·T·n·H·(d + dv) operations forward, 2.5 times as many backward, where n is
the bag's size, or about (2r + 15)² for neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.dispatch import choose, own_arithmetic
from bagscope.kernels.segments import require_borders
from bagscope.kernels.varlen_self_attention import cpu
from bagscope.kernels.varlen_self_attention.neighbours import Neighbours, find_neighbours
from bagscope.kernels.varlen_self_attention.reference import varlen_self_attention_reference

__all__ = [
    "Neighbours",
    "find_neighbours",
    "varlen_self_attention",
    "varlen_self_attention_reference",
]

_OP = "varlen_self_attention"
_HALF = (torch.float16, torch.bfloat16)


def varlen_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    neighbours: tuple[Tensor, int] | Neighbours | None = None,
    longest: int | None = None,
) -> Tensor:
    """Return (T, H, dv).

    Args:
        q: queries, (T, H, d).
        k: keys, (T, H, d), or with fewer heads.
        v: values, (T, H, dv), with as many heads as k.
        cu_seqlens: (B + 1,) int32.
        scale: of the scores, 1/√d by default.
        neighbours: None for all tiles; (grid, r) with the column and row of each tile, (T, 2)
            integers; or what `find_neighbours` made of them, to find them once for many layers.
        longest: tiles of the longest bag, where known: saves a GPU some empty blocks.

    Raises:
        ValueError: shapes or borders do not belong together.
    """
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(_shapes(q, k, v))
    if len(q) != len(k) or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(_shapes(q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if neighbours is None:
        return _between_all(q, k, v, cu_seqlens, scale, longest)
    if not isinstance(neighbours, Neighbours):
        grid, r = neighbours
        if len(grid) != len(q):
            raise ValueError(f"grid has {len(grid)} rows for {len(q)} tiles; pass one row per tile")
        if not torch.compiler.is_compiling() and choose(_OP, q) == "reference":
            return varlen_self_attention_reference(q, k, v, cu_seqlens, scale, (grid, r))
        neighbours = find_neighbours(grid, cu_seqlens, r)
    out: Tensor = _near(q, k, v, scale, *neighbours)[0]
    return out


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    return f"q, k, v are {shapes}; pass (T, H, d), (T, H, d) and (T, H, dv)"


def _between_all(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, longest: int | None
) -> Tensor:
    width, values = q.shape[-1], v.shape[-1]
    # Flash attention wants heads of one width; zeros change no score and no value.
    q, k, v = (F.pad(x, (0, max(width, values) - x.shape[-1])) for x in (q, k, v))
    if q.device.type != "cpu":
        return _on_device(q, k, v, cu_seqlens, scale, longest or len(q))[..., :values]
    if not torch.compiler.is_compiling() and choose(_OP, q) == "reference":
        return varlen_self_attention_reference(q, k, v, cu_seqlens, scale)[..., :values]
    out: Tensor = _full(q, k, v, cu_seqlens, scale)[0]
    return out[..., :values]


def _on_device(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, longest: int
) -> Tensor:
    """Return torch's own attention over ragged bags, by this torch's version and the dtype."""
    if q.dtype in _HALF:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            pass
        else:
            found = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale)
            assert isinstance(found, Tensor)
            return found
    return jagged_attention(q, k, v, cu_seqlens, scale, longest)


def jagged_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, longest: int
) -> Tensor:
    """Return scaled-dot-product attention over a jagged tensor, for every dtype."""
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            x, offsets=cu_seqlens.long(), min_seqlen=1, max_seqlen=longest
        ).transpose(1, 2)
        for x in (q, k, v)
    )
    out: Tensor = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).values()
    return out


@torch.library.custom_op("bagscope::varlen_self_attention", mutates_args=())
def _full(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    require_borders(cu_seqlens, len(q))
    choose(_OP, q)
    with own_arithmetic():
        return cpu.forward_full(q, k, v, cu_seqlens, scale)


@torch.library.custom_op("bagscope::varlen_self_attention_backward", mutates_args=())
def _full_backward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with own_arithmetic():
        return cpu.backward_full(q, k, v, cu_seqlens, scale, out, lse, grad)


@_full.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse_like(q)


@_full_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_full(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)


def _differentiate_full(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> Any:
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    grads = _full_backward(q, k, v, cu_seqlens, ctx.scale, out, lse, grad)
    return *grads, None, None


_full.register_autograd(_differentiate_full, setup_context=_keep_full)


def _lse_like(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def _way(q: Tensor, v: Tensor) -> Any:
    refuses = "heads are wider than 128" if max(q.shape[-1], v.shape[-1]) > 128 else ""
    if choose(_OP, q, refuses=refuses) in ("triton", "interpret") and len(q):
        from bagscope.kernels.varlen_self_attention import triton

        return triton
    return cpu


@torch.library.custom_op("bagscope::neighbourhood_attention", mutates_args=())
def _near(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    order: Tensor, places: Tensor, start: Tensor, stop: Tensor, first: Tensor, near: Tensor, r: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = Neighbours(order, places, start, stop, first, near, r)
    with own_arithmetic():
        rows, lse = _way(q, v).forward_near(q[order], k[order], v[order], scale, found)
    out = torch.empty_like(rows)
    out[order] = rows
    return out, lse


@torch.library.custom_op("bagscope::neighbourhood_attention_backward", mutates_args=())
def _near_backward(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    order: Tensor, places: Tensor, start: Tensor, stop: Tensor, first: Tensor, near: Tensor, r: int,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found = Neighbours(order, places, start, stop, first, near, r)
    with own_arithmetic():
        grads = _way(q, v).backward_near(
            q[order], k[order], v[order], scale, found, out[order], lse, grad[order]
        )
    back = tuple(torch.empty_like(rows) for rows in grads)
    for whole, rows in zip(back, grads, strict=True):
        whole[order] = rows
    return back  # type: ignore[return-value]


@_near.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    order: Tensor, places: Tensor, start: Tensor, stop: Tensor, first: Tensor, near: Tensor, r: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return v.new_empty(v.shape), _lse_like(q)


@_near_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    order: Tensor, places: Tensor, start: Tensor, stop: Tensor, first: Tensor, near: Tensor, r: int,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_near(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, *found, ctx.r = inputs
    ctx.save_for_backward(q, k, v, *found, *output)


def _differentiate_near(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> Any:
    q, k, v, *found, out, lse = ctx.saved_tensors
    grads = _near_backward(q, k, v, ctx.scale, *found, ctx.r, out, lse, grad)
    return *grads, *[None] * 8


_near.register_autograd(_differentiate_near, setup_context=_keep_near)
