"""Gradients of what a trained model is asked, per tile, averaged over members.

What is differentiated does not saturate: log odds of a class, the logit of one label of several,
the value of a regression, the risk of survival. Temperatures scale log odds alone and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.mil.bags import Bags
from bagscope.mil.explain.attribution import (
    Target,
    gradient_times_input,
    integrated_gradients,
    log_odds,
)
from bagscope.mil.explain.members import member_bags
from bagscope.mil.explain.question import Array
from bagscope.mil.member import Member
from bagscope.mil.sources import BagSource

STEPS = 16
"""Points of Gauss and Legendre on the way from the baseline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients:
    """What each tile adds, by two methods, as the mean over members.

    Attributes:
        integrated: (n,) they add up to `reached`, but for the steps of the way.
        times_input: (n,)
        reached: f of the bag − f of as many tiles that are the training tiles' mean.
        unit: what f is.
    """

    integrated: Array
    times_input: Array
    reached: float
    unit: str


def gradients_of(
    members: Sequence[Member],
    source: BagSource,
    case: int,
    *,
    target: str,
    column: int,
    device: torch.device | str = "cpu",
) -> Gradients:
    """Return the gradients of a case's tiles.

    Args:
        members: that answer.
        source: of the case.
        case: its place.
        target: that is asked about.
        column: of its answers.
        device: that the models run on.
    """
    integrated, times_input, reached = [], [], []
    for member in members:
        model = member.model(device)
        bags = member_bags(member, source, (case,)).to(device)
        asked, _ = target_of(member, target, column)
        # Where tiles are standardised, the mean of the training tiles is zero; where it is not
        # known, zero has to do.
        known = member.scale is None and member.statistics.is_known
        mean = member.statistics.mean if known else np.zeros(member.features)
        baseline = torch.from_numpy(mean).to(bags.features)
        integrated.append(integrated_gradients(model, bags, asked, baseline=baseline, steps=STEPS))
        times_input.append(gradient_times_input(model, bags, asked))
        with torch.no_grad():
            nothing = baseline.expand_as(bags.features)
            values = [
                float(asked(model(one).logits.double())[0])
                for one in (bags, _with_features(bags, nothing))
            ]
        reached.append(values[0] - values[1])
    return Gradients(
        integrated=np.mean(integrated, axis=0),
        times_input=np.mean(times_input, axis=0),
        reached=float(np.mean(reached)),
        unit=target_of(members[0], target, column)[1],
    )


def target_of(member: Member, name: str, column: int) -> tuple[Target, str]:
    """Return what is differentiated of a member's logits (B, C), and its name."""
    place = [target.name for target in member.targets].index(name)
    spec, criterion = member.targets[place], member.objective.criteria[place]
    own = member.objective.slices[name]
    if spec.task == "classes":
        inner, unit = log_odds(column), f"log odds of {spec.classes[column]}"
    elif spec.task == "ordinal":
        inner, unit = ordinal_log_odds(column), f"log odds of {spec.classes[column]}"
    elif spec.task == "multilabel":
        inner, unit = _column(column, 1.0), f"log odds of {spec.classes[column]}"
    elif spec.task == "regression":
        inner, unit = _column(0, float(getattr(criterion, "scale", 1.0))), name
    elif own.stop - own.start == 1:
        inner, unit = _column(0, 1.0), "risk"
    else:
        inner, unit = discrete_risk, "risk"
    return lambda logits: inner(logits[:, own]), unit


def ordinal_log_odds(column: int) -> Target:
    """Return log p / (1 − p) of a class, from a logit for each step to the next class."""

    def target(logits: Tensor) -> Tensor:
        reached = functional.logsigmoid(logits[:, :column]).sum(1)
        if column < logits.shape[1]:
            reached = reached + functional.logsigmoid(-logits[:, column])
        return reached - torch.log(-torch.expm1(reached))

    return target


def discrete_risk(logits: Tensor) -> Tensor:
    """Return the risk, − the sum of survival over bins, of logits (B, bins) of the hazards."""
    return -functional.logsigmoid(-logits).cumsum(1).exp().sum(1)


def _column(column: int, scale: float) -> Target:
    return lambda logits: scale * logits[:, column]


def _with_features(bags: Bags, features: Tensor) -> Bags:
    return replace(bags, features=features)
