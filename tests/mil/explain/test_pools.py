"""Every way to ask a pool gives what the model says of the bag itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.mil.explain import pools
from bagscope.mil.explain.pools import (
    AttentionPool,
    MeanPool,
    PackedPool,
    Pool,
    attention_terms,
    pool_of,
    with_donors,
)
from bagscope.mil.explain.question import Question, probabilities
from tests.mil.explain.made_models import CLOSED, EVERY, QUESTION, asked, bags, model

MADE = bags(17, 9)
SELECTIONS = [
    np.arange(17),
    np.array([3]),
    np.delete(np.arange(17), [2, 5]),
    np.array([0, 4, 4, 4, 20, 25]),
    np.array([16, 2, 9]),
]


@pytest.mark.parametrize("kind", EVERY)
def test_a_pool_says_what_the_model_says(kind: str) -> None:
    aggregator = model(kind)
    pool = pool_of(aggregator, MADE, QUESTION, budget_tiles=20)
    assert isinstance(pool, AttentionPool if kind in CLOSED else PackedPool)
    tolerance = 1e-12 if kind in CLOSED else 1e-6
    found = pool.answers(iter(SELECTIONS))
    np.testing.assert_allclose(found, asked(aggregator, MADE, SELECTIONS), atol=tolerance)
    assert pool.tiles == 26

    for selection in (np.arange(17), np.array([4, 4, 20, 25]), np.array([0, 1])):
        without = [np.delete(selection, place) for place in range(len(selection))]
        wanted = asked(aggregator, MADE, without)
        np.testing.assert_allclose(pool.without_each(selection), wanted, atol=tolerance)
        np.testing.assert_allclose(pool.without_each(selection, 2), wanted[:2], atol=tolerance)


@pytest.mark.parametrize("kind", CLOSED)
def test_closed_form_and_packing_agree(kind: str) -> None:
    aggregator = model(kind)
    closed = pool_of(aggregator, MADE, QUESTION)
    packed = PackedPool(aggregator, MADE, QUESTION, budget_tiles=1)
    np.testing.assert_allclose(closed.answers(SELECTIONS), packed.answers(SELECTIONS), atol=1e-6)


@pytest.mark.parametrize("gap", [5.0, 9.0, 12.0, 40.0, 800.0])
def test_a_tile_that_has_all_the_weight_is_taken_out_exactly(gap: float) -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(12, 2))
    scores[4, 0] += gap
    values = generator.normal(size=(12, 2, 3)) * 5
    bias = generator.normal(size=3)
    terms = PoolingTerms(
        scores=torch.from_numpy(scores),
        values=torch.from_numpy(values),
        bias=torch.from_numpy(bias),
    )
    found = AttentionPool(terms, QUESTION).without_each(np.arange(12))
    for place in range(12):
        rest = np.delete(np.arange(12), place)
        weights = torch.from_numpy(scores[rest]).softmax(0).numpy()
        logits = bias + (weights[:, :, None] * values[rest]).sum((0, 1))
        np.testing.assert_allclose(found[place], probabilities(logits[None])[0], atol=1e-10)


class Mixing(Aggregator):
    """Subtracts the bag's mean first, so that a tile's terms are not its own."""

    def __init__(self, inner: Aggregator) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, made: Bags) -> BagOutput:
        return self.inner(self.mixed(made))

    def pooling_terms(self, made: Bags) -> PoolingTerms | None:
        return self.inner.pooling_terms(self.mixed(made))

    def mixed(self, made: Bags) -> Bags:
        each = [made.one(bag).features for bag in range(len(made))]
        return replace(made, features=torch.cat([bag - bag.mean(0) for bag in each]))


@pytest.mark.parametrize("chunk", [4, 1 << 13])
def test_terms_that_depend_on_other_tiles_are_not_used(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "_CHUNK_TILES", chunk)
    mixing = Mixing(model("abmil")).eval()
    assert attention_terms(mixing, MADE) is None
    assert attention_terms(model("abmil"), MADE) is not None
    pool = pool_of(mixing, MADE, QUESTION)
    np.testing.assert_allclose(pool.answers(SELECTIONS), asked(mixing, MADE, SELECTIONS), atol=1e-6)


def test_terms_of_a_single_tile() -> None:
    made = bags(1)
    aggregator = model("gated")
    pool = pool_of(aggregator, made, QUESTION)
    rows = [np.array([0])]
    np.testing.assert_allclose(pool.answers(rows), asked(aggregator, made, rows), atol=1e-12)


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    members = [model("abmil", seed) for seed in (0, 1)]
    pool = MeanPool([pool_of(member, MADE, QUESTION) for member in members])
    wanted = np.mean([asked(member, MADE, SELECTIONS) for member in members], axis=0)
    np.testing.assert_allclose(pool.answers(iter(SELECTIONS)), wanted, atol=1e-12)
    rows = np.arange(5)
    without = [np.delete(rows, place) for place in rows]
    wanted = np.mean([asked(member, MADE, without) for member in members], axis=0)
    np.testing.assert_allclose(pool.without_each(rows), wanted, atol=1e-12)
    with pytest.raises(ValueError, match="all of the same tiles"):
        MeanPool([pool, pool_of(members[0], bags(3), QUESTION)])


@pytest.mark.parametrize("kind", ["abmil", "max"])
def test_bags_without_a_tile_are_refused(kind: str) -> None:
    pool: Pool = pool_of(model(kind), MADE, QUESTION)
    with pytest.raises(ValueError, match="no prediction"):
        pool.answers([np.zeros(0, np.int64)])
    with pytest.raises(ValueError, match="none to spare"):
        pool.without_each(np.array([3]))


def test_packing_shows_no_more_tiles_than_its_budget_and_leaves_the_mode() -> None:
    aggregator = model("max").train()
    sizes: list[list[int]] = []

    class Watched(Aggregator):
        def forward(self, made: Bags) -> BagOutput:
            assert not self.training
            sizes.append(made.lengths.tolist())
            return aggregator(made)

    watched = Watched().train()
    PackedPool(watched, MADE, QUESTION, budget_tiles=20).answers(SELECTIONS)
    assert sizes == [[17, 1], [15], [6, 3]]
    assert watched.training


def test_donors_lie_beside_the_subject() -> None:
    def placed(count: int, name: str) -> Bags:
        places = torch.arange(count, dtype=torch.int32)
        return replace(
            bags(count),
            bag_ids=(name,),
            grid=torch.stack([places % 3, places // 3], 1),
            coords_l0=torch.stack([places, places], 1),
            slide_ids=(name,),
            tile_slide=torch.zeros(count, dtype=torch.int32),
            tile_row=places,
            tile_um=torch.tensor([float(count)]),
            mpp_l0=torch.tensor([0.5]),
        )

    joined = with_donors(placed(6, "s"), placed(4, "d"))
    assert joined.cu_seqlens.tolist() == [0, 6, 10]
    assert joined.bag_ids == joined.slide_ids == ("s", "d")
    assert joined.tile_slide is not None and joined.tile_slide.tolist() == [0] * 6 + [1] * 4
    assert joined.grid is not None and len({tuple(place) for place in joined.grid.tolist()}) == 10
    assert joined.grid[6].tolist() == [4, 0]
    assert joined.tile_um is not None and joined.tile_um.tolist() == [6.0, 4.0]
    bare = with_donors(placed(6, "s"), bags(4))
    assert bare.grid is None and bare.coords_l0 is None and bare.tile_row is None


@pytest.mark.parametrize("kind", EVERY)
def test_beginnings_are_the_answers_to_their_bags(kind: str) -> None:
    made, aggregator = bags(9, 4), model(kind)
    orders = [np.random.default_rng(seed).permutation(13)[:8] for seed in range(2)]
    pool = MeanPool([pool_of(aggregator, made, QUESTION)] * 2)
    found = pool.beginnings(orders, [1, 3, 8])
    for line, order in zip(found, orders, strict=True):
        wanted = asked(aggregator, made, [order[:n] for n in (1, 3, 8)])
        np.testing.assert_allclose(line, wanted, atol=1e-5)
    assert pool.is_closed_form == (kind in CLOSED)


def test_beginnings_without_the_heaviest_tile_are_exact() -> None:
    """A weight of e^-900 beside the heaviest is nothing, and all there is without that tile."""
    scores = torch.tensor([[0.0], [-900.0], [-901.0]], dtype=torch.float64)
    values = torch.tensor([[[9.0, 0.0]], [[1.0, 0.0]], [[2.0, 0.0]]], dtype=torch.float64)
    terms = PoolingTerms(scores=scores, values=values, bias=torch.zeros(2, dtype=torch.float64))
    question = Question(columns=("a", "b"), read=lambda logits: logits)
    found = AttentionPool(terms, question).beginnings([np.array([1, 2, 0])], [1, 2, 3])
    by_hand = (1 + 2 * np.exp(-1)) / (1 + np.exp(-1))
    np.testing.assert_allclose(found[0, :, 0], [1.0, by_hand, 9.0], rtol=1e-12)


def test_terms_in_float32_are_those_of_float64_and_mixing_is_still_seen() -> None:
    made = bags(40)
    for kind in CLOSED:
        precise = pools.attention_terms(model(kind), made)
        quick = pools.attention_terms(model(kind), made, torch.float32)
        assert precise is not None and quick is not None and quick.values.dtype == torch.float32
        np.testing.assert_allclose(quick.values, precise.values, rtol=1e-4, atol=1e-5)
    assert pools.attention_terms(Mixing(model("abmil")), made, torch.float32) is None
