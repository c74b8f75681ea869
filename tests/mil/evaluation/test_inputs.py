"""Bad input is one clear sentence for every metric, and counts mean repetition for every metric."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from bagscope.mil.evaluation import decisions, probabilities, ranking, regression, survival

CASES = 60
CLASSES = 3


def binary_calls(metric):
    return lambda data, w=None: metric(data["outcome"], data["q"] >= 0.5, w)


def binary_scores(metric):
    return lambda data, w=None: metric(data["outcome"], data["q"], w)


def classes(metric):
    return lambda data, w=None: metric(data["y"], data["p"], w)


def guesses(metric):
    return lambda data, w=None: metric(data["y"], decisions.decide(data["p"]), w)


def values(metric):
    return lambda data, w=None: metric(data["value"], data["guess"], w)


def risks(metric):
    return lambda data, w=None: metric(data["time"], data["event"], data["guess"], w)


METRICS = {
    "binary_auroc": binary_scores(ranking.binary_auroc),
    "binary_auprc": binary_scores(ranking.binary_auprc),
    "auroc": classes(ranking.auroc),
    "auprc": classes(ranking.auprc),
    "sensitivity_at_specificity": binary_scores(
        partial(ranking.sensitivity_at_specificity, specificity=0.8)
    ),
    "specificity_at_sensitivity": binary_scores(
        partial(ranking.specificity_at_sensitivity, sensitivity=0.8)
    ),
    "accuracy": guesses(decisions.accuracy),
    "balanced_accuracy": guesses(decisions.balanced_accuracy),
    "macro_f1": guesses(decisions.macro_f1),
    "cohen_kappa": guesses(decisions.cohen_kappa),
    "quadratic_kappa": guesses(decisions.quadratic_kappa),
    "sensitivity": binary_calls(decisions.sensitivity),
    "specificity": binary_calls(decisions.specificity),
    "positive_predictive_value": binary_calls(decisions.positive_predictive_value),
    "negative_predictive_value": binary_calls(decisions.negative_predictive_value),
    "f1": binary_calls(decisions.f1),
    "brier": classes(probabilities.brier),
    "binary_brier": binary_scores(probabilities.binary_brier),
    "log_loss": classes(probabilities.log_loss),
    "ece": classes(probabilities.ece),
    "ece of equal mass": classes(partial(probabilities.ece, binning="mass", bins=4)),
    "binary_ece": binary_scores(probabilities.binary_ece),
    "mae": values(regression.mae),
    "rmse": values(regression.rmse),
    "r2": values(regression.r2),
    "pearson": values(regression.pearson),
    "spearman": values(regression.spearman),
    "concordance": risks(survival.concordance),
    "auc_at": risks(partial(survival.auc_at, at=4.0)),
}


def made(seed: int, cases: int = CASES) -> dict[str, np.ndarray]:
    """Draw data with ties everywhere."""
    random = np.random.default_rng(seed)
    y = random.integers(0, CLASSES, cases)
    p = random.integers(1, 5, (cases, CLASSES)).astype(float)
    p[np.arange(cases), y] += 2
    value = random.integers(0, 6, cases).astype(float)
    return {
        "y": y,
        "p": p / p.sum(axis=1, keepdims=True),
        "outcome": y == 1,
        "q": (p / p.sum(axis=1, keepdims=True))[:, 1],
        "value": value,
        "guess": value + random.integers(-2, 3, cases),
        "time": random.integers(1, 9, cases).astype(float),
        "event": random.integers(0, 2, cases),
    }


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_counts_mean_repetition(name, seed):
    data = made(seed)
    counts = np.random.default_rng(seed + 100).integers(0, 4, (5, CASES))
    batched = METRICS[name](data, counts)
    assert batched.shape == (5,)
    for row, value in zip(counts, batched, strict=True):
        repeated = {key: np.repeat(array, row, axis=0) for key, array in data.items()}
        assert METRICS[name](repeated) == pytest.approx(value, abs=1e-12)
        assert METRICS[name](data, row) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_pieces_do_not_change_a_value(name, monkeypatch):
    data = made(7)
    counts = np.random.default_rng(0).integers(0, 3, (11, CASES))
    whole = METRICS[name](data, counts)
    monkeypatch.setattr("bagscope.mil.evaluation.inputs._ELEMENTS_AT_ONCE", 2 * CASES)
    np.testing.assert_allclose(METRICS[name](data, counts), whole, rtol=1e-13)


@pytest.mark.parametrize("name", METRICS)
def test_no_case_that_counts_is_undefined(name):
    data = made(1)
    with pytest.raises(ValueError, match="undefined"):
        METRICS[name](data, np.zeros(CASES))
    values = METRICS[name](data, np.stack([np.zeros(CASES), np.ones(CASES)]))
    assert np.isnan(values[0])
    assert values[1] == pytest.approx(METRICS[name](data))


NEEDS_TWO_OUTCOMES = [
    "binary_auroc",
    "binary_auprc",
    "auroc",
    "auprc",
    "sensitivity_at_specificity",
    "specificity_at_sensitivity",
    "balanced_accuracy",
]


@pytest.mark.parametrize("name", NEEDS_TWO_OUTCOMES)
@pytest.mark.parametrize("only", [0, 1])
def test_a_single_class_is_refused_alone_and_nan_in_a_resample(name, only):
    data = made(2)
    counts = np.stack([data["y"] == only, np.ones(CASES)]).astype(float)
    values = METRICS[name](data, counts)
    assert np.isnan(values[0])
    assert np.isfinite(values[1])
    with pytest.raises(ValueError, match="undefined"):
        METRICS[name](data, counts[0])


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(CASES - 1), "weights have shape"),
        (np.ones((2, 2, CASES)), "weights have shape"),
        (np.ones((0, CASES)), "weights have shape"),
        (-np.ones(CASES), "negative, infinite or missing"),
        (np.full(CASES, np.nan), "negative, infinite or missing"),
        (np.full(CASES, np.inf), "negative, infinite or missing"),
    ],
)
def test_weights_that_are_no_counts_are_refused(name, weights, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name](made(3), weights)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("damage", ["empty", "shorter", "nan"])
def test_bad_arrays_are_refused(name, damage):
    used = record_of_use(METRICS[name])
    for key in used:
        data = {k: v.astype(float) for k, v in made(4).items()}
        if damage == "empty":
            data = {k: v[:0] for k, v in data.items()}
        elif damage == "shorter":
            data[key] = data[key][:-1]
        else:
            data[key].flat[5] = np.nan
            # Calls are made by the test itself, and NaN is never at or above a threshold.
            if key == "q" and METRICS[name].__qualname__.startswith("binary_calls"):
                continue
        with pytest.raises(ValueError) as caught:
            METRICS[name](data)
        assert "\n" not in str(caught.value)
        assert "; " in str(caught.value)


def record_of_use(metric) -> set[str]:
    class Recorder(dict):
        used: set[str]

        def __getitem__(self, key):
            self.used.add(key)
            return super().__getitem__(key)

    data = Recorder(made(4))
    data.used = set()
    metric(data)
    return data.used


@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        (
            [0, 1],
            [[0.5, 0.5], [1.2, -0.2]],
            "p holds 1.2 for class 0 at position 1; give values from 0 to 1",
        ),
        ([0, 1], [[0.5, 0.5], [0.6, 0.6]], "p has a row that sums to 1.2 at position 1; give 1"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], "y holds 2 at position 1; give class indices, 0 to 1"),
        ([0, 0.5], [[0.5, 0.5], [0.5, 0.5]], "y holds 0.5 at position 1"),
        ([0, -1], [[0.5, 0.5], [0.5, 0.5]], "y holds -1 at position 1"),
        ([0, 1], [0.5, 0.5], "p has shape"),
        ([0, 1], [[1.0], [1.0]], "at least two classes"),
        ([0, 1, 1], [[0.5, 0.5], [0.5, 0.5]], "y has 3 values for 2 cases"),
        (["a", "b"], [[0.5, 0.5], [0.5, 0.5]], "y is no table of numbers"),
        ([0, 1], [[0.5, 0.5], [1.0]], "p is no table of numbers"),
        ([0, 1], [[0.5, np.nan], [0.5, 0.5]], "p holds nan for class 1 at position 0"),
    ],
)
def test_labels_and_probabilities_that_are_none_are_named(y, p, message):
    for metric in (ranking.auroc, ranking.auprc, probabilities.brier, probabilities.ece):
        with pytest.raises(ValueError, match=message):
            metric(y, p)


def test_the_rounding_of_float32_is_no_bad_probability():
    q = np.array([0.2, np.nextafter(np.float32(1), np.float32(2)), -1e-8])
    p = np.stack([1 - q, q], axis=1)
    assert probabilities.brier([0, 1, 0], p) == pytest.approx(0.08 / 3, abs=1e-6)
    assert probabilities.binary_ece([0, 1, 0], q) == pytest.approx(0.2 / 3, abs=1e-6)
