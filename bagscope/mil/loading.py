"""From a source to batches: which bags make a step, which of them fit into memory at a time.

A step is one change of the weights. Its bags are worked on in one batch where their tiles fit the
budget, in several where they do not; gradients are added up, so memory changes no result beyond
rounding.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bagscope.mil.bags import Bags
from bagscope.mil.recipe import BagSpec
from bagscope.mil.sampling import Key, disturb, leave_out, sample_rows
from bagscope.mil.sources import BagSource, CaseBag
from bagscope.mil.statistics import Scale

Item = TypeVar("Item")
Made = TypeVar("Made")


Batch = tuple[int, ...]
"""Places in a source's cases that are worked on together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One change of the weights: its number in the training, and its batches."""

    number: int
    batches: tuple[Batch, ...]

    @property
    def size(self) -> int:
        """Return the number of bags."""
        return sum(len(batch) for batch in self.batches)

    @property
    def turns(self) -> tuple[Batch, ...]:
        """Return, beside each bag, how often its case came in the step before."""
        seen: Counter[int] = Counter()
        found = []
        for batch in self.batches:
            turns = []
            for place in batch:
                turns.append(seen[place])
                seen[place] += 1
            found.append(tuple(turns))
        return tuple(found)


def plan_epoch(
    lengths: NDArray[np.int64],
    spec: BagSpec,
    *,
    seed: int,
    epoch: int,
    weights: NDArray[np.float64] | None = None,
    whole_steps: bool = False,
) -> list[Step]:
    """Return the steps of a training epoch, shuffled.

    Args:
        lengths: (n,) tiles of each case.
        spec: how bags are presented.
        seed: of the run.
        epoch: from 0.
        weights: (n,) with which cases are drawn, with replacement; all come once where None.
        whole_steps: never cut a step into several batches, and leave no step smaller than asked
            for (a loss that compares bags, which one bag alone teaches nothing): bags that are left
            over join the others.
    """
    generator = np.random.default_rng([seed, epoch, 0])
    count = len(lengths)
    if weights is None:
        order = generator.permutation(count)
    else:
        order = generator.choice(count, count, p=weights / weights.sum())
    shown = lengths if spec.sample_tiles is None else np.minimum(lengths, spec.sample_tiles)
    size = spec.bags_per_step
    if whole_steps:
        groups = np.array_split(order, max(1, count // size))
    else:
        groups = [order[begin : begin + size] for begin in range(0, count, size)]
    budget = None if whole_steps else spec.batch_tiles
    return [
        Step(number=epoch * len(groups) + place, batches=pack(group, shown, budget))
        for place, group in enumerate(groups)
    ]


def pack(
    order: Sequence[int] | NDArray[np.int64], lengths: NDArray[np.int64], budget: int | None
) -> tuple[Batch, ...]:
    """Cut an order of bags into batches of at most `budget` tiles; a larger bag is one alone."""
    batches: list[Batch] = []
    current: list[int] = []
    tiles = 0
    for place in map(int, order):
        if current and budget is not None and tiles + lengths[place] > budget:
            batches.append(tuple(current))
            current, tiles = [], 0
        current.append(place)
        tiles += int(lengths[place])
    if current:
        batches.append(tuple(current))
    return tuple(batches)


@dataclass(frozen=True, kw_only=True, slots=True)
class Presentation:
    """How a batch is read.

    Attributes:
        dtype: of the features.
        training: whether tiles are sampled and disturbed.
        seed: of the run.
        scale: that tiles are brought to, None to leave them as they are.
    """

    spec: BagSpec
    dtype: torch.dtype = torch.float32
    training: bool = False
    seed: int = 0
    scale: Scale | None = None


def load_batch(
    source: BagSource,
    batch: Batch,
    how: Presentation,
    *,
    step: int = 0,
    turns: tuple[int, ...] | None = None,
    progress: float = 0.0,
) -> Bags:
    """Read the cases of a batch and lay them end to end.

    Args:
        source: of the cases.
        batch: which of them.
        how: they are read.
        step: number in the training, that draws are keyed by.
        turns: how often each came in the step before; never if None.
        progress: share of the training that is done.
    """
    keys = [
        (how.seed, step, source.cases[place].case_id, turn)
        for place, turn in zip(batch, turns or (0,) * len(batch), strict=True)
    ]
    bags = [_read(source, place, how, key) for place, key in zip(batch, keys, strict=True)]
    lengths = [len(bag.features) for bag in bags]
    features = torch.empty(sum(lengths), source.dimension, dtype=how.dtype)
    end = 0
    for bag, length, key in zip(bags, lengths, keys, strict=True):
        tiles = torch.from_numpy(bag.features)
        if how.scale is not None:
            tiles = how.scale.apply(tiles)
        if how.training:
            tiles = disturb(tiles, dropout=how.spec.feature_dropout, noise=how.spec.noise, key=key)
        features[end : end + length] = tiles
        end += length
    slides = np.cumsum([0, *(len(bag.slide_ids) for bag in bags)])
    has_coords = all(bag.coords_l0 is not None for bag in bags)
    has_grid = all(bag.grid is not None for bag in bags)
    has_parents = all(bag.parent is not None for bag in bags)
    names = bags[0].case.targets
    return Bags(
        features=features,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        bag_ids=tuple(bag.case.case_id for bag in bags),
        coords_l0=_cat([bag.coords_l0 for bag in bags]) if has_coords else None,
        grid=_cat([bag.grid for bag in bags]) if has_grid else None,
        parent=_cat([bag.parent for bag in bags]) if has_parents else None,
        slide_ids=tuple(slide_id for bag in bags for slide_id in bag.slide_ids),
        tile_slide=_cat(
            [bag.tile_slide + np.int32(first) for bag, first in zip(bags, slides, strict=False)]
        ),
        tile_row=_cat([bag.tile_row for bag in bags]),
        tile_um=_cat([bag.tile_um for bag in bags]),
        mpp_l0=_cat([bag.mpp_l0 for bag in bags]),
        targets={
            name: torch.tensor([bag.case.targets[name] for bag in bags], dtype=torch.float64)
            for name in names
        }
        or None,
        seed=how.seed,
        step=step,
        progress=progress,
    )


class Prefetched(Iterator[Made]):
    """Makes items in a thread of its own, so that the next is there when this one is used up.

    Attributes:
        waited_s: how long the consumer had to wait.
    """

    def __init__(
        self, items: Sequence[Item], make: Callable[[Item], Made], *, ahead: int = 2
    ) -> None:
        self.waited_s = 0.0
        self._ready: queue.Queue[tuple[bool, Made | BaseException | None]] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items, make), daemon=True)
        self._thread.start()

    def __next__(self) -> Made:
        began_s = time.perf_counter()
        is_made, item = self._ready.get()
        self.waited_s += time.perf_counter() - began_s
        if is_made:
            return item  # type: ignore[return-value]  # what `make` returned
        self._ready.put((False, item))  # whoever asks again hears the same
        if item is None:
            raise StopIteration
        assert isinstance(item, BaseException)
        raise item

    def close(self) -> None:
        """Stop making items and wait until the thread has ended."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _work(self, items: Sequence[Item], make: Callable[[Item], Made]) -> None:
        end: BaseException | None = None
        try:
            for item in items:
                if self._stopped.is_set():
                    return
                self._put((True, make(item)))
        except BaseException as error:  # handed to the consumer, whatever it is
            end = error
        self._put((False, end))

    def _put(self, entry: tuple[bool, Made | BaseException | None]) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue


def _read(source: BagSource, place: int, how: Presentation, key: Key) -> CaseBag:
    rows = None
    if how.training:
        spec, length = how.spec, int(source.lengths[place])
        by_place = spec.sample_tiles is not None and spec.sampling == "spatial"
        grid = source.grid(place) if by_place else None
        rows = sample_rows(length, spec.sample_tiles, spec.sampling, grid, key=key)
        rows = leave_out(rows, length, spec.tile_dropout, key=key)
    return source.read(place, rows)


def _cat(arrays: Sequence[NDArray[np.generic] | None]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([array for array in arrays if array is not None]))
