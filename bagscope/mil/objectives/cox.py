"""Survival by Cox's partial likelihood over the bags of a batch, ties after Breslow.

ℓ_i = -(1 - c_i) [θ_i - log Σ_{j: t_j ≥ t_i} exp θ_j],  L = 1/n Σ ℓ_i

n counts all labelled bags of the batch, also the censored ones. The sum over j runs over the bags
of the same batch that were still at risk, so the batch is what the loss means something in: a bag
alone gives 0 whatever its logit is, and so does a batch without an event. Meaningful are batches of
many bags drawn at random, with several events and bags that outlive them. Adding up the gradients
of small batches is not the same as a large one.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from bagscope.mil.objectives.criterion import Array, Criterion
from bagscope.mil.objectives.discrete_time import require_events
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec

ROWS = 1024
"""Bags whose risk sets are laid out at once: bounds the memory of a large part's loss."""


class CoxCriterion(Criterion):
    """A log relative hazard θ; it knows no times, so there is a risk and no survival curve."""

    is_tempered: ClassVar[bool] = False

    kind: Literal["cox"] = "cox"

    @staticmethod
    def outputs_of(target: TargetSpec, spec: ObjectiveSpec) -> int:
        """Return 1."""
        return 1

    @classmethod
    def fit(cls, target: TargetSpec, spec: ObjectiveSpec, rows: Array) -> Self:
        """Check that rows (n, 2) have an event; there is nothing to learn."""
        require_events(target, rows)
        return cls()

    def loss(self, logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """Return the loss (B,) of logits (B, 1)."""
        return cox_loss(logits[:, 0], labels[:, 0], labels[:, 1], present)

    def is_telling(self, labels: Tensor, present: Tensor) -> bool:
        """Return whether there is an event with another bag at risk."""
        times, event = labels[present, 0], labels[present, 1] == 1
        return bool(event.any()) and int((times >= times[event].min()).sum()) > 1

    def predict(self, logits: Array) -> Array:
        """Return (n, 1): the linear predictor, higher is worse."""
        return logits.copy()

    @property
    def columns(self) -> tuple[str, ...]:
        """Return "risk"."""
        return ("risk",)


def cox_loss(theta: Tensor, time: Tensor, event: Tensor, present: Tensor) -> Tensor:
    """Return each bag's part (B,) of the negative log partial likelihood.

    Args:
        theta: (B,) log relative hazards.
        time: (B,) in any unit.
        event: (B,) 1 for an event, 0 for a censored time.
        present: (B,) bool; a bag without a label is in no risk set, and gives 0.
    """
    order = torch.arange(len(theta), device=theta.device)
    log_risk = []
    for rows in torch.split(order, ROWS):
        at_risk = (time >= time[rows, None]) & present
        # A bag is in its own row whatever it lacks: an empty row would have no finite gradient.
        at_risk = at_risk | (order == rows[:, None])
        log_risk.append(torch.where(at_risk, theta, -torch.inf).logsumexp(1))
    return (event * present).to(theta.dtype) * (torch.cat(log_risk) - theta)
