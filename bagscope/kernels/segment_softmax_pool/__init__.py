"""Softmax over each bag, and the weighted means of its tiles, in one pass.

    a = softmax of the scores e over a bag      (T, K); masked tiles weigh exactly zero
    pooled = Σ a h        (B, K, D)
    lse = log Σ exp e     (B, K)
    entropy = lse - Σ a e (B, K), which is -Σ a log a
    top = max a           (B, K), without a gradient

Backward, with g the gradient of `pooled` and t = h·g:
    ∂e = a (t - g·pooled + ∂lse - ∂entropy (e - lse + entropy)),  ∂h = Σ_k a g
An empty bag, or one with every tile masked, gives pooled 0, lse -inf, entropy 0, top 0.
Memory: per bag K (D + 4) in float32 and a chunk of rows. Operations: 2 T K D forward, twice that
backward; bound by reading h once each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagscope.kernels.dispatch import choose
from bagscope.kernels.segment_softmax_pool.cpu import (
    FourTensors,
    accumulator,
    segment_softmax_pool_backward_cpu,
    segment_softmax_pool_cpu,
)
from bagscope.kernels.segment_softmax_pool.reference import segment_softmax_pool_reference
from bagscope.kernels.segments import bag_of_tile, require_borders

__all__ = [
    "SegmentPool",
    "accumulator",
    "attention_weights",
    "require_mask",
    "segment_softmax_pool",
]


class SegmentPool(NamedTuple):
    """pooled (B,K,D), lse, entropy and the largest weight (B,K): float32 or float64."""

    pooled: Tensor
    lse: Tensor
    entropy: Tensor
    top: Tensor


def segment_softmax_pool(
    scores: Tensor, h: Tensor, cu_seqlens: Tensor, *, mask: Tensor | None = None
) -> SegmentPool:
    """Pool every bag's tiles by the softmax of their scores.

    Args:
        scores: (T, K) raw logits.
        h: (T, D).
        cu_seqlens: (B + 1,) int32.
        mask: (T, K), True where a tile is left out of a branch.

    Raises:
        ValueError: shapes that do not fit.
    """
    if scores.ndim != 2 or h.ndim != 2 or len(scores) != len(h):
        raise ValueError(
            f"scores are {tuple(scores.shape)} and h is {tuple(h.shape)}; pass (T, K) and (T, D)"
        )
    require_mask(mask, *scores.shape)
    # A compiled graph takes the streaming path: autograd does not look into custom operators.
    if not torch.compiler.is_compiling() and choose("segment_softmax_pool", h) == "reference":
        dtype = accumulator(h.dtype)
        require_borders(cu_seqlens, len(h))
        wide = (scores.to(dtype), h.to(dtype))
        return SegmentPool(*segment_softmax_pool_reference(*wide, cu_seqlens, mask))
    return SegmentPool(*torch.ops.bagscope.segment_softmax_pool(scores, h, cu_seqlens, mask))


def attention_weights(
    scores: Tensor, lse: Tensor, cu_seqlens: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Return the weights a (T, K) from logits and `lse`, differentiable through both."""
    bags = bag_of_tile(cu_seqlens, len(scores))
    found = (scores - torch.where(lse > -torch.inf, lse, 0.0)[bags]).exp()
    return found if mask is None else found.masked_fill(mask, 0.0)


def require_mask(mask: Tensor | None, tiles: int, columns: int) -> None:
    """Refuse a mask that is not (T, K) bool.

    Raises:
        ValueError: names what is wrong.
    """
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (tiles, columns)):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; pass bool ({tiles}, {columns})"
        )


def _refuses(scores: Tensor) -> str:
    columns = scores.shape[1]
    return f"{columns} branches; the kernel takes up to 16" if columns > 16 else ""


@torch.library.custom_op(
    "bagscope::segment_softmax_pool",
    mutates_args=(),
    schema="(Tensor scores, Tensor h, Tensor cu_seqlens, Tensor? mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(scores: Tensor, h: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> FourTensors:
    require_borders(cu_seqlens, len(h))
    way = choose("segment_softmax_pool", h, refuses=_refuses(scores))
    if way in ("cpu", "reference"):
        return segment_softmax_pool_cpu(scores, h, cu_seqlens, mask)
    from bagscope.kernels.segment_softmax_pool.triton import segment_softmax_pool_triton

    return segment_softmax_pool_triton(scores, h, cu_seqlens, mask)


@_forward.register_fake
def _forward_fake(
    scores: Tensor, h: Tensor, cu_seqlens: Tensor, mask: Tensor | None
) -> FourTensors:
    dtype, bags, columns = accumulator(h.dtype), cu_seqlens.shape[0] - 1, scores.shape[1]
    small = [h.new_empty(bags, columns, dtype=dtype) for _ in range(3)]
    return h.new_empty(bags, columns, h.shape[1], dtype=dtype), small[0], small[1], small[2]


@torch.library.custom_op(
    "bagscope::segment_softmax_pool_backward",
    mutates_args=(),
    schema="(Tensor scores, Tensor h, Tensor cu_seqlens, Tensor? mask, Tensor pooled, Tensor lse,"
    " Tensor entropy, Tensor? grad_pooled, Tensor? grad_lse, Tensor? grad_entropy)"
    " -> (Tensor, Tensor)",
)
def _backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    scores, h, cu_seqlens, mask, *rest = inputs
    outputs, grads = tuple(rest[:3]), tuple(rest[3:])
    way = choose("segment_softmax_pool", h, refuses=_refuses(scores))
    if way in ("cpu", "reference"):
        return segment_softmax_pool_backward_cpu(
            scores,
            h,
            cu_seqlens,
            mask,
            (outputs[0], outputs[1], outputs[2]),
            (grads[0], grads[1], grads[2]),
        )
    from bagscope.kernels.segment_softmax_pool.triton import segment_softmax_pool_backward_triton

    return segment_softmax_pool_backward_triton(
        scores,
        h,
        cu_seqlens,
        mask,
        (outputs[0], outputs[1], outputs[2]),
        (grads[0], grads[1], grads[2]),
    )


@_backward.register_fake
def _backward_fake(scores: Tensor, h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), h.new_empty(h.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: FourTensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*inputs, *output[:3])


def _through(
    ctx: Any, pooled: Tensor | None, lse: Tensor | None, entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if pooled is None and lse is None and entropy is None:
        return (None,) * 4
    grad_scores, grad_h = torch.ops.bagscope.segment_softmax_pool_backward(
        *ctx.saved_tensors, pooled, lse, entropy
    )
    return grad_scores, grad_h, None, None


_forward.register_autograd(_through, setup_context=_setup_context)
