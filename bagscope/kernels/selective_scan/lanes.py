"""The order in which a scan visits the rows: bags side by side in lanes, each lane bag after bag.

A scan is one Python step per position. Bags don't know of each other, so many small ones walk side
by side: lane w visits `rows[0, w], rows[1, w], …`. A single long bag is a single lane.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bagscope.kernels.segments import bag_of_tile

_MOST_LANES = 32
_STEP_ELEMENTS = 1 << 15
"""Elements that a step should have at most: up to here torch works in one thread, beyond it wakes
others, which for so little costs more than it gives."""
_IDLE_SHARE = 0.15
"""Share of lane positions that may stand idle; beyond it fewer lanes are less work."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """Where every position of every lane reads and writes.

    Attributes:
        rows: (steps, lanes) int64, the row of u at that position; idle positions name row 0.
        idle: (steps, lanes) bool, or None where no position is idle.
        starts: (steps, lanes) bool, whether a bag begins there.
    """

    rows: Tensor
    idle: Tensor | None
    starts: Tensor


def lay_lanes(
    cu_seqlens: Tensor, tiles: int, reverse: bool, order: Tensor | None, state: int
) -> Lanes:
    """Distribute bags over lanes; `tiles` is at least 1, `state` the elements of one state."""
    lengths = cu_seqlens.diff().tolist()
    most = min(_MOST_LANES, _STEP_ELEMENTS // max(1, state))
    lanes = max(1, min(most, tiles // max(lengths)))
    lane, offset, steps = _pack(lengths, lanes)
    while lanes > 1 and steps * lanes > (1 + _IDLE_SHARE) * tiles:
        lanes -= 1
        lane, offset, steps = _pack(lengths, lanes)
    bag = bag_of_tile(cu_seqlens, tiles)
    position = torch.arange(tiles)
    within = position - cu_seqlens[:-1].long()[bag]
    if reverse:
        within = cu_seqlens.diff().long()[bag] - 1 - within
    at = (torch.tensor(offset)[bag] + within) * lanes + torch.tensor(lane)[bag]
    rows = torch.zeros(steps * lanes, dtype=torch.int64)
    rows[at] = position if order is None else order.to(torch.int64)
    starts = torch.zeros(steps * lanes, dtype=torch.bool)
    starts[at] = within == 0
    idle = None
    if steps * lanes > tiles:
        idle = torch.ones(steps * lanes, dtype=torch.bool)
        idle[at] = False
        idle = idle.view(steps, lanes)
    return Lanes(rows.view(steps, lanes), idle, starts.view(steps, lanes))


def _pack(lengths: list[int], lanes: int) -> tuple[list[int], list[int], int]:
    """Return each bag's lane and its first step there, and the steps of the fullest lane."""
    lane, offset = [0] * len(lengths), [0] * len(lengths)
    loads = [(0, w) for w in range(lanes)]
    for bag in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        load, w = heapq.heappop(loads)
        lane[bag], offset[bag] = w, load
        heapq.heappush(loads, (load + lengths[bag], w))
    return lane, offset, max(load for load, _ in loads)


def require_order(order: Tensor | None, cu_seqlens: Tensor, tiles: int) -> None:
    """Refuse an order that is no permutation, or that takes a row out of its bag.

    On a GPU only shape and dtype are looked at: values would cost a synchronisation.

    Raises:
        ValueError: names what is wrong.
    """
    if order is None:
        return
    if order.shape != (tiles,) or order.dtype != torch.int64:
        raise ValueError(
            f"order is {order.dtype} {tuple(order.shape)}; pass an int64 permutation of ({tiles},)"
        )
    if order.device.type != "cpu":
        return
    for start, stop in pairwise(cu_seqlens.tolist()):
        if not torch.equal(order[start:stop].sort()[0], torch.arange(start, stop)):
            raise ValueError(
                f"order does not permute the rows {start} to {stop} of a bag among themselves; "
                "let order[cu_seqlens[b]:cu_seqlens[b + 1]] hold exactly these rows"
            )
