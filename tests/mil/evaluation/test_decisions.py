from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from bagscope.mil.evaluation import decisions


def drawn(seed: int, classes: int, cases: int = 60):
    random = np.random.default_rng(seed)
    y = random.integers(0, classes, cases)
    predicted = np.where(random.random(cases) < 0.6, y, random.integers(0, classes, cases))
    return y, predicted, random.integers(0, 4, cases)


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_scikit_learn(classes, seed):
    y, predicted, weights = drawn(seed, classes)
    used = weights > 0
    y, predicted, weights = y[used], predicted[used], weights[used]
    for metric, theirs in [
        (decisions.accuracy, metrics.accuracy_score),
        (decisions.balanced_accuracy, metrics.balanced_accuracy_score),
        (decisions.macro_f1, lambda *a, **k: metrics.f1_score(*a, average="macro", **k)),
        (decisions.cohen_kappa, metrics.cohen_kappa_score),
        (
            decisions.quadratic_kappa,
            lambda *a, **k: metrics.cohen_kappa_score(*a, weights="quadratic", **k),
        ),
    ]:
        assert metric(y, predicted) == pytest.approx(theirs(y, predicted), abs=1e-12)
        assert metric(y, predicted, weights) == pytest.approx(
            theirs(y, predicted, sample_weight=weights), abs=1e-12
        )


@pytest.mark.parametrize("seed", range(4))
def test_shares_are_those_of_scikit_learn(seed):
    outcome, called, weights = drawn(seed, 2)
    for metric, theirs, label in [
        (decisions.sensitivity, metrics.recall_score, 1),
        (decisions.specificity, metrics.recall_score, 0),
        (decisions.positive_predictive_value, metrics.precision_score, 1),
        (decisions.negative_predictive_value, metrics.precision_score, 0),
    ]:
        wanted = theirs(outcome, called, pos_label=label, sample_weight=weights)
        assert metric(outcome, called, weights) == pytest.approx(wanted, abs=1e-12)
    wanted = metrics.f1_score(outcome, called, sample_weight=weights)
    assert decisions.f1(outcome, called, weights) == pytest.approx(wanted, abs=1e-12)


def test_confusion_is_true_by_predicted_and_of_each_resample():
    y, predicted, weights = drawn(1, 4)
    np.testing.assert_array_equal(
        decisions.confusion(y, predicted, classes=5),
        metrics.confusion_matrix(y, predicted, labels=range(5)),
    )
    both = decisions.confusion(y, predicted, np.stack([weights, 2 * weights]))
    wanted = metrics.confusion_matrix(y, predicted, sample_weight=weights)
    np.testing.assert_array_equal(both, [wanted, 2 * wanted])
    with pytest.raises(ValueError, match="y holds 3 at position"):
        decisions.confusion(y, predicted, classes=3)


def test_confusion_refuses_weights_of_other_cases():
    with pytest.raises(ValueError, match="weights have shape"):
        decisions.confusion([0, 1], [0, 1], np.ones(3))


def test_absent_classes_are_left_out_of_means():
    y, predicted = np.array([0, 0, 3, 3]), np.array([0, 3, 3, 3])
    assert decisions.balanced_accuracy(y, predicted) == pytest.approx(0.75)
    wanted = metrics.f1_score(y, predicted, average="macro")
    assert decisions.macro_f1(y, predicted) == pytest.approx(wanted)


def test_quadratic_kappa_counts_distance():
    y = np.array([0, 1, 2, 3] * 5)
    near, far = y.copy(), y.copy()
    near[0], far[0] = 1, 3
    assert decisions.cohen_kappa(y, near) == pytest.approx(decisions.cohen_kappa(y, far), abs=0.01)
    assert decisions.quadratic_kappa(y, near) > decisions.quadratic_kappa(y, far) + 0.05
    assert decisions.quadratic_kappa(y, y) == 1
    assert decisions.quadratic_kappa(y, 3 - y) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("metric", "outcome", "called", "message"),
    [
        (decisions.sensitivity, [0, 0], [0, 1], "sensitivity is undefined: no case is positive"),
        (decisions.specificity, [1, 1], [0, 1], "specificity is undefined: no case is negative"),
        (decisions.positive_predictive_value, [0, 1], [0, 0], "no case is called positive"),
        (decisions.negative_predictive_value, [0, 1], [1, 1], "no case is called negative"),
        (decisions.f1, [0, 0], [0, 0], "no case is positive and none is called positive"),
        (decisions.cohen_kappa, [1, 1], [1, 1], "κ is undefined"),
        (decisions.quadratic_kappa, [1, 1], [1, 1], "κ is undefined"),
        (decisions.balanced_accuracy, [1, 1], [0, 1], "balanced accuracy is undefined"),
    ],
)
def test_shares_of_nothing_are_undefined(metric, outcome, called, message):
    with pytest.raises(ValueError, match=message):
        metric(outcome, called)
    assert np.isnan(metric(outcome, called, np.ones((1, 2)))).all()


def test_decide_takes_the_likeliest_or_the_threshold():
    p = np.array([[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])
    np.testing.assert_array_equal(decisions.decide(p), [0, 0, 1])
    np.testing.assert_array_equal(decisions.decide(p, threshold=0.3), [1, 1, 1])
    np.testing.assert_array_equal(decisions.decide(p, threshold=0.5), [0, 1, 1])
    np.testing.assert_array_equal(decisions.decide(p, threshold=0.5, positive=0), [0, 0, 1])
    with pytest.raises(ValueError, match="a threshold divides two classes, and there are 3"):
        decisions.decide(np.full((2, 3), 1 / 3), threshold=0.5)
    with pytest.raises(ValueError, match="the positive one at 2"):
        decisions.decide(p, threshold=0.5, positive=2)
