"""A number: squared, Huber's or absolute error, in standard deviations of the training labels.

ŷ = location + scale · z,  r = (y - ŷ) / scale
mse: r²    huber: r²/2 up to |r| = 1, then |r| - 1/2    mae: |r|
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from torch import Tensor
from torch.nn import functional

from bagscope.errors import CohortError
from bagscope.mil.objectives.criterion import Array, Criterion
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec


class RegressionCriterion(Criterion):
    """A logit that is a standardised value.

    Attributes:
        form: of the error.
        name: of the target.
        location: mean of the training labels, in their units.
        scale: their standard deviation (divided by n), in their units.
    """

    is_tempered: ClassVar[bool] = False

    kind: Literal["regression"] = "regression"
    form: Literal["mse", "huber", "mae"]
    name: str
    location: float
    scale: float

    @staticmethod
    def outputs_of(target: TargetSpec, spec: ObjectiveSpec) -> int:
        """Return 1."""
        return 1

    @classmethod
    def fit(cls, target: TargetSpec, spec: ObjectiveSpec, rows: Array) -> Self:
        """Learn location and scale from rows (n, 1)."""
        values = rows[:, 0]
        if (values == values[0]).all():
            raise CohortError(
                f"{target.name}: all {len(values)} training cases have the value {values[0]:g}; "
                "values that differ are needed to learn from"
            )
        return cls(
            form=spec.regression,
            name=target.name,
            location=float(np.mean(values)),
            scale=float(np.std(values)),
        )

    def loss(self, logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """Return the loss (B,) of logits (B, 1)."""
        wanted = ((labels[:, 0] - self.location) / self.scale).to(logits.dtype)
        found = logits[:, 0]
        if self.form == "mse":
            return functional.mse_loss(found, wanted, reduction="none")
        if self.form == "huber":
            return functional.huber_loss(found, wanted, reduction="none")
        return functional.l1_loss(found, wanted, reduction="none")

    def predict(self, logits: Array) -> Array:
        """Return values (n,) in the label's units."""
        return self.location + self.scale * logits[:, 0]

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the target's name."""
        return (self.name,)
