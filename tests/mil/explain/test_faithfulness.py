"""Heatmaps of what decides score high, shuffled ones are warned of, curves are what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from bagscope.mil.bags import Bags, PoolingTerms
from bagscope.mil.explain.faithfulness import (
    CHANCE,
    CLOSED_ORDERS,
    THRESHOLD,
    Curves,
    Faithfulness,
    agreement,
    deletion,
    faithfulness,
    insertion,
    order_of,
)
from bagscope.mil.explain.pools import AttentionPool, Pool, pool_of
from bagscope.mil.explain.question import Question, class_question
from bagscope.testing.planted import planted_bags
from tests.mil.explain.made_models import QUESTION, asked, bags, model, oracle

PLANTED = planted_bags(8, seed=1, tiles=(100, 140), share=0.04)
MODEL = oracle(PLANTED)


def planted(place: int) -> tuple[Pool, np.ndarray, np.ndarray]:
    made = Bags.of([torch.from_numpy(PLANTED.bags[place])])
    attention = MODEL(made).scores[:, 0].detach().numpy()
    pool = pool_of(MODEL, made, class_question(("normal", "tumour")))
    return pool, np.arange(len(attention)), attention


@pytest.mark.parametrize("place", [1, 5])
def test_attention_that_drives_scores_high_and_shuffled_is_warned_of(place: int) -> None:
    pool, rows, attention = planted(place)
    found = faithfulness(pool, rows, attention)
    assert found.score > 0.35 and found.chance == 1 / (1 + CLOSED_ORDERS)
    assert found.low <= found.score <= found.high
    assert found.warning == ""
    shuffled = np.random.default_rng(place).permutation(attention)
    other = faithfulness(pool, rows, shuffled)
    assert other.score < found.score - 0.2
    assert "Attention does not drive this prediction" in other.warning
    turned = faithfulness(pool, rows, -attention)
    assert turned.score < -THRESHOLD
    assert "speak against" in turned.warning


def test_one_tile_that_decides_is_believed_though_the_rest_is_in_no_order() -> None:
    # Of 140 tiles one is tumour; without it, the coldest alone look a little like it.
    scores, values = np.r_[6.0, np.linspace(0.5, -0.5, 139)], np.r_[9.0, np.linspace(-5, 0.5, 139)]
    terms = PoolingTerms(
        scores=torch.from_numpy(scores)[:, None],
        values=torch.from_numpy(np.c_[-values, values])[:, None],
        bias=torch.zeros(2, dtype=torch.float64),
    )
    pool = AttentionPool(terms, class_question(("normal", "tumour")))
    found = faithfulness(pool, np.arange(140), scores)
    assert found.warning == "" and found.chance <= 0.03
    assert found.deletion is not None and found.deletion.answers[0, 1] < 0.1


def test_shuffled_scores_escape_the_warning_once_in_twenty_times() -> None:
    pool, rows, _ = planted(1)
    generator = np.random.default_rng(0)
    trusted = [
        not faithfulness(pool, rows, generator.normal(size=len(rows)), seed=seed).warning
        for seed in range(40)
    ]
    # At the rate of CHANCE, more than 6 of 40 would come less than once in a hundred times.
    assert stats.binom.sf(6, 40, CHANCE) < 0.01
    assert sum(trusted) <= 6


def test_where_nothing_moves_it_is_said() -> None:
    pool, rows, attention = planted(2)
    found = faithfulness(pool, rows, attention)
    assert found.movable < 0.05
    assert "it stays, whether" in found.warning


def test_a_warning_never_contradicts_the_score_beside_it() -> None:
    pool, rows, attention = planted(1)
    found = faithfulness(pool, rows, attention)
    chancy = replace(found, score=0.38, chance=0.08)
    assert "not surely drive this prediction" in chancy.warning
    assert "one random order in 12 does as well" in chancy.warning
    faint = replace(found, score=THRESHOLD - 0.01, chance=0.01, high=0.2)
    assert "little more than taking out random ones" in faint.warning


@pytest.mark.parametrize("kind", ["clam_mb", "max"])
def test_curves_are_the_answers_to_their_bags(kind: str) -> None:
    made = bags(30)
    aggregator = model(kind)
    pool = pool_of(aggregator, made, QUESTION)
    order = np.random.default_rng(1).permutation(30)
    down, up = deletion(pool, [order, order[::-1]], 2), insertion(pool, [order], 2)
    counts = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    np.testing.assert_allclose(down.shares, np.array(counts) / 30)
    np.testing.assert_allclose(up.shares, np.array([*counts[1:], 30]) / 30)
    for line, one in zip(down.answers, (order, order[::-1]), strict=True):
        wanted = asked(aggregator, made, [one[n:] for n in counts])[:, 2]
        np.testing.assert_allclose(line, wanted, atol=1e-6)
    wanted = asked(aggregator, made, [order[:n] for n in (*counts[1:], 30)])[:, 2]
    np.testing.assert_allclose(up.answers[0], wanted, atol=1e-6)
    assert up.answers[0, -1] == pytest.approx(down.answers[0, 0], abs=1e-6)


def test_the_mean_of_a_curve() -> None:
    curves = Curves(
        shares=np.array([0.0, 0.1, 0.2, 0.6, 1.0]),
        answers=np.array([[9.0, 1.0, 0.5, 0.0, 9.0], [9, 2, 2, 2, 9]]),
    )
    # The whole bag says nothing of an order.
    np.testing.assert_allclose(curves.means, [0.5, 2.0])


def test_the_score_is_that_of_its_definition() -> None:
    pool, rows, attention = planted(1)
    found = faithfulness(pool, rows, attention, orders=3, seed=7)
    generator = np.random.default_rng(7)
    random = [generator.permutation(rows) for _ in range(3)]
    order = rows[order_of(attention)]
    wanted = 0.5 * (
        deletion(pool, random, 1).means.mean()
        - deletion(pool, [order], 1).means[0]
        + insertion(pool, [order], 1).means[0]
        - insertion(pool, random, 1).means.mean()
    )
    assert found.score == pytest.approx(wanted)
    half = faithfulness(pool, rows, attention, orders=3, seed=7, unit=2.0)
    assert half.score == pytest.approx(wanted / 2)
    few = faithfulness(pool, rows, attention, orders=3, shares=(0.1, 0.5))
    assert few.deletion is not None and few.insertion is not None
    assert few.deletion.answers.shape == few.insertion.answers.shape == (1, 3)


def test_what_is_explained_is_what_was_decided() -> None:
    pool, rows, attention = planted(1)
    same = faithfulness(pool, rows, attention, column=1)
    assert faithfulness(pool, rows, attention).score == same.score
    assert faithfulness(pool, rows, attention, column=0).score == pytest.approx(-same.score)
    # Nothing is decided of a risk: the highest answer is explained.
    risk = Question(columns=("risk",), read=lambda logits: logits[:, 1:])
    made = Bags.of([torch.from_numpy(PLANTED.bags[1])])
    assert faithfulness(pool_of(MODEL, made, risk), rows, attention).score > 0.1


@pytest.mark.parametrize("tiles", [2, 3])
def test_few_tiles(tiles: int) -> None:
    pool = pool_of(model("abmil"), bags(tiles), QUESTION)
    found = faithfulness(pool, np.arange(tiles), np.arange(tiles))
    assert math.isfinite(found.score) and found.deletion is not None
    assert found.deletion.shares[0] == 0 and found.deletion.shares[-1] < 1


def test_a_single_tile_has_nothing_to_compare() -> None:
    found: Faithfulness = faithfulness(
        pool_of(model("abmil"), bags(1), QUESTION), np.array([0]), [0.5]
    )
    assert math.isnan(found.score) and found.deletion is None
    assert found.warning.startswith("A single tile")


@pytest.mark.parametrize("scores", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [[0.0, 1.0, 2.0]]])
def test_scores_must_be_finite(scores: list[object]) -> None:
    pool = pool_of(model("abmil"), bags(3), QUESTION)
    with pytest.raises(ValueError, match="one finite score per tile"):
        faithfulness(pool, np.arange(3), scores)  # type: ignore[arg-type]


def test_scores_must_be_of_these_tiles() -> None:
    with pytest.raises(ValueError, match="4 scores for 3 tiles"):
        faithfulness(pool_of(model("abmil"), bags(3), QUESTION), np.arange(3), [1.0, 2.0, 3.0, 4.0])


def test_orders_that_do_as_well_count_as_such() -> None:
    made = Bags.of([bags(1).features.expand(6, -1)])
    found = faithfulness(pool_of(model("abmil"), made, QUESTION), np.arange(6), np.arange(6))
    assert found.chance == 1 and found.score == pytest.approx(0)


def test_order_is_stable() -> None:
    assert order_of([1.0, 3.0, 1.0, 3.0]).tolist() == [1, 3, 0, 2]


def test_agreement() -> None:
    generator = np.random.default_rng(0)
    truth = generator.normal(size=200)
    folds = [truth + generator.normal(size=200) * 0.5 for _ in range(3)]
    found = agreement(folds, top_share=0.1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    correlations = [float(stats.spearmanr(folds[a], folds[b]).statistic) for a, b in pairs]
    assert found.rank_correlation == pytest.approx(np.mean(correlations))
    assert found.lowest_correlation == pytest.approx(min(correlations))
    tops = [set(np.argsort(-fold)[:20].tolist()) for fold in folds]
    assert found.top_overlap == pytest.approx(
        np.mean([len(tops[a] & tops[b]) / 20 for a, b in pairs])
    )
    assert found.top_tiles == 20 and found.chance_overlap == 0.1
    same = agreement([truth, truth])
    assert same.rank_correlation == pytest.approx(1) and same.top_overlap == 1
    assert math.isnan(agreement([truth, np.zeros(200)]).rank_correlation)
    with pytest.raises(ValueError, match="two models or more"):
        agreement([truth])
    with pytest.raises(ValueError, match="of the same tiles"):
        agreement([truth, truth[1:]])
