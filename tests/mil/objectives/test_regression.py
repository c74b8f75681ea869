from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error

from bagscope.errors import CohortError
from tests.mil.objectives.made import REGRESSION, Rows, fitted, labels, normal, per_bag, total

ROWS: Rows = {"age": labels(seed=5)["age"]}
STD = ROWS["age"].std()


def test_predictions_are_in_the_labels_units_and_losses_in_standard_deviations() -> None:
    logits = normal(40, 1)
    for form, expected in (
        ("mse", lambda y, p: mean_squared_error(y, p) / STD**2),
        ("mae", lambda y, p: mean_absolute_error(y, p) / STD),
    ):
        objective = fitted([REGRESSION], ROWS, regression=form)
        found = objective.predictions(logits.detach().numpy())["age"]
        assert found.shape == (40,)
        truth = expected(ROWS["age"][:, 0], found)
        assert total(objective, logits, ROWS).item() == pytest.approx(truth, rel=1e-12)


def test_huber_is_its_formula() -> None:
    objective = fitted([REGRESSION], ROWS, regression="huber")
    logits = normal(40, 1, scale=3)
    predicted = objective.predictions(logits.detach().numpy())["age"]
    error = np.abs(predicted - ROWS["age"][:, 0]) / STD
    assert (error > 1).any() and (error < 1).any()
    expected = np.where(error <= 1, error**2 / 2, error - 0.5)
    np.testing.assert_allclose(per_bag(objective, logits, ROWS).numpy(), expected, rtol=1e-9)


def test_zero_logits_predict_the_training_mean() -> None:
    rows = {"age": np.array([[10.0], [20.0], [np.nan], [60.0]])}
    found = fitted([REGRESSION], rows).predictions(np.zeros((2, 1)))["age"]
    np.testing.assert_allclose(found, 30.0)


@pytest.mark.parametrize("form", ["mse", "huber", "mae"])
def test_a_missing_label_far_from_zero_harms_nothing(form: str) -> None:
    # A missing label is stored as a zero, here as many deviations off as float64 can tell apart.
    objective = fitted(
        [REGRESSION], {"age": np.array([[1e30], [np.nextafter(1e30, 2e30)]])}, regression=form
    )
    logits = torch.zeros(2, 1, requires_grad=True)
    loss = total(objective, logits, {"age": np.array([[1e30], [np.nan]])})
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


def test_a_constant_is_refused() -> None:
    with pytest.raises(CohortError, match="all 3 training cases have the value 7"):
        fitted([REGRESSION], {"age": np.full((3, 1), 7.0)})
