"""One of k classes: cross-entropy, weighted, smoothed, focal.

ℓ = (1 - p_y)^γ · [(1 - ε) w_y (-log p_y) + ε/k Σ_c w_c (-log p_c)],  p = softmax of the logits

Without γ this is torch's `cross_entropy` before its mean. Bags are averaged by their number and not
by their weights: a batch of one bag would otherwise lose its weight, and packing would matter.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn import functional

from bagscope.mil.objectives.criterion import (
    Array,
    Criterion,
    as_tensor,
    class_weights,
    single_classes,
)
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec


class ClassesCriterion(Criterion):
    """Cross-entropy; two classes have two logits as well."""

    kind: Literal["classes"] = "classes"
    classes: tuple[str, ...]
    weights: tuple[float, ...]
    smoothing: float
    gamma: float

    @staticmethod
    def outputs_of(target: TargetSpec, spec: ObjectiveSpec) -> int:
        """Return k."""
        return len(target.classes)

    @classmethod
    def fit(cls, target: TargetSpec, spec: ObjectiveSpec, rows: Array) -> Self:
        """Learn the classes' weights from rows (n, 1)."""
        return cls(
            classes=target.classes,
            weights=class_weights(target, spec, single_classes(target, rows)),
            smoothing=spec.label_smoothing,
            gamma=spec.focal_gamma,
        )

    def plain(self) -> Self:
        """Return it without smoothing and focus; the weights stay."""
        return self.model_copy(update={"smoothing": 0.0, "gamma": 0.0})

    def loss(self, logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """Return the loss (B,) of logits (B, k)."""
        index = labels[:, 0].long()
        return focal_cross_entropy(
            logits, index, as_tensor(self.weights, logits), self.smoothing, self.gamma
        )

    def predict(self, logits: Array) -> Array:
        """Return probabilities (n, k)."""
        return softmax(logits, axis=1)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the classes."""
        return self.classes


def focal_cross_entropy(
    logits: Tensor, index: Tensor, weights: Tensor, smoothing: float = 0.0, gamma: float = 0.0
) -> Tensor:
    """Return the loss (B,) of logits (B, k) for classes `index` (B,) with weights (k,)."""
    entropy = functional.cross_entropy(
        logits, index, weight=weights, label_smoothing=smoothing, reduction="none"
    )
    if gamma == 0:
        return entropy
    # Through logarithms: 1 - p rounds to 0, where its power has an infinite slope for γ below 1.
    truth = functional.one_hot(index, logits.shape[1]).bool()
    others = logits.masked_fill(truth, -torch.inf).logsumexp(1)
    return (gamma * (others - logits.logsumexp(1))).exp() * entropy
