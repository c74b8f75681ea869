from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from bagscope.mil.plain_models import constant, cox, predict
from bagscope.mil.targets import TargetSpec

CLASSES = TargetSpec(column="label", classes=("a", "b", "c"))
NUMBER = TargetSpec(column="age", task="regression")
SURVIVAL = TargetSpec(task="survival", time="t", event="e")
LABELS = TargetSpec(column="tags", task="multilabel", classes=("x", "y"))


def drawn(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width))


def patients(rows: int) -> np.ndarray:
    return np.array([f"p{row}" for row in range(rows)])


@pytest.mark.parametrize("width", [4, 60])
def test_logistic_is_that_of_scikit_learn_also_where_vectors_are_wide(width: int) -> None:
    x, y = drawn(40, width), np.arange(40) % 3
    x[:, 0] += y
    test = drawn(9, width, seed=1)
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=0.1, max_iter=5000, tol=1e-8).fit(scaler.transform(x), y)
    found = predict(
        "linear", CLASSES, x, y[:, None].astype(float), patients(40), test, strength=0.1
    )
    assert found == pytest.approx(model.predict_proba(scaler.transform(test)), abs=2e-4)


def test_a_class_that_training_lacks_has_no_chance() -> None:
    x, y = drawn(20, 3), (np.arange(20) % 2) * 2
    found = predict("linear", CLASSES, x, y[:, None].astype(float), patients(20), x, strength=1.0)
    assert (found[:, 1] == 0).all()
    assert found.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("width", [3, 50])
def test_ridge_is_that_of_scikit_learn(width: int) -> None:
    x, test = drawn(30, width), drawn(5, width, seed=1)
    y = x[:, :1] * 2 + 7
    scaler = StandardScaler().fit(x)
    model = Ridge(alpha=10.0).fit(scaler.transform(x), y[:, 0])
    found = predict("linear", NUMBER, x, y, patients(30), test, strength=0.1)
    assert found[:, 0] == pytest.approx(model.predict(scaler.transform(test)), abs=1e-8)


def test_cox_minimises_the_penalised_partial_likelihood() -> None:
    random = np.random.default_rng(3)
    x = drawn(25, 2)
    time = np.ceil(random.exponential(4, 25))  # with ties
    event = random.integers(0, 2, 25).astype(float)

    def cost(w: np.ndarray) -> float:
        theta = x @ w
        terms = [
            theta[i] - np.log(np.exp(theta[time >= time[i]]).sum()) for i in range(25) if event[i]
        ]
        return -sum(terms) + w @ w / 4

    found = cox(x, time, event, 2.0)
    for step in (np.array([1e-2, 0]), np.array([0, 1e-2]), np.array([1e-2, -1e-2])):
        assert cost(found) < cost(found + step)
        assert cost(found) < cost(found - step)
        slope = (cost(found + 1e-3 * step) - cost(found - 1e-3 * step)) / 2e-5
        assert slope == pytest.approx(0, abs=1e-2)


def test_neighbours_average_labels_and_pass_over_missing_ones() -> None:
    x = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    y = np.array([[1, 0], [np.nan, 0], [1, 1], [0, 1], [0, np.nan]])
    found = predict("neighbours", LABELS, x, y, patients(5), np.array([[1.0], [11]]), strength=3)
    assert found == pytest.approx(np.array([[1, 1 / 3], [1 / 3, 1]]))


def test_strength_is_chosen_by_patients_that_were_held_out() -> None:
    """Noise on many dimensions, and each patient twice: rows would choose the weakest penalty."""
    random = np.random.default_rng(5)
    x = np.repeat(random.normal(size=(30, 20)), 2, axis=0)
    y = np.repeat(random.integers(0, 3, 30), 2).astype(float)[:, None]
    test = random.normal(size=(50, 20))
    chosen = predict("linear", CLASSES, x, y, np.repeat(patients(30), 2), test)
    shares = constant(CLASSES, y, 1)[0]
    rows = predict("linear", CLASSES, x, y, patients(60), test)
    # Nothing can be learnt, so the answer stays nearer to the classes' shares.
    assert 2 * np.abs(chosen - shares).mean() < np.abs(rows - shares).mean()


def test_constants() -> None:
    y = np.array([[0.0], [0], [2], [1]])
    assert constant(CLASSES, y, 2).tolist() == [[0.5, 0.25, 0.25]] * 2
    assert constant(NUMBER, np.array([[1.0], [5], [100]]), 1).tolist() == [[5.0]]
    assert constant(SURVIVAL, np.array([[1.0, 1]]), 3).tolist() == [[0.0]] * 3
    assert constant(LABELS, np.array([[1, np.nan], [0, 1.0]]), 1).tolist() == [[0.5, 1.0]]
