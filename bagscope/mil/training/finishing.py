"""From a finished training to a member: calibration and threshold from the inner part.

Each of the two is fitted or not by itself, and where it is not, the member says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from bagscope.artifacts import Json
from bagscope.mil.evaluation.calibration import (
    Skipped,
    Temperature,
    calibrate,
    choose_threshold,
)
from bagscope.mil.member import Member
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.sources import BagSource
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.trainer import Trained

HALF = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inner:
    """The inner validation cases that have a target's label, at least one."""

    logits: NDArray[np.float64]
    classes: NDArray[np.int64]
    patients: NDArray[np.str_]
    names: tuple[str, ...]


def finish(
    trained: Trained,
    recipe: TrainSpec,
    inner: BagSource | None,
    *,
    seed: int,
    fields: Mapping[str, Json],
) -> Member:
    """Return the member, calibrated on the inner validation part where that is large enough."""
    member = Member(
        recipe=recipe,
        targets=tuple(trained.objective.targets),
        objective=trained.objective,
        weights=trained.weights,
        statistics=trained.statistics,
        seed=seed,
        epoch=trained.epoch,
        epochs=len(trained.history),
        fields=fields,
    )
    return calibrated(member, inner, trained.inner_logits)


def calibrated(
    member: Member, inner: BagSource | None, inner_logits: NDArray[np.float64] | None
) -> Member:
    """Return a member with temperatures and thresholds of its own for its weights.

    Args:
        member: whatever temperatures and thresholds it has are replaced.
        inner: the inner validation part; None for none.
        inner_logits: (n, C) that the member's weights give its cases.
    """
    temperatures: dict[str, float] = {}
    uncalibrated: dict[str, str] = {}
    thresholds: dict[str, float] = {}
    unchosen: dict[str, str] = {}
    for target in member.targets:
        name = target.name
        if target.task != "classes":
            uncalibrated[name] = f"{target.task} has no temperature here"
            continue
        part = _inner_of(target, member, inner, inner_logits)
        temperature = _temperature(part, member.recipe)
        if isinstance(temperature, Skipped):
            uncalibrated[name] = temperature.reason
        else:
            temperatures[name] = temperature
        if len(target.classes) == 2:
            threshold = _threshold(part, member.recipe, temperatures.get(name, 1.0))
            if isinstance(threshold, Skipped):
                unchosen[name] = threshold.reason
            thresholds[name] = HALF if isinstance(threshold, Skipped) else threshold
    return dataclasses.replace(
        member,
        temperatures=temperatures,
        uncalibrated=uncalibrated,
        thresholds=thresholds,
        unchosen=unchosen,
    )


def _inner_of(
    target: TargetSpec,
    member: Member,
    inner: BagSource | None,
    inner_logits: NDArray[np.float64] | None,
) -> _Inner | Skipped:
    if inner is None or inner_logits is None:
        return Skipped(reason="there is no inner validation part")
    labels = np.array([case.targets[target.name][0] for case in inner.cases])
    known = ~np.isnan(labels)
    if not known.any():
        return Skipped(reason="no inner validation case has its label")
    return _Inner(
        logits=inner_logits[known, member.objective.slices[target.name]],
        classes=labels[known].astype(np.int64),
        patients=np.array([case.patient_id for case in inner.cases])[known],
        names=target.classes,
    )


def _temperature(part: _Inner | Skipped, recipe: TrainSpec) -> float | Skipped:
    if not recipe.training.calibrate:
        return Skipped(reason="the recipe does not ask for it")
    if isinstance(part, Skipped):
        return part
    found = calibrate(part.logits, part.classes, part.patients, names=part.names)
    if isinstance(found, Skipped):
        return found
    assert isinstance(found, Temperature), "the method that was asked for"
    return found.temperature


def _threshold(part: _Inner | Skipped, recipe: TrainSpec, temperature: float) -> float | Skipped:
    if recipe.training.threshold == "half":
        return Skipped(reason="the recipe asks for one half")
    if isinstance(part, Skipped):
        return part
    chances = softmax(part.logits / temperature, axis=1)[:, 1]
    chosen = choose_threshold(part.classes, chances, part.patients, names=part.names)
    if isinstance(chosen, Skipped):
        return chosen
    return chosen.value
