from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch.nn import functional

from bagscope.errors import CohortError
from bagscope.mil.objectives.multilabel import MultilabelCriterion
from tests.mil.objectives.made import MULTILABEL, Rows, fitted, labels, normal, per_bag, total

ROWS: Rows = {"marker": labels(seed=3)["marker"]}


def test_the_plain_loss_is_the_mean_of_scikit_learns_over_labels() -> None:
    objective = fitted([MULTILABEL], ROWS)
    logits = normal(40, 2)
    found = objective.predictions(logits.detach().numpy())["marker"]
    expected = np.mean([log_loss(ROWS["marker"][:, i], found[:, i]) for i in range(2)])
    assert total(objective, logits, ROWS).item() == pytest.approx(expected, rel=1e-12)


def test_balanced_weights_are_those_of_each_label() -> None:
    rows = {"marker": np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])}
    objective = fitted([MULTILABEL], rows, class_weights="balanced")
    logits = normal(4, 2)
    if_absent = torch.tensor([4 / 6, 4 / 2]).double()
    ratio = torch.tensor([3.0, 1 / 3]).double()  # torch weighs the positives against the negatives
    expected = if_absent * functional.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(rows["marker"]), pos_weight=ratio, reduction="none"
    )
    assert torch.allclose(per_bag(objective, logits, rows), expected.mean(1), rtol=1e-6, atol=0)


def test_smoothing_focus_and_explicit_weights_are_their_formula() -> None:
    smoothing, gamma, weights = 0.2, 1.5, (2.0, 0.5)
    objective = fitted(
        [MULTILABEL], ROWS, label_smoothing=smoothing, focal_gamma=gamma, class_weights=weights
    )
    logits = normal(40, 2, seed=1)
    found = per_bag(objective, logits, ROWS)
    for row, truths, loss in zip(logits.tolist(), ROWS["marker"], found.tolist(), strict=True):
        expected = 0.0
        for z, y, w in zip(row, truths, weights, strict=True):
            p = 1 / (1 + math.exp(-z))
            wanted = y * (1 - smoothing) + smoothing / 2
            entropy = -w * (wanted * math.log(p) + (1 - wanted) * math.log(1 - p))
            expected += (1 - (p if y else 1 - p)) ** gamma * entropy / 2
        assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_are_right_and_finite(gamma: float) -> None:
    criterion = MultilabelCriterion(
        classes=("p", "q"),
        weights_if_absent=(1.0, 2.0),
        weights_if_present=(3.0, 0.5),
        smoothing=0.1,
        gamma=gamma,
    )
    truth = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]).double()
    present = torch.ones(3, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda z: criterion.loss(z, truth, present), normal(3, 2))
    certain = torch.tensor([[90.0, -90.0], [90.0, 90.0], [-90.0, 0.0]], requires_grad=True)
    criterion.loss(certain, truth, present).sum().backward()
    assert certain.grad is not None and certain.grad.isfinite().all()


def test_labels_that_teach_nothing_are_refused() -> None:
    with pytest.raises(CohortError, match="all 3 training cases have the same labels"):
        fitted([MULTILABEL], {"marker": np.tile([1.0, 0.0], (3, 1))})
    one_sided = {"marker": np.array([[1.0, 0.0], [0.0, 0.0]])}
    with pytest.raises(CohortError, match="label 'q' is on 0 of 2 training cases"):
        fitted([MULTILABEL], one_sided, class_weights="balanced")
