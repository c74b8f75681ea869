from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from bagscope.errors import ArtifactError, ConfigError
from bagscope.heatmaps.scores import (
    Column,
    disagreement,
    on_scale,
    percentiles,
    pick_column,
    require_scale,
    scales_for,
)

ONE = Column(name="", index=0)
ALL = Column(name="", index=None)


@pytest.mark.parametrize("tiles", [1, 3, 49, 1000])
@pytest.mark.parametrize("column", [ONE, ALL])
def test_uniform_attention_is_exactly_one(tiles: int, column: Column) -> None:
    scores = np.full((tiles, 2), -np.log(tiles), np.float32)
    ratio = on_scale(scores, "log_weight", "ratio", column)
    assert (ratio == 1.0).all()


def test_a_ratio_is_the_weight_times_the_tiles() -> None:
    scores = np.random.default_rng(0).normal(0, 3, (50, 1))
    expected = special.softmax(scores[:, 0]) * 50
    np.testing.assert_allclose(on_scale(scores, "log_weight", "ratio", ONE), expected, rtol=1e-12)


def test_a_slide_of_several_is_weighed_within_its_patients_bag() -> None:
    bag = special.log_softmax(np.random.default_rng(1).normal(0, 2, (30, 3)), axis=0)
    first = on_scale(bag[:12], "log_weight", "ratio", ALL, bag_scores=bag)
    second = on_scale(bag[12:], "log_weight", "ratio", ALL, bag_scores=bag)
    expected = np.exp(bag).mean(axis=1) * 30
    np.testing.assert_allclose(np.concatenate([first, second]), expected, rtol=1e-12)


def test_percentiles_are_scipys_mean_percentiles() -> None:
    values = np.random.default_rng(2).integers(0, 9, 40).astype(float)
    expected = [stats.percentileofscore(values, value, "mean") for value in values]
    np.testing.assert_allclose(percentiles(values), expected, rtol=1e-12)
    assert percentiles(np.array([7.0])).tolist() == [50.0]


def test_probabilities_of_one_class_of_several_and_of_each_by_itself() -> None:
    logits = np.random.default_rng(3).normal(0, 3, (20, 3))
    column = Column(name="b", index=1)
    for task, expected in (
        ("classes", special.softmax(logits, axis=1)[:, 1]),
        ("multilabel", special.expit(logits[:, 1])),
    ):
        found = on_scale(logits, "instance_logit", "probability", column, task=task)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("scale", "kind", "task", "told"),
    [
        ("ratio", "instance_logit", "classes", "no attention weights"),
        ("probability", "log_weight", "classes", "one of several classes"),
        ("probability", "instance_logit", "regression", "one of several classes"),
        ("probability", "instance_logit", None, "one of several classes"),
        ("contribution", "log_weight", "classes", "no contributions"),
        ("rollout", "log_weight", "classes", "no rollout"),
    ],
)
def test_an_impossible_scale_is_refused(scale: str, kind: str, task: str | None, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        require_scale(scale, kind, task)  # type: ignore[arg-type]
    assert require_scale(None, kind, task) == scales_for(kind, task)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    scores = np.zeros((5, 1))
    scores[3] = bad
    with pytest.raises(ArtifactError, match="1 of 5 tiles"):
        on_scale(scores, "log_weight", "percentile", ONE)
    with pytest.raises(ArtifactError, match="there are no"):
        on_scale(scores[:0], "log_weight", "percentile", ONE)


def test_which_column_is_shown() -> None:
    assert pick_column(("normal", "tumor"), None, "normal").name == "tumor"
    assert pick_column(("a", "b", "c"), None, "b") == Column(name="b", index=1)
    assert pick_column(("a", "b", "c"), "c", "b").index == 2
    assert pick_column(("0",), None) == ONE
    assert pick_column(("0", "1", "2"), None) == ALL
    with pytest.raises(ConfigError, match="did you mean 'tumor'"):
        pick_column(("normal", "tumor"), "tumour")


def test_disagreement_is_the_spread_over_members() -> None:
    each = np.array([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_allclose(disagreement(each), [np.sqrt(2), 0])
    assert np.isnan(disagreement(each[:1])).all()
