"""Softmax pooling per bag, streamed in chunks of rows: what exists at once is one chunk.

A chunk holds pieces of bags. Each piece gives a maximum, a sum and a weighted sum of rows, which
are merged into those of its bag (online softmax).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagscope.kernels.dispatch import own_arithmetic
from bagscope.kernels.segments import Piece, pieces

FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]
_LEAST = -1e30
"""Stands for a masked score where -inf would not do; times a gradient it is still finite."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over a bag are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Pool:
    """The running softmax of every bag: fed with chunks, asked once at the end.

    Args:
        bags: B.
        columns: K.
        features: D.
        like: a tensor of the wanted device; its dtype decides the accumulator's.
    """

    def __init__(self, bags: int, columns: int, features: int, like: Tensor) -> None:
        dtype, device = accumulator(like.dtype), like.device
        self.top = torch.full((bags, columns), -torch.inf, dtype=dtype, device=device)
        self.total = torch.zeros(bags, columns, dtype=dtype, device=device)
        self.weighted_score = torch.zeros_like(self.total)
        self.pooled = torch.zeros(bags, columns, features, dtype=dtype, device=device)

    def add(self, scores: Tensor, h: Tensor, parts: list[Piece], start: int) -> None:
        """Take in a chunk: scores (R,K) with -inf for masked tiles, h (R,D), its pieces."""
        h = h.to(self.pooled.dtype)
        for bag, first, last in parts:
            e = scores[first - start : last - start]
            self._add_piece(bag, e, h[first - start : last - start])

    def _add_piece(self, bag: int, e: Tensor, h: Tensor) -> None:
        top = torch.maximum(self.top[bag], e.amax(0))
        # A column with every tile masked so far has no maximum to subtract.
        safe = finite(top)
        decay = (self.top[bag] - safe).exp_()
        p = (e - safe).exp_()
        self.total[bag].mul_(decay).add_(p.sum(0))
        self.weighted_score[bag].mul_(decay).add_((p * finite(e)).sum(0))
        self.pooled[bag].mul_(decay[:, None]).addmm_(p.T, h)
        self.top[bag] = top

    def finish(self) -> FourTensors:
        """Return pooled (B,K,D), lse, entropy and the largest weight (B,K)."""
        filled = self.total > 0
        total = torch.where(filled, self.total, 1.0)
        lse = self.top + total.log()
        mean = self.weighted_score / total
        entropy = torch.where(filled, lse - mean, 0.0).clamp_min_(0.0)
        largest = torch.where(filled, total.reciprocal(), 0.0)
        return self.pooled.div_(total[:, :, None]), lse, entropy, largest


class PoolGradient:
    """Gradients of the pooling, chunk by chunk, from what the forward pass returned.

    With a the weights, t = h·g for the gradient g of `pooled`, and the bag's constants,
    de = a (t - g·pooled + grad_lse - grad_entropy (e - lse + entropy)) and dh = a g.
    """

    def __init__(
        self,
        pooled: Tensor,
        lse: Tensor,
        entropy: Tensor,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> None:
        grad_pooled, grad_lse, grad_entropy = grads
        self.lse = torch.where(lse > -torch.inf, lse, 0.0)
        self.g = None if grad_pooled is None else grad_pooled.to(pooled.dtype).contiguous()
        self.constant = torch.zeros_like(lse)
        if self.g is not None:
            self.constant -= (self.g * pooled).sum(-1)
        if grad_lse is not None:
            self.constant += grad_lse
        self.slope = None if grad_entropy is None else grad_entropy.to(lse.dtype)
        if self.slope is not None:
            # -slope (e - lse + entropy), without its part in e.
            self.constant -= self.slope * (entropy - self.lse)

    def piece(self, bag: int, e: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of a piece's scores (R,K) and its weights (R,K)."""
        a = (e - self.lse[bag]).exp_()
        found = self.constant[bag].expand_as(e).clone()
        if self.g is not None:
            # A product with a few rows is up to twice as fast as one with a few columns.
            found += torch.mm(self.g[bag], h.T).T
        if self.slope is not None:
            found -= self.slope[bag] * finite(e)
        return found.mul_(a), a

    def spread(self, a: Tensor, bag: int, out: Tensor) -> None:
        """Write the gradient of a piece's h (R,D), from its weights, into out."""
        if self.g is None:
            return
        if out.dtype == a.dtype:
            torch.mm(a, self.g[bag], out=out)
        else:
            out.copy_(a @ self.g[bag])


def finite(e: Tensor) -> Tensor:
    """Return the scores, very low where masked: the weight there, zero, times -inf would be NaN."""
    return e.clamp_min(_LEAST)


def masked(
    scores: Tensor, mask: Tensor | None, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Return the chunk's scores with -inf where masked."""
    e = scores[start:stop].to(dtype)
    return e if mask is None else e.masked_fill(mask[start:stop], -torch.inf)


def segment_softmax_pool_cpu(
    scores: Tensor, h: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None
) -> FourTensors:
    """Return pooled, lse, entropy and the largest weight in one pass over h."""
    pool = Pool(len(cu_seqlens) - 1, scores.shape[1], h.shape[1], h)
    with own_arithmetic():
        for start, stop, parts in pieces(cu_seqlens):
            e = masked(scores, mask, start, stop, pool.total.dtype)
            pool.add(e, h[start:stop], parts, start)
    return pool.finish()


def segment_softmax_pool_backward_cpu(
    scores: Tensor,
    h: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of scores and h in one pass over h."""
    gradient = PoolGradient(*outputs, grads)
    dtype = outputs[0].dtype
    # Not the inputs' own strides: these may be anything, and nothing gains by keeping them.
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if gradient.g is None:
        grad_h.zero_()
    with own_arithmetic():
        for start, stop, parts in pieces(cu_seqlens):
            e = masked(scores, mask, start, stop, dtype)
            rows = h[start:stop].to(dtype)
            for bag, first, last in parts:
                here = slice(first - start, last - start)
                grad_scores[first:last], a = gradient.piece(bag, e[here], rows[here])
                gradient.spread(a, bag, grad_h[first:last])
    return grad_scores, grad_h
