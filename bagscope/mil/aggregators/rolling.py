"""Attention rollout in linear memory (Abnar & Zuidema 2020): where a prediction's weight came from.

    R = p · Π_l (½ A_l + ½ I)            l from the last layer to the first

p is how the pooling weighs the rows behind the last layer, A_l how rows of layer l weigh those
before it (mean over heads, rows adding up to 1), and ½ I the residual stream. Where tiles learn of
each other through a few rows, A_l is the product of both attentions. The matrices are never there:
the row p is pulled back through one layer after the other, as wᵀA. That costs what the layer's own
way back costs, and memory in proportion to the bag.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bagscope.kernels.segments import bag_of_tile
from bagscope.kernels.varlen_self_attention import varlen_self_attention

Product = Callable[[Tensor], Tensor | None]
"""Weights w (T,) of a layer's rows to wᵀA (T,); None where it can't be told in linear memory."""


def rolled_back(weights: Tensor, products: Sequence[Product]) -> Tensor | None:
    """Return the weights (T,) of the rows before the first layer; None where a product is.

    Args:
        weights: (T,) of the rows behind the last layer; they add up to 1 over each bag.
        products: of the layers, the first layer's first.
    """
    for product in reversed(products):
        pulled = product(weights)
        if pulled is None:
            return None
        weights = (weights + pulled) / 2
    return weights


def last_of(layers: Iterable[Tensor]) -> Tensor:
    """Return what the pooling is given, without keeping what the layers before it are given."""
    (last,) = deque(layers, maxlen=1)
    return last


def shares_of(weights: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return tiles' weights (T,) such that they add up to 1 over each bag; negative ones are 0.

    For rows that are no tiles have been left out by then, and approximate weights may be negative.
    """
    weights = weights.clamp(min=0.0)
    bag = bag_of_tile(cu_seqlens, len(weights))
    return weights / weights.new_zeros(len(cu_seqlens) - 1).index_add(0, bag, weights)[bag]


def pulled_through(
    attend: Callable[[Tensor], Tensor], weights: Tensor, like: Tensor, *, adds_up: bool = True
) -> Tensor:
    """Return Σ_i w_i A_ij (m,), the mean over heads, of attention that is linear in its values.

    That is the gradient of Σ_i w_i (A v)_i with respect to values v of width 1: as cheap as the
    attention's own way back, without a matrix of all pairs.

    Args:
        attend: v (m, H, dv) to A v (T, H, dv); m are the tiles, or B bags' few rows (B, m).
        weights: (T,).
        like: (m, H, d), for rows, heads, dtype and device.
        adds_up: whether the rows of A add up to 1; they are divided by their sums if not.
    """
    with torch.enable_grad():
        values = like.new_zeros(*like.shape[:-1], 1).requires_grad_()
        out = attend(values)
        share = weights.to(out.dtype)[:, None, None].expand_as(out) / out.shape[1]
        if not adds_up:
            with torch.no_grad():
                sums = attend(torch.ones_like(values))
                share = torch.where(sums > 0, share / sums, 0.0)
        (found,) = torch.autograd.grad(out, values, share.contiguous())
    return found.sum((-2, -1)).to(weights.dtype)


def pulled_through_softmax(
    q: Tensor, k: Tensor, weights: Tensor, cu_seqlens: Tensor, *, scale: float | None = None
) -> Tensor:
    """Return `pulled_through` of softmax attention between a bag's rows, q and k (T, H, d)."""

    def attend(values: Tensor) -> Tensor:
        # Values as wide as keys are, which is what the operation takes.
        wide = functional.pad(values, (0, q.shape[-1] - values.shape[-1]))
        return varlen_self_attention(q, k, wide, cu_seqlens, scale=scale)[..., :1]

    return pulled_through(attend, weights, q)


def pulled_to_tiles(weights: Tensor, of_tiles: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return Σ_i w_i A_it (T,), the mean over heads, of attention from few rows to a bag's tiles.

    Args:
        weights: (B, m).
        of_tiles: (T, m, H), A_it of each tile; over a bag they add up to 1.
        cu_seqlens: (B + 1,) int32.
    """
    bag = bag_of_tile(cu_seqlens, len(of_tiles))
    return (weights[bag] * of_tiles.mean(-1).to(weights.dtype)).sum(1)
