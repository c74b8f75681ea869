from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from bagscope.mil.evaluation import curves, probabilities, ranking


def drawn(seed: int, cases: int = 90):
    random = np.random.default_rng(seed)
    outcome = np.r_[0, 1, random.integers(0, 2, cases - 2)]
    return outcome, (random.integers(0, 12, cases) + 6 * outcome) / 17


@pytest.mark.parametrize("seed", range(4))
def test_roc_is_that_of_scikit_learn(seed):
    outcome, score = drawn(seed)
    curve = curves.roc_curve(outcome, score)
    false, true, threshold = metrics.roc_curve(outcome, score, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_positive_rate, false, atol=1e-12)
    np.testing.assert_allclose(curve.true_positive_rate, true, atol=1e-12)
    np.testing.assert_array_equal(curve.threshold, threshold)
    area = np.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
    assert area == pytest.approx(ranking.binary_auroc(outcome, score), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_precision_and_recall_are_those_of_scikit_learn(seed):
    outcome, score = drawn(seed)
    curve = curves.precision_recall_curve(outcome, score)
    precision, recall, threshold = metrics.precision_recall_curve(outcome, score)
    # Theirs ascend in threshold and end with a point that no threshold makes.
    np.testing.assert_allclose(curve.precision, precision[-2::-1], atol=1e-12)
    np.testing.assert_allclose(curve.recall, recall[-2::-1], atol=1e-12)
    np.testing.assert_array_equal(curve.threshold, threshold[::-1])
    steps = np.diff(curve.recall, prepend=0) @ curve.precision
    assert steps == pytest.approx(ranking.binary_auprc(outcome, score), abs=1e-12)
    assert curve.prevalence == outcome.mean()


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("seed", range(3))
def test_reliability_is_what_the_calibration_error_sums(binning, seed):
    outcome, q = drawn(seed)
    curve = curves.reliability(outcome, q, bins=6, binning=binning)
    error = curve.cases @ np.abs(curve.observed - curve.predicted) / curve.cases.sum()
    assert error == pytest.approx(
        probabilities.binary_ece(outcome, q, bins=6, binning=binning), abs=1e-12
    )
    assert (np.diff(curve.predicted) > 0).all()
    assert curve.cases.sum() == len(q)
    for k, cases in enumerate(curve.cases):
        happened = round(curve.observed[k] * cases)
        wilson = stats.binomtest(happened, cases).proportion_ci(method="wilson")
        assert (curve.low[k], curve.high[k]) == pytest.approx(tuple(wilson), abs=1e-12)


def test_bins_without_a_case_are_left_out():
    curve = curves.reliability([0, 1, 1], [0.05, 0.95, 1.0])
    np.testing.assert_array_equal(curve.cases, [1, 2])
    np.testing.assert_allclose(curve.observed, [0, 1])


def test_bins_of_mass_hold_as_many():
    q = np.random.default_rng(0).random(60)
    np.testing.assert_array_equal(
        curves.reliability(q > 0.5, q, bins=5, binning="mass").cases, [12] * 5
    )


@pytest.mark.parametrize("seed", range(3))
def test_net_benefit_is_that_of_its_formula(seed):
    outcome, q = drawn(seed)
    curve = curves.decision_curve(outcome, q)
    assert len(curve.threshold) == 99
    for k, t in enumerate(curve.threshold):
        for share, called in [(curve.model, q >= t), (curve.everyone, np.ones(len(q), bool))]:
            found = (called & (outcome == 1)).mean()
            harmed = (called & (outcome == 0)).mean()
            assert share[k] == pytest.approx(found - harmed * t / (1 - t), abs=1e-12)
    assert not curve.nobody.any()


def test_net_benefit_at_given_thresholds():
    curve = curves.decision_curve([0, 1], [0.25, 0.75], [0.0, 0.25, 0.5, 0.75])
    # A threshold that a case's own probability meets is reached.
    np.testing.assert_allclose(curve.model, [0.5, 0.5 - 0.5 / 3, 0.5, 0.5])
    np.testing.assert_allclose(curve.everyone, [0.5, 0.5 - 0.5 / 3, 0.0, -1.0])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: curves.roc_curve([1, 1], [0.1, 0.2]), "the ROC curve is undefined"),
        (lambda: curves.precision_recall_curve([0, 0], [0.1, 0.2]), "recall curve is undefined"),
        (lambda: curves.roc_curve([0, 1, 1], [0.1, 0.2]), "outcome has 3 values for 2 cases"),
        (lambda: curves.roc_curve([0, 1], [0.1, np.nan]), "score holds nan at position 1"),
        (lambda: curves.reliability([], []), "probability has shape"),
        (lambda: curves.reliability([0, 1], [0.1, 2]), "probability holds 2 at position 1"),
        (lambda: curves.reliability([0, 1], [0, 1], bins=0), "give 1 or more"),
        (lambda: curves.reliability([0, 1], [0, 1], level=0), "level is 0"),
        (lambda: curves.decision_curve([0, 1], [0, 1], [0.5, 1]), "thresholds run from 0.5 to 1"),
        (lambda: curves.decision_curve([0, 1], [0, 1], []), "thresholds has shape"),
    ],
)
def test_bad_input_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
