"""Landmarks: the means of consecutive rows of a bag.

A bag of n rows is cut into runs of ℓ = ⌈n / m⌉ rows, counted from its end; the first run is as long
as what is left. Runs without rows are no landmarks, so a bag has ⌈n / ℓ⌉ of them, and a bag of
n ≤ m rows has none: it needs no approximation.

With `zero_pads`, as published, n rows are filled up to m·ℓ with zeros in front: every bag has m
landmarks, a sum is divided by ℓ whatever it is of, and the zeros are keys that queries find.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from bagscope.kernels.segments import require_borders


@dataclass(frozen=True, slots=True)
class Run:
    """How one bag is cut.

    Attributes:
        start: its first row.
        stop: the row after its last.
        length: ℓ.
        first: rows of the first run that has any.
        divisor: of the first run's sum.
        pads: zeros in front of the bag that count as keys.
        count: landmarks, 0 where the bag needs none.
        empty: landmarks in front that are made of zeros alone.
        at: where its landmarks begin in a table of those of all bags.
    """

    start: int
    stop: int
    length: int
    first: int
    divisor: int
    pads: int
    count: int
    empty: int
    at: int

    @property
    def rows(self) -> slice:
        """Return the bag's rows."""
        return slice(self.start, self.stop)

    @property
    def own(self) -> slice:
        """Return where its landmarks lie in a table of those of all bags."""
        return slice(self.at, self.at + self.count)


def runs(cu_seqlens: Tensor, landmarks: int, zero_pads: bool) -> list[Run]:
    """Return how every bag that has rows is cut."""
    found: list[Run] = []
    at = 0
    for start, stop in pairwise(cu_seqlens.tolist()):
        rows = stop - start
        if not rows:
            continue
        if rows <= landmarks and not zero_pads:
            found.append(Run(start, stop, 1, 1, 1, 0, 0, 0, at))
            continue
        length = -(-rows // landmarks)
        if zero_pads:
            pads, count = landmarks * length - rows, landmarks
            empty, first, divisor = pads // length, length - pads % length, length
        else:
            pads, empty, count = 0, 0, -(-rows // length)
            first = divisor = rows - (count - 1) * length
        found.append(Run(start, stop, length, first, divisor, pads, count, empty, at))
        at += count
    return found


def table_rows(bags: int, tiles: int, landmarks: int, zero_pads: bool) -> int:
    """Return how many rows hold the landmarks of all bags, whatever their lengths are."""
    if zero_pads:
        return landmarks * bags
    # A compiler keeps both sides open, and min() would choose one for good.
    return landmarks * cast("int", torch.sym_min(bags, tiles // (landmarks + 1)))


def means_of(x: Tensor, run: Run) -> Tensor:
    """Return the landmarks (count, ...) of a bag's rows (n, ...)."""
    found = x.new_zeros(run.count, *x.shape[1:])
    found[run.empty] = x[: run.first].sum(0) / run.divisor
    rest = x[run.first :].view(-1, run.length, *x.shape[1:]) if len(x) > run.first else x[:0, None]
    found[run.empty + 1 :] = rest.sum(1) / run.length
    return found


def spread(grad: Tensor, into: Tensor, run: Run) -> None:
    """Add the gradient (count, ...) of a bag's landmarks to that of its rows (n, ...)."""
    into[: run.first] += (grad[run.empty] / run.divisor).to(into.dtype)
    if len(into) > run.first:
        each = (grad[run.empty + 1 :, None] / run.length).to(into.dtype)
        into[run.first :].view(-1, run.length, *into.shape[1:]).add_(each)


def landmark_means(
    x: Tensor, cu_seqlens: Tensor, landmarks: int, *, zero_pads: bool = False
) -> Tensor:
    """Return the landmarks of all bags, one bag's under the other's: (M, C) of x (T, C).

    M is `table_rows`; rows that no bag needs are zero. Float32, or float64 for float64.
    """
    found: Tensor = _means(x, cu_seqlens, landmarks, zero_pads)
    return found


@torch.library.custom_op("bagscope::landmark_means", mutates_args=())
def _means(x: Tensor, cu_seqlens: Tensor, landmarks: int, zero_pads: bool) -> Tensor:
    require_borders(cu_seqlens, len(x))
    found = _table(x, cu_seqlens, landmarks, zero_pads).zero_()
    for run in runs(cu_seqlens, landmarks, zero_pads):
        if run.count:
            found[run.own] = means_of(x[run.rows].to(found.dtype), run)
    return found


@torch.library.custom_op("bagscope::landmark_means_backward", mutates_args=())
def _means_backward(
    grad: Tensor, like: Tensor, rows: int, cu_seqlens: Tensor, landmarks: int, zero_pads: bool
) -> Tensor:
    found = like.new_zeros(rows, grad.shape[1])
    for run in runs(cu_seqlens, landmarks, zero_pads):
        if run.count:
            spread(grad[run.own], found[run.rows], run)
    return found


def _table(x: Tensor, cu_seqlens: Tensor, landmarks: int, zero_pads: bool) -> Tensor:
    rows = table_rows(cu_seqlens.shape[0] - 1, x.shape[0], landmarks, zero_pads)
    return x.new_empty(rows, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


@_means.register_fake
def _(x: Tensor, cu_seqlens: Tensor, landmarks: int, zero_pads: bool) -> Tensor:
    return _table(x, cu_seqlens, landmarks, zero_pads)


@_means_backward.register_fake
def _(
    grad: Tensor, like: Tensor, rows: int, cu_seqlens: Tensor, landmarks: int, zero_pads: bool
) -> Tensor:
    return like.new_empty(rows, grad.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu_seqlens, *ctx.settings = inputs
    ctx.rows = len(x)
    ctx.save_for_backward(x.new_empty(0), cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    like, cu_seqlens = ctx.saved_tensors
    return _means_backward(grad, like, ctx.rows, cu_seqlens, *ctx.settings), None, None, None


_means.register_autograd(_differentiate, setup_context=_keep)
