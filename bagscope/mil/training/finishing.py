"""From a finished training to a member: calibration and threshold from the inner part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


@dataclass
class _Fitted:
    temperatures: dict[str, float]
    uncalibrated: dict[str, str]
    thresholds: dict[str, float]


def finish(
    trained: Trained,
    recipe: TrainSpec,
    inner: BagSource | None,
    *,
    seed: int,
    fields: Mapping[str, Json],
) -> Member:
    """Return the member, calibrated on the inner validation part where that is large enough."""
    fitted = _Fitted({}, {}, {})
    objective = trained.objective
    for target in objective.targets:
        if target.task != "classes":
            fitted.uncalibrated[target.name] = f"{target.task} has no temperature here"
        elif not recipe.training.calibrate:
            fitted.uncalibrated[target.name] = "the recipe does not ask for it"
        elif inner is None or trained.inner_logits is None:
            fitted.uncalibrated[target.name] = "there is no inner validation part"
        else:
            logits = trained.inner_logits[:, objective.slices[target.name]]
            _fit(target, logits, inner, recipe, fitted)
        if target.task == "classes" and len(target.classes) == 2:
            fitted.thresholds.setdefault(target.name, HALF)
    return Member(
        recipe=recipe,
        targets=tuple(objective.targets),
        objective=objective,
        weights=trained.weights,
        statistics=trained.statistics,
        temperatures=fitted.temperatures,
        uncalibrated=fitted.uncalibrated,
        thresholds=fitted.thresholds,
        seed=seed,
        epoch=trained.epoch,
        epochs=len(trained.history),
        fields=fields,
    )


def _fit(
    target: TargetSpec,
    logits: NDArray[np.float64],
    inner: BagSource,
    recipe: TrainSpec,
    fitted: _Fitted,
) -> None:
    labels = np.array([case.targets[target.name][0] for case in inner.cases])
    patients = np.array([case.patient_id for case in inner.cases])
    known = ~np.isnan(labels)
    if not known.any():
        fitted.uncalibrated[target.name] = "no inner validation case has its label"
        return
    classes = labels[known].astype(int)
    found = calibrate(logits[known], classes, patients[known])
    temperature = Temperature(temperature=1.0, loss_before=0.0, loss_after=0.0)
    if isinstance(found, Skipped):
        fitted.uncalibrated[target.name] = found.reason
    elif isinstance(found, Temperature):
        temperature = found
        fitted.temperatures[target.name] = found.temperature
    if len(target.classes) == 2 and recipe.training.threshold == "youden":
        chosen = choose_threshold(classes, temperature.apply(logits[known])[:, 1], patients[known])
        if not isinstance(chosen, Skipped):
            fitted.thresholds[target.name] = chosen.value
