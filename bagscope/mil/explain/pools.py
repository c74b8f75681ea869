"""What a model says of bags made of chosen tiles: some removed, some added, some repeated.

A pool holds the T tiles of a slide and, behind them, those of donors. A selection is the rows that
make up a bag, in order, repeats allowed: every counterfactual bag is one.

Attention pooling has a closed form. With w = exp(e − max e) over the selected tiles,

    logits = bias + Σ_k (Σ_i w_ik v_ik) / (Σ_i w_ik)

so that taking out tile i is a subtraction from both sums. Everything else is asked by packing the
bags end to end, as many at a time as a budget of tiles allows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import Bags, PoolingTerms
from bagscope.mil.explain.question import Array, Question

Rows = NDArray[np.int64]

BUDGET_TILES = 1 << 16
CANCELLING = 1e-4
"""Where less than this share of the weight is left, the sums are made anew, not by subtraction."""
_CHUNK_TILES = 1 << 13
_CHECKED_TILES = 1 << 11
_EXACT = 1e-9
_NEARLY = 1e-4
"""The same of float32: a hundred times what sums over tiles lose in it."""
_TINY = 1e-250
"""Weights of the pool's heaviest tile below which a sum of them is made anew, from its own."""


class Pool(Protocol):
    """Tiles that bags can be made of, and what a model says of such bags."""

    @property
    def question(self) -> Question:
        """Return what the model is asked."""
        ...

    @property
    def tiles(self) -> int:
        """Return the number of tiles that there are."""
        ...

    @property
    def is_closed_form(self) -> bool:
        """Return whether answers cost sums alone, the model's own work being done."""
        ...

    def answers(self, selections: Iterable[Rows]) -> Array:
        """Return what the model says of each selection: (n, A).

        Raises:
            ValueError: a selection without a tile.
        """
        ...

    def beginnings(self, orders: Sequence[Rows], counts: Sequence[int]) -> Array:
        """Return what the model says of the first tiles of orders: (orders, counts, A).

        Args:
            orders: of the same number of tiles, each at most once.
            counts: how many of them, rising, from 1 on; they stand in a bag as they do in the pool.
        """
        ...

    def without_each(self, selection: Rows, count: int | None = None) -> Array:
        """Return what it says when one of the first `count` of a selection is left out: (count, A).

        Raises:
            ValueError: a selection of a single tile, which leaves nothing.
        """
        ...


class AttentionPool:
    """A pool of a model that pools by attention: answers in closed form, in float64."""

    def __init__(self, terms: PoolingTerms, question: Question) -> None:
        self._question = question
        self._scores = terms.scores.detach().double().cpu().numpy()
        self._values = terms.values.detach().double().cpu().numpy()
        self._bias = terms.bias.detach().double().cpu().numpy()

    @property
    def question(self) -> Question:
        """Return what the model is asked."""
        return self._question

    @property
    def tiles(self) -> int:
        """Return the number of tiles that there are."""
        return len(self._scores)

    @property
    def is_closed_form(self) -> bool:
        """Return whether answers cost sums alone."""
        return True

    def answers(self, selections: Iterable[Rows]) -> Array:
        """Return what the model says of each selection: (n, A)."""
        logits = [self._logits(_not_empty(selection)) for selection in selections]
        return self._question.read(np.stack(logits))

    def beginnings(self, orders: Sequence[Rows], counts: Sequence[int]) -> Array:
        """Return what the model says of the first tiles of orders: (orders, counts, A).

        One pass over an order does for all of its counts: sums are added up from one to the next.
        """
        last = counts[-1]
        starts = [0, *counts[:-1]]
        weights = np.exp(self._scores - self._scores.max(axis=0))
        parts = weights[:, :, None] * self._values
        found = []
        for order in orders:
            total = np.add.reduceat(weights[order[:last]], starts, axis=0).cumsum(axis=0)
            summed = np.add.reduceat(parts[order[:last]], starts, axis=0).cumsum(axis=0)
            vanishes = total < _TINY
            pooled = summed / np.where(vanishes, 1.0, total)[:, :, None]
            logits = self._bias + pooled.sum(axis=1)
            for place in np.flatnonzero(vanishes.any(axis=1)):
                logits[place] = self._logits(order[: counts[int(place)]])
            found.append(self._question.read(logits))
        return np.stack(found)

    def without_each(self, selection: Rows, count: int | None = None) -> Array:
        """Return what it says with each of the first `count` left out, in one pass: (count, A)."""
        _leaves_one(selection)
        scores = self._scores[selection]
        weights = np.exp(scores - scores.max(axis=0))
        parts = weights[:, :, None] * self._values[selection]
        total, summed = weights.sum(axis=0), parts.sum(axis=0)
        rest = total - weights[:count]
        cancels = rest < CANCELLING * total
        pooled = (summed - parts[:count]) / np.where(cancels, 1.0, rest)[:, :, None]
        logits = self._bias + pooled.sum(axis=1)
        for place in np.flatnonzero(cancels.any(axis=1)):
            logits[place] = self._logits(np.delete(selection, place))
        return self._question.read(logits)

    def _logits(self, selection: Rows) -> Array:
        scores = self._scores[selection]
        weights = np.exp(scores - scores.max(axis=0))
        pooled = np.einsum("tk,tkc->kc", weights, self._values[selection])
        return np.asarray(self._bias + (pooled / weights.sum(axis=0)[:, None]).sum(axis=0))


