from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit
from torch.nn import functional

from bagscope.mil.objectives.ordinal import OrdinalCriterion
from tests.mil.objectives.made import ORDINAL, Rows, fitted, labels, normal, per_bag

ROWS: Rows = {"isup": labels(seed=4)["isup"]}
UNIT = OrdinalCriterion(classes=ORDINAL.classes, weights=(1.0,) * 4)


def test_probabilities_come_from_the_products() -> None:
    logits = normal(9, 3).detach().numpy()
    above = expit(logits).cumprod(1)
    expected = -np.diff(above, axis=1, prepend=1.0, append=0.0)
    np.testing.assert_allclose(UNIT.predict(logits), expected, rtol=1e-12)


@given(hnp.arrays(np.float64, (5, 3), elements=st.floats(-800, 800)))
def test_ranks_agree_whatever_the_logits(logits: np.ndarray) -> None:
    found = UNIT.predict(logits)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    above = 1 - found.cumsum(1)[:, :-1]
    assert (np.diff(above, axis=1) <= 0).all()


def test_the_loss_is_the_truths_negative_log_probability() -> None:
    weights = (1.0, 2.0, 0.5, 3.0)
    objective = fitted([ORDINAL], ROWS, class_weights=weights)
    logits = normal(40, 3, seed=2)
    index = ROWS["isup"][:, 0].astype(int)
    probabilities = objective.predictions(logits.detach().numpy())["isup"]
    expected = -np.array(weights)[index] * np.log(probabilities[np.arange(40), index])
    np.testing.assert_allclose(per_bag(objective, logits, ROWS).numpy(), expected, rtol=1e-12)


def test_the_steps_add_up_to_the_published_loss() -> None:
    # CORN as published: step j is learned from the bags that have come to it, y ≥ j.
    logits, index = normal(40, 3).detach(), torch.from_numpy(ROWS["isup"][:, 0])
    summed = sum(
        functional.binary_cross_entropy_with_logits(
            logits[index >= j, j], (index[index >= j] > j).double(), reduction="sum"
        )
        for j in range(3)
    )
    found = UNIT.loss(logits, index[:, None], torch.ones(40, dtype=torch.bool))
    assert found.sum().item() == pytest.approx(float(summed), rel=1e-12)


def test_gradients_are_right() -> None:
    index = torch.tensor([[0.0], [1.0], [2.0], [3.0]]).double()
    present = torch.ones(4, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda z: UNIT.loss(z, index, present), normal(4, 3))
