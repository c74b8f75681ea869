"""Predictions as a table: one row per case and member, readable by people and programs.

Columns: case_id, patient_id, site, repeat, fold, seed; then for each target `t`

    classes, ordinal   t (label), t_predicted, t_p_<class> for each class
    multilabel         t_<class> (0 or 1), t_p_<class> for each class
    regression         t, t_predicted
    survival           t_time, t_event, t_risk, and the survival at the edge of each time bin

An empty cell is a missing label.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagscope.mil.cases import Case
from bagscope.mil.member import Member
from bagscope.mil.targets import TargetSpec, Value

KEYS = ("case_id", "patient_id", "site", "repeat", "fold", "seed")
_DIGITS = 9
"""What float32 tells apart."""


def predictions_csv(
    member: Member,
    cases: Sequence[Case],
    logits: NDArray[np.float64],
    *,
    repeat: int = 0,
    fold: int = 0,
    seed: int = 0,
) -> str:
    """Return a member's predictions of cases as CSV; logits are (n, C) in the cases' order."""
    predicted = member.predictions(logits)
    columns: dict[str, list[Any]] = {
        "case_id": [case.case_id for case in cases],
        "patient_id": [case.patient_id for case in cases],
        "site": [case.site for case in cases],
        "repeat": [repeat] * len(cases),
        "fold": [fold] * len(cases),
        "seed": [seed] * len(cases),
    }
    for target in member.targets:
        labels = [case.targets.get(target.name, (math.nan,)) for case in cases]
        threshold = member.thresholds.get(target.name)
        names = member.objective.columns[target.name]
        columns |= target_columns(target, labels, predicted[target.name], names, threshold)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def target_columns(
    target: TargetSpec,
    labels: Sequence[Value],
    predicted: NDArray[np.float64],
    names: Sequence[str],
    threshold: float | None,
) -> Mapping[str, list[str]]:
    """Return a target's columns.

    Args:
        target: with its classes resolved.
        labels: of each case, NaN where missing.
        predicted: what the objective's `predictions` gives for the target.
        names: of the prediction's columns, as of the objective.
        threshold: from which the last of two classes is called.
    """
    name = target.name
    if target.task == "survival":
        return {
            f"{name}_time": [_text(label[0]) for label in labels],
            f"{name}_event": [_whole(label[-1]) for label in labels],
            **{
                f"{name}_{column}": [_text(value) for value in predicted[:, place]]
                for place, column in enumerate(names)
            },
        }
    if target.task == "regression":
        return {
            name: [_text(label[0]) for label in labels],
            f"{name}_predicted": [_text(value) for value in predicted],
        }
    chances = {
        f"{name}_p_{one}": [_text(value) for value in predicted[:, place]]
        for place, one in enumerate(target.classes)
    }
    if target.task == "multilabel":
        truth = {
            f"{name}_{one}": [
                _whole(label[place] if len(label) > place else math.nan) for label in labels
            ]
            for place, one in enumerate(target.classes)
        }
        return {**truth, **chances}
    called = _called(target, predicted, threshold)
    return {
        name: ["" if math.isnan(label[0]) else target.classes[int(label[0])] for label in labels],
        f"{name}_predicted": [target.classes[place] for place in called],
        **chances,
    }


def _called(
    target: TargetSpec, chances: NDArray[np.float64], threshold: float | None
) -> NDArray[np.intp]:
    if threshold is not None and len(target.classes) == 2:
        return np.asarray(chances[:, 1] >= threshold, np.intp)
    return np.asarray(chances.argmax(axis=1), np.intp)


def _text(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.{_DIGITS}g}"


def _whole(number: float) -> str:
    return "" if math.isnan(number) else str(int(number))