class PackedPool:
    """A pool of any model: bags are laid end to end and shown to it."""

    def __init__(
        self,
        model: Aggregator,
        bags: Bags,
        question: Question,
        *,
        budget_tiles: int = BUDGET_TILES,
    ) -> None:
        """Take the tiles of all bags.

        Args:
            model: is asked as in prediction, nothing dropped, masked or sampled.
            bags: on the model's device.
            question: that is asked.
            budget_tiles: shown at a time; a larger bag is shown alone. 1 shows every bag alone, as
                a model needs whose bags are not independent of each other.
        """
        self._model, self._bags, self._question = model, bags, question
        self._budget_tiles = budget_tiles

    @property
    def question(self) -> Question:
        """Return what the model is asked."""
        return self._question

    @property
    def tiles(self) -> int:
        """Return the number of tiles that there are."""
        return len(self._bags.features)

    @property
    def is_closed_form(self) -> bool:
        """Return whether answers cost sums alone."""
        return False

    def answers(self, selections: Iterable[Rows]) -> Array:
        """Return what the model says of each selection: (n, A)."""
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.inference_mode():
                logits = [
                    self._model(packed(self._bags, group)).logits.double().cpu().numpy()
                    for group in _groups(selections, self._budget_tiles)
                ]
        finally:
            self._model.train(was_training)
        return self._question.read(np.concatenate(logits))

    def beginnings(self, orders: Sequence[Rows], counts: Sequence[int]) -> Array:
        """Return what the model says of the first tiles of orders: (orders, counts, A)."""
        answers = self.answers(np.sort(order[:n]) for order in orders for n in counts)
        return answers.reshape(len(orders), len(counts), -1)

    def without_each(self, selection: Rows, count: int | None = None) -> Array:
        """Return what it says with each of the first `count` left out: (count, A)."""
        _leaves_one(selection)
        places = range(len(selection) if count is None else count)
        return self.answers(np.delete(selection, place) for place in places)


class MeanPool:
    """Several models' pools of the same tiles: the mean of their answers, as an ensemble's."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        if not pools or len({pool.tiles for pool in pools}) > 1:
            raise ValueError("an ensemble needs one pool or more, all of the same tiles")
        self._pools = tuple(pools)

    @property
    def question(self) -> Question:
        """Return what the first of them is asked; it decides on the mean."""
        return self._pools[0].question

    @property
    def tiles(self) -> int:
        """Return the number of tiles that there are."""
        return self._pools[0].tiles

    @property
    def is_closed_form(self) -> bool:
        """Return whether answers cost sums alone."""
        return all(pool.is_closed_form for pool in self._pools)

    def answers(self, selections: Iterable[Rows]) -> Array:
        """Return the mean answer of each selection: (n, A)."""
        chosen = list(selections)
        return np.asarray(np.mean([pool.answers(chosen) for pool in self._pools], axis=0))

    def beginnings(self, orders: Sequence[Rows], counts: Sequence[int]) -> Array:
        """Return the mean answer to the first tiles of orders: (orders, counts, A)."""
        found = [pool.beginnings(orders, counts) for pool in self._pools]
        return np.asarray(np.mean(found, axis=0))

    def without_each(self, selection: Rows, count: int | None = None) -> Array:
        """Return the mean answer with each of the first `count` left out: (count, A)."""
        found = [pool.without_each(selection, count) for pool in self._pools]
        return np.asarray(np.mean(found, axis=0))


def pool_of(
    model: Aggregator, bags: Bags, question: Question, *, budget_tiles: int = BUDGET_TILES
) -> Pool:
    """Return the pool of a model's tiles: in closed form where it has one, else by packing."""
    terms = attention_terms(model, bags)
    if terms is not None:
        return AttentionPool(terms, question)
    return PackedPool(model, bags, question, budget_tiles=budget_tiles)


