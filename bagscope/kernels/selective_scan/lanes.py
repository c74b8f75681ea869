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
        is_straight: whether the rows come one after the other, in one lane.
    """

    rows: Tensor
    idle: Tensor | None
    starts: Tensor
    is_straight: bool


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of a few chunks, each some steps of all lanes; R positions in all.

    Attributes:
        rows: (R,) int64, or a slice where the rows come one after the other.
        idle: (R,) bool, or None where no position is idle.
        starts: per chunk, (positions,) bool, or None where no bag begins.
        carries: per chunk, None where all lanes carry their state on in every step; otherwise per
            step which do, (lanes, 1, 1) bool, True for all, False for none. At a bag's start the
            state is left out rather than multiplied by zero: zero times NaN is NaN.
    """

    rows: slice | Tensor
    idle: Tensor | None
    starts: list[Tensor | None]
    carries: list[list[Tensor | bool] | None]

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write one line per position to where its row is, leaving idle ones out."""
        if isinstance(self.rows, slice):
            target[self.rows] = values
            return
        rows = self.rows
        if self.idle is not None:
            rows, values = rows[~self.idle], values[~self.idle]
        target.index_copy_(0, rows, values.to(target.dtype))


def cut_blocks(lanes: Lanes, steps: int, chunks: int) -> list[Block]:
    """Cut the lanes into blocks of so many chunks of so many steps.

    The last block may have fewer rows; what its last chunk says of starts covers a whole chunk.
    """
    length, side = lanes.rows.shape
    beyond = torch.zeros(-length % steps, side, dtype=torch.bool)
    starts = torch.cat([lanes.starts, beyond])
    some, every = starts.any(1).tolist(), starts.all(1).tolist()
    blocks = []
    for first in range(0, length, steps * chunks):
        part = slice(first, min(first + steps * chunks, length))
        idle = None if lanes.idle is None else lanes.idle[part].flatten()
        block = Block(
            rows=part if lanes.is_straight else lanes.rows[part].flatten(),
            idle=idle if idle is not None and bool(idle.any()) else None,
            starts=[],
            carries=[],
        )
        for begin in range(part.start, part.stop, steps):
            inside = range(begin, begin + steps)
            if not any(some[begin : begin + steps]):
                block.starts.append(None)
                block.carries.append(None)
                continue
            block.starts.append(starts[begin : begin + steps].flatten())
            block.carries.append(
                [(not every[t] and ~starts[t][:, None, None]) if some[t] else True for t in inside]
            )
        blocks.append(block)
    return blocks


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
    is_straight = lanes == 1 and order is None and not reverse
    return Lanes(rows.view(steps, lanes), idle, starts.view(steps, lanes), is_straight)


def _pack(lengths: list[int], lanes: int) -> tuple[list[int], list[int], int]:
    """Return each bag's lane and its first step there, and the steps of the fullest lane."""
    lane, offset = [0] * len(lengths), [0] * len(lengths)
    loads = [(0, w) for w in range(lanes)]
    # One lane takes the bags as they come, so that it may read row after row.
    bags = range(len(lengths))
    for bag in bags if lanes == 1 else sorted(bags, key=lambda b: -lengths[b]):
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
