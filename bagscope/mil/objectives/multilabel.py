"""Any of L labels: binary cross-entropy of each, and their mean.

ℓ = 1/L Σ_l (1 - p_l)^γ · [t_l w⁺_l (-log σ(z_l)) + (1 - t_l) w⁻_l (-log σ(-z_l))]

t = y (1 - ε) + ε/2, and p_l the probability of what is true of label l. Balanced weights are those
of two classes, for each label by itself: w⁺ = n / (2 n⁺), w⁻ = n / (2 n⁻). Explicit weights are one
per label, whether it is there or not.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from scipy.special import expit
from torch import Tensor
from torch.nn import functional

from bagscope.errors import CohortError
from bagscope.mil.objectives.criterion import Array, Criterion, as_tensor, explicit_weights
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec


class MultilabelCriterion(Criterion):
    """A logit for each label."""

    kind: Literal["multilabel"] = "multilabel"
    classes: tuple[str, ...]
    weights_if_absent: tuple[float, ...]
    weights_if_present: tuple[float, ...]
    smoothing: float
    gamma: float

    @staticmethod
    def outputs_of(target: TargetSpec, spec: ObjectiveSpec) -> int:
        """Return L."""
        return len(target.classes)

    @classmethod
    def fit(cls, target: TargetSpec, spec: ObjectiveSpec, rows: Array) -> Self:
        """Learn the labels' weights from rows (n, L) of 0 and 1."""
        if not (rows != rows[0]).any():
            raise CohortError(
                f"{target.name}: all {len(rows)} training cases have the same labels; cases that "
                "differ are needed to learn from"
            )
        explicit = explicit_weights(target, spec)
        if explicit is not None:
            absent = present = explicit
        elif spec.class_weights == "none":
            absent = present = (1.0,) * len(target.classes)
        else:
            absent, present = _balanced(target, rows)
        return cls(
            classes=target.classes,
            weights_if_absent=absent,
            weights_if_present=present,
            smoothing=spec.label_smoothing,
            gamma=spec.focal_gamma,
        )

    def plain(self) -> Self:
        """Return it without smoothing and focus; the weights stay."""
        return self.model_copy(update={"smoothing": 0.0, "gamma": 0.0})

    def loss(self, logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """Return the loss (B,) of logits (B, L)."""
        truth = labels.to(logits.dtype)
        wanted = truth * (1 - self.smoothing) + self.smoothing / 2
        if_present = as_tensor(self.weights_if_present, logits) * functional.logsigmoid(logits)
        if_absent = as_tensor(self.weights_if_absent, logits) * functional.logsigmoid(-logits)
        entropy = -(wanted * if_present + (1 - wanted) * if_absent)
        if self.gamma > 0:
            entropy = (self.gamma * functional.logsigmoid(logits * (1 - 2 * truth))).exp() * entropy
        return entropy.mean(1)

    def predict(self, logits: Array) -> Array:
        """Return probabilities (n, L), each by itself."""
        found: Array = expit(logits)
        return found

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the labels."""
        return self.classes


def _balanced(target: TargetSpec, rows: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the weights of absent and of present labels, (L,) each."""
    cases = len(rows)
    with_label = rows.sum(0)
    lone = (with_label == 0) | (with_label == cases)
    if lone.any():
        at = int(np.argmax(lone))
        raise CohortError(
            f"{target.name}: label {target.classes[at]!r} is on {int(with_label[at])} of "
            f"{cases} training cases, so balanced weights don't exist; leave class_weights out, "
            "or drop the label"
        )
    return (
        tuple((cases / (2 * (cases - with_label))).tolist()),
        tuple((cases / (2 * with_label)).tolist()),
    )
