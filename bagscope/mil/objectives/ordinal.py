"""Classes in an order, as grades: a logit for each step from one class to the next (CORN).

P(y > j | y ≥ j) = σ(z_j),  so P(y > j) = Π_{i ≤ j} σ(z_i),  for j = 0 … k - 2

The products fall with j whatever the logits are: the ranks agree with each other by construction.
That is why it is CORN (Shi et al. 2023) and not CORAL, which needs all steps to share the weights
of their last layer and would thus ask every aggregator for a classifier of its own kind.

ℓ = w_y · -log P(y) = w_y · [Σ_{j < y} -log σ(z_j)  +  -log σ(-z_y) where y is not the last class]

That is CORN's loss with each bag's steps added up, so a bag weighs the same as in cross-entropy;
the paper divides by the number of steps of the whole batch instead.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import torch
from scipy.special import log_expit
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


class OrdinalCriterion(Criterion):
    """Conditional probabilities of going on to the next class."""

    kind: Literal["ordinal"] = "ordinal"
    classes: tuple[str, ...]
    weights: tuple[float, ...]

    @staticmethod
    def outputs_of(target: TargetSpec, spec: ObjectiveSpec) -> int:
        """Return k - 1."""
        return len(target.classes) - 1

    @classmethod
    def fit(cls, target: TargetSpec, spec: ObjectiveSpec, rows: Array) -> Self:
        """Learn the classes' weights from rows (n, 1)."""
        weights = class_weights(target, spec, single_classes(target, rows))
        return cls(classes=target.classes, weights=weights)

    def loss(self, logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """Return the loss (B,) of logits (B, k - 1)."""
        index = labels[:, :1].long()
        step = torch.arange(logits.shape[1], device=logits.device)
        passed = torch.where(step < index, functional.logsigmoid(logits), 0.0)
        stopped = torch.where(step == index, functional.logsigmoid(-logits), 0.0)
        return -as_tensor(self.weights, logits)[index[:, 0]] * (passed + stopped).sum(1)

    def predict(self, logits: Array) -> Array:
        """Return probabilities (n, k) of the classes themselves."""
        nothing = np.zeros((len(logits), 1))
        reached = np.concatenate([nothing, log_expit(logits).cumsum(1)], axis=1)
        stops = np.concatenate([log_expit(-logits), nothing], axis=1)
        found: Array = np.exp(reached + stops)
        return found

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the classes."""
        return self.classes
