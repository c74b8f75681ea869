from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from bagscope.mil.evaluation import ranking


def drawn(seed: int, *, cases: int = 80, values: int = 12):
    """Outcomes and scores with ties."""
    random = np.random.default_rng(seed)
    outcome = random.integers(0, 2, cases)
    return outcome, random.integers(0, values, cases) + 2.0 * outcome


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("values", [1, 2, 12, 10**9])
def test_binary_metrics_are_those_of_scikit_learn(seed, values):
    outcome, score = drawn(seed, values=values)
    weights = np.random.default_rng(seed).integers(0, 4, len(outcome))
    for metric, theirs in [
        (ranking.binary_auroc, metrics.roc_auc_score),
        (ranking.binary_auprc, metrics.average_precision_score),
    ]:
        assert metric(outcome, score) == pytest.approx(theirs(outcome, score), abs=1e-12)
        assert metric(outcome, score, weights) == pytest.approx(
            theirs(outcome, score, sample_weight=weights), abs=1e-12
        )


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_order(seed):
    outcome, score = drawn(seed, cases=30)
    ahead = score[outcome == 1][:, None] - score[outcome == 0]
    assert ranking.binary_auroc(outcome, score) == pytest.approx(
        np.mean((ahead > 0) + 0.5 * (ahead == 0)), abs=1e-14
    )


@pytest.mark.parametrize("classes", [3, 5])
def test_several_classes_are_the_mean_of_one_against_the_rest(classes):
    random = np.random.default_rng(classes)
    y = np.r_[np.arange(classes), random.integers(0, classes, 90)]
    p = random.integers(0, 4, (len(y), classes)) + 0.5
    p /= p.sum(axis=1, keepdims=True)
    theirs = metrics.roc_auc_score(np.eye(classes)[y], p, average="macro")
    assert ranking.auroc(y, p) == pytest.approx(theirs, abs=1e-12)
    theirs = metrics.average_precision_score(np.eye(classes)[y], p, average="macro")
    assert ranking.auprc(y, p) == pytest.approx(theirs, abs=1e-12)


def test_a_class_without_a_case_is_left_out_of_the_mean():
    random = np.random.default_rng(0)
    y = random.choice([0, 2], 50)
    p = random.dirichlet(np.ones(3), 50)
    wanted = np.mean([metrics.roc_auc_score(y == k, p[:, k]) for k in (0, 2)])
    assert ranking.auroc(y, p) == pytest.approx(wanted, abs=1e-12)
    wanted = np.mean([metrics.average_precision_score(y == k, p[:, k]) for k in (0, 2)])
    assert ranking.auprc(y, p) == pytest.approx(wanted, abs=1e-12)


def test_two_classes_take_the_positive_one():
    outcome, score = drawn(3)
    q = score / 20
    p = np.stack([1 - q, q], axis=1)
    assert ranking.auroc(outcome, p) == ranking.binary_auroc(outcome, q)
    assert ranking.auprc(outcome, p) == ranking.binary_auprc(outcome, q)
    assert ranking.auprc(outcome, p, positive=0) == pytest.approx(
        metrics.average_precision_score(1 - outcome, -score), abs=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("values", [12, 10**9])
def test_the_best_share_is_that_of_all_thresholds(seed, share, values):
    outcome, score = drawn(seed, cases=250, values=values)
    best_found = best_spared = 0.0
    for threshold in [*np.unique(score), np.inf]:
        called = score >= threshold
        found, spared = called[outcome == 1].mean(), (~called)[outcome == 0].mean()
        if spared >= share:
            best_found = max(best_found, found)
        if found >= share:
            best_spared = max(best_spared, spared)
    assert ranking.sensitivity_at_specificity(outcome, score, specificity=share) == pytest.approx(
        best_found, abs=1e-12
    )
    assert ranking.specificity_at_sensitivity(outcome, score, sensitivity=share) == pytest.approx(
        best_spared, abs=1e-12
    )


def test_a_specificity_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"specificity is 1\.5; give a share"):
        ranking.sensitivity_at_specificity([0, 1], [0.1, 0.2], specificity=1.5)
    with pytest.raises(ValueError, match=r"sensitivity is 95; give a share"):
        ranking.specificity_at_sensitivity([0, 1], [0.1, 0.2], sensitivity=95)


@st.composite
def cases(draw):
    length = draw(st.integers(2, 25))
    outcome = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    score = draw(st.lists(st.integers(-6, 6), min_size=length, max_size=length))
    outcome[0], outcome[1] = 0, 1
    return np.array(outcome), np.array(score, dtype=float)


@given(cases())
@settings(max_examples=60)
def test_auroc_knows_the_order_alone_and_turns_with_it(data):
    outcome, score = data
    area = ranking.binary_auroc(outcome, score)
    assert ranking.binary_auroc(outcome, np.exp(score / 3) - 5) == pytest.approx(area, abs=1e-12)
    assert ranking.binary_auroc(outcome, -score) == pytest.approx(1 - area, abs=1e-12)
    assert ranking.binary_auroc(1 - outcome, score) == pytest.approx(1 - area, abs=1e-12)
    assert ranking.binary_auprc(outcome, 3 * score + 1) == ranking.binary_auprc(outcome, score)
    assert 0 < ranking.binary_auprc(outcome, score) <= 1


@given(cases(), st.integers(0, 2**16))
@settings(max_examples=60)
def test_counts_are_repetition(data, seed):
    outcome, score = data
    counts = np.random.default_rng(seed).integers(0, 4, len(outcome))
    counts[:2] += 1
    for metric in (ranking.binary_auroc, ranking.binary_auprc):
        repeated = metric(np.repeat(outcome, counts), np.repeat(score, counts))
        assert metric(outcome, score, counts) == pytest.approx(repeated, abs=1e-12)
