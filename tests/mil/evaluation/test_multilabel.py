from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from sklearn import metrics

from bagscope.mil.evaluation import decisions, probabilities, ranking
from bagscope.mil.evaluation.multilabel import macro, per_label


def drawn(seed: int, labels: int = 4, cases: int = 50):
    random = np.random.default_rng(seed)
    outcomes = random.integers(0, 2, (cases, labels)).astype(float)
    return outcomes, (random.random((cases, labels)) + outcomes).round(1) / 2


def test_each_label_is_a_binary_metric_and_macro_their_mean():
    outcomes, p = drawn(0)
    found = per_label(ranking.binary_auroc, outcomes, p)
    wanted = metrics.roc_auc_score(outcomes, p, average=None)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert macro(ranking.binary_auroc, outcomes, p) == pytest.approx(wanted.mean(), abs=1e-12)
    wanted = metrics.f1_score(outcomes, p >= 0.5, average="macro")
    assert macro(decisions.f1, outcomes, p >= 0.5) == pytest.approx(wanted, abs=1e-12)


def test_a_missing_label_leaves_the_case_out_for_that_label_only():
    outcomes, p = drawn(1)
    outcomes[:10, 2] = np.nan
    whole, _ = drawn(1)
    found = per_label(ranking.binary_auprc, outcomes, p)
    assert found[2] == ranking.binary_auprc(whole[10:, 2], p[10:, 2])
    assert found[1] == ranking.binary_auprc(whole[:, 1], p[:, 1])


def test_a_label_nobody_has_is_nan_and_out_of_the_mean():
    outcomes, p = drawn(2)
    outcomes[:, 0] = 0
    outcomes[:, 3] = np.nan
    found = per_label(ranking.binary_auroc, outcomes, p)
    np.testing.assert_array_equal(np.isnan(found), [True, False, False, True])
    wanted = pytest.approx(found[1:3].mean(), abs=1e-12)
    assert macro(ranking.binary_auroc, outcomes, p) == wanted
    with pytest.raises(ValueError, match="mean over labels is undefined"):
        macro(ranking.binary_auroc, np.zeros_like(p), p)


def test_resamples_give_a_row_each():
    outcomes, p = drawn(3)
    outcomes[5, 0] = np.nan
    counts = np.random.default_rng(0).integers(0, 3, (6, len(p)))
    metric = partial(probabilities.binary_ece, bins=5)
    values = per_label(metric, outcomes, p, counts)
    assert values.shape == (6, 4)
    means = macro(metric, outcomes, p, counts)
    for row, value, mean in zip(counts, values, means, strict=True):
        repeated = np.repeat(outcomes, row, axis=0), np.repeat(p, row, axis=0)
        np.testing.assert_allclose(value, per_label(metric, *repeated), atol=1e-12)
        assert mean == pytest.approx(macro(metric, *repeated), abs=1e-12)


@pytest.mark.parametrize(
    ("outcomes", "scores", "weights", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), None, "give \\(cases, labels\\) for both"),
        (np.zeros(3), np.zeros(3), None, "give \\(cases, labels\\) for both"),
        (np.zeros((0, 2)), np.zeros((0, 2)), None, "give \\(cases, labels\\) for both"),
        (np.zeros((3, 2)), np.zeros((3, 2)), np.ones(2), "weights have shape"),
        (np.full((3, 2), 0.5), np.zeros((3, 2)), None, "outcome holds 0.5"),
    ],
)
def test_bad_tables_are_refused(outcomes, scores, weights, message):
    for metric in (per_label, macro):
        with pytest.raises(ValueError, match=message):
            metric(ranking.binary_auroc, outcomes, scores, weights)
