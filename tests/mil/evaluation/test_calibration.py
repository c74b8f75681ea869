from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import optimize, special
from sklearn.linear_model import LogisticRegression

from bagscope.mil.evaluation import calibration, probabilities
from bagscope.mil.evaluation.calibration import Platt, Skipped, Temperature, Threshold


def drawn(seed: int, *, sharper: float, classes: int = 3, cases: int = 3000):
    """Labels drawn from softmax(z), and logits that are z times `sharper`."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(cases, classes)) * 1.5
    chances = special.softmax(z, axis=1)
    y = (random.random(cases)[:, None] > np.cumsum(chances, axis=1)).sum(axis=1)
    return sharper * z, np.minimum(y, classes - 1)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("sharper", [0.4, 1.0, 3.0])
def test_temperature_finds_what_was_done_to_the_logits(classes, sharper):
    logits, y = drawn(classes, sharper=sharper, classes=classes)
    found = calibration.fit_temperature(logits, y)
    assert found.temperature == pytest.approx(sharper, rel=0.08)
    # Another way to the same minimum.
    other = optimize.minimize_scalar(
        lambda t: probabilities.log_loss(y, special.softmax(logits / t, axis=1)),
        bounds=(0.1, 10),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert found.temperature == pytest.approx(other.x, rel=1e-5)
    assert found.loss_after == pytest.approx(other.fun, rel=1e-9)
    before = probabilities.log_loss(y, special.softmax(logits, axis=1))
    assert found.loss_before == pytest.approx(before, rel=1e-9)
    assert found.loss_after <= found.loss_before


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_calibration_repairs_an_overconfident_model(method):
    logits, y = drawn(1, sharper=4.0, classes=2)
    unseen, truth = drawn(2, sharper=4.0, classes=2)
    found = calibration.calibrate(logits, y, np.arange(len(y)), method=method)
    before = probabilities.ece(truth, special.softmax(unseen, axis=1))
    after = probabilities.ece(truth, found.apply(unseen))
    assert before > 0.1
    assert after < 0.03


def test_temperature_changes_no_decision_and_sums_to_one():
    logits, y = drawn(3, sharper=2.0)
    p = calibration.fit_temperature(logits, y).apply(logits)
    np.testing.assert_array_equal(p.argmax(axis=1), logits.argmax(axis=1))
    np.testing.assert_allclose(p.sum(axis=1), 1)


def test_temperature_does_not_mind_a_shift_or_huge_logits():
    logits, y = drawn(3, sharper=1.0, cases=300)
    shifted = calibration.fit_temperature(logits + 1e4, y)
    assert shifted.temperature == pytest.approx(
        calibration.fit_temperature(logits, y).temperature, rel=1e-6
    )
    assert np.isfinite(calibration.fit_temperature(logits * 1e4, y).loss_before)


def test_temperature_ends_at_its_range():
    right = np.array([[3.0, 0.0], [0.0, 3.0]])
    assert calibration.fit_temperature(right, [0, 1]).temperature == pytest.approx(0.05)
    assert calibration.fit_temperature(right, [1, 0]).temperature == pytest.approx(20)


@pytest.mark.parametrize("seed", range(4))
def test_platt_is_a_logistic_regression_of_smoothed_targets(seed):
    random = np.random.default_rng(seed)
    outcome = np.r_[0, 1, random.integers(0, 2, 120)]
    logit = 50 + 7 * (outcome + random.normal(size=len(outcome)))
    found = calibration.fit_platt(logit, outcome)
    positives, negatives = outcome.sum(), (1 - outcome).sum()
    target = np.where(outcome == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    twice = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(
        np.r_[logit, logit][:, None] - 50,
        np.r_[np.ones(len(logit)), np.zeros(len(logit))],
        sample_weight=np.r_[target, 1 - target],
    )
    assert found.slope == pytest.approx(twice.coef_[0, 0], rel=1e-4)
    wanted = twice.predict_proba(logit[:, None] - 50)[:, 1]
    np.testing.assert_allclose(found.apply_binary(logit), wanted, atol=1e-5)
    assert found.loss_after < found.loss_before


def test_platt_stays_finite_where_outcomes_are_apart():
    found = calibration.fit_platt([-2, -1, 1, 2], [0, 0, 1, 1])
    assert 0 < found.slope < 10
    assert 0.5 < found.apply_binary([1.0])[0] < 1


def test_platt_of_two_classes_is_that_of_their_difference():
    logits, y = drawn(5, sharper=2.0, classes=2, cases=200)
    found = calibration.calibrate(logits, y, np.arange(200), method="platt")
    assert isinstance(found, Platt)
    p = found.apply(logits)
    np.testing.assert_allclose(p[:, 1], found.apply_binary(logits[:, 1] - logits[:, 0]))
    np.testing.assert_allclose(p.sum(axis=1), 1)


def test_too_few_patients_of_a_class_skip_the_fit():
    logits, y = drawn(0, sharper=1.0, cases=300)
    assert isinstance(calibration.calibrate(logits, y, np.arange(300)), Temperature)
    # As many slides, of fewer patients.
    skipped = calibration.calibrate(logits, y, np.arange(300) // 20)
    assert isinstance(skipped, Skipped)
    assert "validation patients, and 20 of each class are needed" in skipped.reason
    absent = calibration.calibrate(logits, np.where(y == 2, 0, y), np.arange(300))
    assert absent == Skipped(
        reason="class 2 has 0 validation patients, and 20 of each class are needed"
    )
    named = calibration.calibrate(
        logits, np.where(y == 2, 0, y), np.arange(300), names=("benign", "in situ", "invasive")
    )
    assert isinstance(named, Skipped)
    assert named.reason.startswith("class invasive has 0")


@pytest.mark.parametrize(("patients", "enough"), [(20, True), (19, False)])
def test_twenty_patients_are_enough(patients, enough):
    y = np.r_[np.zeros(40, dtype=int), np.ones(patients, dtype=int)]
    found = calibration.too_few_patients(y, np.arange(len(y)), classes=2)
    assert (found is None) == enough
    chosen = calibration.choose_threshold(y, np.linspace(0, 1, len(y)), np.arange(len(y)))
    assert isinstance(chosen, Threshold if enough else Skipped)


def brute_thresholds(outcome, q):
    distinct = np.unique(q)
    for threshold in [0.0, *(distinct[:-1] + distinct[1:]) / 2, 1.01]:
        called = q >= threshold
        yield threshold, called[outcome == 1].mean(), (~called)[outcome == 0].mean()


@pytest.mark.parametrize("seed", range(6))
def test_thresholds_are_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    outcome = np.r_[0, 1, random.integers(0, 2, 58)]
    q = ((random.random(60) + outcome).round(1) / 2).clip(0, 1)
    every = list(brute_thresholds(outcome, q))
    patients = np.arange(60)
    found = calibration.choose_threshold(outcome, q, patients, fewest=1)
    assert found.sensitivity + found.specificity == pytest.approx(max(s + c for _, s, c in every))
    for rule, at in [("sensitivity", 1), ("specificity", 2)]:
        for target in (0.0, 0.6, 0.9, 1.0):
            found = calibration.choose_threshold(
                outcome, q, patients, rule=rule, target=target, fewest=1
            )
            other = {1: 2, 2: 1}[at]
            best = max(one[other] for one in every if one[at] >= target)
            reached = {1: found.sensitivity, 2: found.specificity}
            assert reached[at] >= target
            assert reached[other] == pytest.approx(best)
            called = q >= found.value
            assert called[outcome == 1].mean() == pytest.approx(found.sensitivity)
            assert (~called)[outcome == 0].mean() == pytest.approx(found.specificity)


def test_a_threshold_lies_between_cases_and_the_lowest_of_equals_is_taken():
    found = calibration.choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.8], range(4), fewest=1)
    assert found.value == pytest.approx(0.4)
    found = calibration.choose_threshold([0, 1, 0, 1], [0.1, 0.3, 0.5, 0.7], range(4), fewest=1)
    assert (found.value, found.sensitivity, found.specificity) == (pytest.approx(0.2), 1, 0.5)


def test_neighbouring_floats_are_told_apart():
    low = 0.5
    high = np.nextafter(low, 1)
    found = calibration.choose_threshold([0, 1], [low, high], range(2), fewest=1)
    assert (found.sensitivity, found.specificity) == (1, 1)
    assert low < found.value <= high


def test_full_specificity_may_call_nobody():
    for top in (0.9, 1.0):
        found = calibration.choose_threshold(
            [1, 0], [0.2, top], range(2), rule="specificity", target=1.0, fewest=1
        )
        assert found.value > top
        assert (found.sensitivity, found.specificity) == (0, 1)


@pytest.mark.parametrize(
    "fitted",
    [
        Temperature(temperature=1.5, loss_before=0.7, loss_after=0.6),
        Platt(slope=0.5, offset=-0.25, loss_before=0.7, loss_after=0.6),
        Threshold(value=0.4, rule="youden", target=None, sensitivity=0.9, specificity=0.8),
        Skipped(reason="too few"),
    ],
)
def test_json_and_back(fitted):
    record = json.loads(json.dumps(fitted.to_json(), allow_nan=False))
    assert calibration.from_json(record) == fitted


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "isotonic"}, "kind is 'isotonic'; expected one of temperature, platt"),
        ({}, "kind is 'None'"),
        ({"kind": "skipped", "why": "x"}, "a skipped cannot have the fields"),
    ],
)
def test_json_of_something_else_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        calibration.from_json(record)


def fit(**changes):
    return calibration.calibrate(
        **{"logits": np.eye(3), "y": [0, 1, 2], "patients": range(3), **changes}
    )


def choose(**changes):
    return calibration.choose_threshold(
        **{"outcome": [0, 1], "probability": [0.1, 0.9], "patients": range(2), **changes}
    )


@pytest.mark.parametrize(
    ("act", "changes", "message"),
    [
        (fit, {"logits": np.zeros(3)}, "logits have shape"),
        (fit, {"logits": np.zeros((3, 1))}, "logits have shape"),
        (fit, {"logits": np.zeros((0, 2))}, "logits have shape"),
        (fit, {"logits": np.full((3, 3), np.nan)}, "logits holds nan at position 0"),
        (fit, {"y": [0, 1, 3]}, "y holds 3 at position 2"),
        (fit, {"y": [0, 1]}, "y has 2 values for 3 cases"),
        (fit, {"patients": range(2)}, "patients have shape"),
        (fit, {"method": "platt"}, "platt takes two classes, and there are 3"),
        (fit, {"method": "isotonic"}, "method is 'isotonic'"),
        (choose, {"rule": "best"}, "rule is 'best'"),
        (choose, {"rule": "sensitivity"}, "the rule is 'sensitivity' and the target None"),
        (choose, {"target": 0.9}, "the rule is 'youden' and the target 0.9"),
        (choose, {"rule": "specificity", "target": 95}, "and the target 95"),
        (choose, {"probability": [0.1, 1.9]}, "probability holds 1.9 at position 1"),
        (choose, {"patients": range(3)}, "patients have shape"),
    ],
)
def test_bad_requests_are_refused(act, changes, message):
    with pytest.raises(ValueError, match=message):
        act(**changes)


@pytest.mark.parametrize(
    ("logit", "outcome", "message"),
    [
        ([1, 2], [1, 1], "needs both outcomes"),
        ([1, 1], [0, 1], "needs logits that differ, and all are 1"),
    ],
)
def test_platt_refuses_what_has_no_answer(logit, outcome, message):
    with pytest.raises(ValueError, match=message):
        calibration.fit_platt(logit, outcome)


def test_platt_of_two_classes_refuses_three():
    platt = Platt(slope=1, offset=0, loss_before=0, loss_after=0)
    with pytest.raises(ValueError, match="takes two classes, and there are 3"):
        platt.apply(np.eye(3))
