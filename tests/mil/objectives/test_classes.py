from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from bagscope.errors import CohortError, ConfigError
from bagscope.mil.objectives.classes import ClassesCriterion, focal_cross_entropy
from tests.mil.objectives.made import CLASSES, Rows, fitted, labels, normal, per_bag, tensors, total

ROWS: Rows = {"subtype": labels()["subtype"]}
INDEX = ROWS["subtype"][:, 0].astype(int)


def test_the_plain_loss_is_scikit_learns() -> None:
    objective = fitted([CLASSES], ROWS)
    logits = normal(40, 3)
    probabilities = objective.predictions(logits.detach().numpy())["subtype"]
    expected = log_loss(INDEX, probabilities, labels=[0, 1, 2])
    assert total(objective, logits, ROWS).item() == pytest.approx(expected, rel=1e-12)
    assert objective.validation_loss(logits, tensors(ROWS)) == pytest.approx(expected, rel=1e-12)


def test_weights_and_smoothing_are_torchs_before_its_mean() -> None:
    objective = fitted([CLASSES], ROWS, class_weights=(1.0, 2.0, 0.5), label_smoothing=0.2)
    logits = normal(40, 3, seed=1)
    expected = functional.cross_entropy(
        logits,
        torch.from_numpy(INDEX),
        weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
        label_smoothing=0.2,
        reduction="none",
    )
    assert torch.equal(per_bag(objective, logits, ROWS), expected)
    assert total(objective, logits, ROWS).item() == pytest.approx(expected.mean().item())


def test_focal_is_its_formula() -> None:
    weights, smoothing, gamma = (1.0, 2.0, 0.5), 0.1, 1.5
    objective = fitted(
        [CLASSES], ROWS, class_weights=weights, label_smoothing=smoothing, focal_gamma=gamma
    )
    logits = normal(40, 3, seed=2)
    found = per_bag(objective, logits, ROWS)
    for row, y, loss in zip(logits.tolist(), INDEX, found.tolist(), strict=True):
        norm = sum(math.exp(z) for z in row)
        p = [math.exp(z) / norm for z in row]
        smooth = sum(-w * math.log(q) for w, q in zip(weights, p, strict=True)) / 3
        entropy = (1 - smoothing) * -weights[y] * math.log(p[y]) + smoothing * smooth
        assert loss == pytest.approx((1 - p[y]) ** gamma * entropy, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_are_right(gamma: float) -> None:
    index, weights = torch.tensor([0, 2, 1, 1]), torch.tensor([1.0, 2.0, 0.5]).double()
    assert torch.autograd.gradcheck(
        lambda logits: focal_cross_entropy(logits, index, weights, 0.1, gamma), normal(4, 3)
    )


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_certain_logits_have_finite_gradients(size: float) -> None:
    # 1 - p is zero in float32, where its square root has an infinite slope.
    logits = torch.tensor([[size, 0.0], [0.0, size]], requires_grad=True)
    loss = focal_cross_entropy(logits, torch.tensor([0, 0]), torch.ones(2), 0.0, 0.5)
    loss.sum().backward()
    assert loss[1].item() == pytest.approx(size)
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_balanced_weights_are_scikit_learns_of_the_labelled_training_cases() -> None:
    rows = {"subtype": np.array([[0.0], [0.0], [1.0], [np.nan], [2.0], [0.0]])}
    (criterion,) = fitted([CLASSES], rows, class_weights="balanced").criteria
    known = np.array([0, 0, 1, 2, 0])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 2]), y=known)
    assert isinstance(criterion, ClassesCriterion)
    assert criterion.weights == pytest.approx(expected)


def test_validation_keeps_the_weights_and_drops_smoothing_and_focus() -> None:
    options = {"class_weights": (1.0, 3.0, 1.0)}
    helped = fitted([CLASSES], ROWS, label_smoothing=0.3, focal_gamma=2.0, **options)
    bare = fitted([CLASSES], ROWS, **options)
    unweighted = fitted([CLASSES], ROWS)
    logits, targets = normal(40, 3), tensors(ROWS)
    assert helped.validation_loss(logits, targets) == bare.validation_loss(logits, targets)
    assert bare.validation_loss(logits, targets) != unweighted.validation_loss(logits, targets)


def test_labels_that_teach_nothing_are_refused() -> None:
    with pytest.raises(CohortError, match="all 5 training cases are of class 'b'"):
        fitted([CLASSES], {"subtype": np.ones((5, 1))})
    with pytest.raises(CohortError, match="none of the 5 training cases has a label"):
        fitted([CLASSES], {"subtype": np.full((5, 1), np.nan)})
    two = {"subtype": np.array([[0.0], [1.0]])}
    with pytest.raises(CohortError, match="no training case is of class 'c'"):
        fitted([CLASSES], two, class_weights="balanced")
    with pytest.raises(ConfigError, match="has 2 numbers and subtype has 3 classes"):
        fitted([CLASSES], two, class_weights=(1.0, 2.0))
