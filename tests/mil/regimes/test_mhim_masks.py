"""Masks are the sets that their definition names, bag by bag."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from bagscope.mil.regimes.masks import HIGH, RANDOM, MaskSpec, masked_tiles, ranked_share
from tests.kernels.packed import borders

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=5)
SHARES = st.sampled_from([0.0, 0.01, 0.07, 0.3, 0.5, 0.9, 1.0])
WITHIN = st.sampled_from([0.1, 0.5, 0.75, 1.0])
Numbers = NDArray[np.float64]


def counted(tiles: int, share: float, within: float) -> tuple[int, int]:
    """Return how many candidates there are and how many of them are masked."""
    ratio = share / within
    if ratio > 1:
        return tiles, math.ceil(tiles * share)
    candidates = math.ceil(tiles * ratio)
    return candidates, math.ceil(candidates * within)


def sets(scores: Numbers, spec: MaskSpec, high: float, draws: dict[int, Numbers]) -> set[int]:
    """Return the masked tiles of one bag, by sets of indices."""
    found: set[int] = set()
    tiles = len(scores)
    falling = sorted(range(tiles), key=lambda i: (-scores[i], i))
    if high:
        candidates, masked = counted(tiles, high, spec.high_within)
        found |= set(sorted(falling[:candidates], key=lambda i: draws[HIGH][i])[:masked])
    if spec.low:
        rising = sorted(range(tiles), key=lambda i: (scores[i], i))
        found |= set(rising[: math.ceil(tiles * spec.low)])
    if spec.random:
        masked = math.ceil(tiles * spec.random)
        found |= set(sorted(range(tiles), key=lambda i: draws[RANDOM][i])[:masked])
    return found - {falling[0]} if len(found) == tiles else found


@settings(max_examples=80)
@given(LENGTHS, SHARES, WITHIN, SHARES, SHARES, st.integers(0, 99), st.booleans())
def test_each_bag_loses_the_sets_of_the_definition(
    lengths: list[int],
    high: float,
    within: float,
    low: float,
    chance: float,
    seed: int,
    has_ties: bool,
) -> None:
    random = np.random.default_rng(seed)
    scores = random.normal(size=sum(lengths))
    if has_ties:
        scores = scores.round()
    draws = {use: random.random(len(scores)) for use in (HIGH, RANDOM)}
    ranked = {"high": high, "high_within": within, "high_schedule": "cosine"} if high else {}
    spec = MaskSpec.model_validate({**ranked, "low": low, "random": chance})
    found = masked_tiles(
        torch.from_numpy(scores)[:, None],
        borders(lengths),
        spec,
        lambda use: torch.from_numpy(draws[use]),
        progress=0.25,
    )
    now = high * (1 + math.cos(math.pi / 4)) / 2
    assert spec.high_at(0.25) == now
    for start, stop in pairwise(borders(lengths).tolist()):
        own = {use: numbers[start:stop] for use, numbers in draws.items()}
        wanted = sets(scores[start:stop], spec, now, own)
        assert set(found[start:stop].nonzero()[:, 0].tolist()) == wanted
        assert len(wanted) < stop - start


@settings(max_examples=50)
@given(LENGTHS, st.sampled_from([0.1, 0.4, 1.0]), st.integers(2, 5), st.booleans())
def test_columns_vote(lengths: list[int], share: float, columns: int, lowest: bool) -> None:
    random = np.random.default_rng(sum(lengths))
    scores = random.normal(size=(sum(lengths), columns)).round(1)
    found = ranked_share(torch.from_numpy(scores), borders(lengths), share, lowest=lowest)
    for start, stop in pairwise(borders(lengths).tolist()):
        own = scores[start:stop] if lowest else -scores[start:stop]
        count = math.ceil((stop - start) * share)
        order = np.argsort(own, axis=0, kind="stable")
        votes = Counter(order[:count].flatten().tolist())
        ranks = np.argsort(order, axis=0, kind="stable").sum(1)
        wanted = sorted(range(stop - start), key=lambda i: (-votes[i], ranks[i], i))[:count]
        assert set(found[start:stop].nonzero()[:, 0].tolist()) == set(wanted)


def test_a_share_by_chance_takes_each_candidate_as_often() -> None:
    scores = torch.arange(40.0).flip(0)[:, None]
    spec = MaskSpec(high=0.1, high_within=0.5)
    often = torch.zeros(40)
    for step in range(400):
        generator = torch.Generator().manual_seed(step)

        def draw(_: int, generator: torch.Generator = generator) -> Tensor:
            return torch.rand(40, generator=generator, dtype=torch.float64)

        found = masked_tiles(scores, borders([40]), spec, draw)
        assert int(found.sum()) == 4
        often += found
    assert often[8:].sum() == 0
    assert often[:8].min() > 150 and often[:8].max() < 250


@pytest.mark.parametrize("shares", [{"high": 0.5}, {"high": 1.0, "low": 1.0}, {"random": 1.0}])
def test_a_bag_of_one_tile_keeps_it(shares: dict[str, float]) -> None:
    found = masked_tiles(
        torch.tensor([[0.3], [1.0], [2.0]]),
        borders([1, 2]),
        MaskSpec(**shares),
        lambda _: torch.tensor([0.5, 0.1, 0.9]).double(),
    )
    assert not found[0]
    assert not found[1:].all()


def test_the_share_of_the_highest_falls_to_nothing() -> None:
    falling, steady = MaskSpec(high=0.02, high_schedule="cosine"), MaskSpec(high=0.02)
    assert falling.high_at(0.0) == steady.high_at(0.9) == 0.02
    assert falling.high_at(0.5) == pytest.approx(0.01)
    assert falling.high_at(1.0) == 0.0
    assert not MaskSpec().are_any and MaskSpec(low=0.1).are_any