def attention_terms(
    model: Aggregator, bags: Bags, dtype: torch.dtype = torch.float64
) -> PoolingTerms | None:
    """Return what a model's attention adds up, or None where no edit can use it.

    A tile's terms must be its own: where they change with the tiles beside it, as behind a layer
    that mixes tiles, taking tiles out changes them too. So they are computed in parts, and must
    then add up to what the model says of a whole bag.

    Args:
        model: whose attention it is.
        bags: the tiles.
        dtype: that is computed in; float32 costs less and is as exact as the model's own logits.
    """
    precise = copy.deepcopy(model).to(dtype).eval()
    count = len(bags.features)
    parts = max(2, math.ceil(count / _CHUNK_TILES))
    every = [np.arange(start, count, parts) for start in range(min(parts, count))]
    checked = np.arange(min(count, _CHECKED_TILES))
    with torch.inference_mode():
        found = []
        for rows in every:
            terms = precise.pooling_terms(packed(bags, [rows], dtype))
            if terms is None:
                return None
            found.append(terms)
        back = torch.from_numpy(np.argsort(np.concatenate(every))).to(found[0].scores.device)
        whole = PoolingTerms(
            scores=torch.cat([terms.scores for terms in found])[back],
            values=torch.cat([terms.values for terms in found])[back],
            bias=found[0].bias,
        )
        sample = packed(bags, [checked], dtype)
        wanted = precise(sample).logits
        rebuilt = PoolingTerms(
            scores=whole.scores[: len(checked)],
            values=whole.values[: len(checked)],
            bias=whole.bias,
        ).logits(sample.cu_seqlens)
    exact = _EXACT if dtype == torch.float64 else _NEARLY
    adds_up = (rebuilt - wanted).abs().max() <= exact * (1 + wanted.abs().max())
    return whole if bool(adds_up) else None


def packed(bags: Bags, selections: Sequence[Rows], dtype: torch.dtype | None = None) -> Bags:
    """Return bags made of the given rows, end to end."""
    device = bags.features.device
    rows = torch.from_numpy(np.concatenate([_not_empty(rows) for rows in selections])).to(device)
    lengths = [0, *(len(selection) for selection in selections)]

    def chosen(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    features = bags.features[rows]
    return replace(
        bags,
        features=features if dtype is None else features.to(dtype),
        cu_seqlens=torch.tensor(lengths, device=device).cumsum(0).to(torch.int32),
        bag_ids=tuple(map(str, range(len(selections)))),
        coords_l0=chosen(bags.coords_l0),
        grid=chosen(bags.grid),
        parent=chosen(bags.parent),
        tile_slide=chosen(bags.tile_slide),
        tile_row=chosen(bags.tile_row),
        targets=None,
    )


def with_donors(bag: Bags, *donors: Bags) -> Bags:
    """Return a bag and those that tiles are taken from as one batch; lattices lie side by side.

    For models that heed places: a donor's tiles keep their places among themselves, and none of
    them falls onto one of the slide's.
    """
    each = (bag, *donors)
    grids, coords = [one.grid for one in each], [one.coords_l0 for one in each]
    sources, rows = [one.tile_slide for one in each], [one.tile_row for one in each]
    slides = np.cumsum([0, *(len(one.slide_ids) for one in each)]).tolist()
    tiles = np.cumsum([0, *(len(one.features) for one in each)]).tolist()
    known_sizes = all(one.tile_um is not None and one.mpp_l0 is not None for one in each)
    return replace(
        bag,
        features=torch.cat([one.features for one in each]),
        cu_seqlens=torch.cat(
            [bag.cu_seqlens[:1]]
            + [one.cu_seqlens[1:] + first for one, first in zip(each, tiles, strict=False)]
        ).to(torch.int32),
        bag_ids=tuple(name for one in each for name in one.bag_ids),
        coords_l0=_joined(coords),
        grid=_joined(_side_by_side(grids)),
        parent=_joined(_apart([one.parent for one in each])),
        slide_ids=tuple(name for one in each for name in one.slide_ids),
        tile_slide=_joined(
            [
                None if source is None else source + first
                for source, first in zip(sources, slides, strict=False)
            ]
        ),
        tile_row=_joined(rows),
        tile_um=_joined([one.tile_um for one in each]) if known_sizes else None,
        mpp_l0=_joined([one.mpp_l0 for one in each]) if known_sizes else None,
        targets=None,
    )


def _apart(parents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return coarse tiles' numbers such that no two bags share one."""
    moved: list[Tensor | None] = []
    begin = 0
    for parent in parents:
        moved.append(None if parent is None else parent + begin)
        begin += 0 if parent is None or not len(parent) else int(parent.max()) + 1
    return moved


def _side_by_side(grids: Sequence[Tensor | None]) -> list[Tensor | None]:
    moved: list[Tensor | None] = []
    begin = 0
    for grid in grids:
        if grid is None:
            return [None]
        moved.append(grid + grid.new_tensor([begin, 0]))
        begin += int(grid[:, 0].max()) + 2 if len(grid) else 0
    return moved


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present and len(present) == len(tensors) else None


def _groups(selections: Iterable[Rows], budget_tiles: int) -> Iterator[list[Rows]]:
    """Yield selections together while their tiles stay within a budget; none is kept for long."""
    group: list[Rows] = []
    tiles = 0
    for selection in selections:
        if group and tiles + len(selection) > budget_tiles:
            yield group
            group, tiles = [], 0
        group.append(selection)
        tiles += len(selection)
    if group:
        yield group


def _not_empty(selection: Rows) -> Rows:
    if not len(selection):
        raise ValueError("a bag without a tile has no prediction; leave at least one tile in it")
    return selection


def _leaves_one(selection: Rows) -> None:
    if len(selection) < 2:
        raise ValueError("a bag of one tile has none to spare; it takes two or more")
