"""What a table of predictions says of each case, averaged where it says it several times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.artifacts import Json

if TYPE_CHECKING:
    from bagscope.mil.evaluation.answers import PredictionTable

CALLED_FROM = 0.5
"""Probability from which one label of several is called."""
INTERVAL_TEXT = "one standard deviation of the models' answers to either side of their mean"

_Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetFacts:
    """A target of the model.

    Attributes:
        task: classes, multilabel, ordinal, regression or survival.
        threshold: of the last of two classes; None where the most probable class is called.
    """

    name: str
    task: str
    classes: tuple[str, ...] = ()
    threshold: float | None = None

    def to_json(self) -> dict[str, Json]:
        """Return what the page needs to know."""
        return {
            "name": self.name,
            "task": self.task,
            "classes": list(self.classes),
            "threshold": self.threshold,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """A prediction of one target.

    Attributes:
        text: for people.
        value: to sort by: the probability of the last of two classes, else of the predicted one;
            a number; a risk. None where there is no single one.
        probabilities: of each class or label; None for a number or a time.
        spread: standard deviation of the models' values; None where one model answered.
    """

    text: str
    value: float | None
    probabilities: Mapping[str, float] | None = None
    spread: float | None = None

    def to_json(self) -> dict[str, Json]:
        """Return it with the ends of its interval, which stay probabilities where they are."""
        low = high = None
        if self.value is not None and self.spread is not None:
            low, high = self.value - self.spread, self.value + self.spread
            if self.probabilities is not None:
                low, high = max(0.0, low), min(1.0, high)
        chances = None if self.probabilities is None else dict(self.probabilities)
        return {
            "text": self.text,
            "value": self.value,
            "probabilities": chances,
            "low": low,
            "high": high,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseFacts:
    """What is known of a case.

    Attributes:
        truth: by target; None where there is no label.
        predicted: by target.
        correct: whether every class that has a label is the predicted one; None without any.
        fold: that it was a test case of; None where there are several or none.
        ood: whether it is unlike the training bags, None where the table does not say.
    """

    case_id: str
    patient_id: str
    truth: Mapping[str, str | float | None]
    predicted: Mapping[str, Predicted]
    correct: bool | None
    fold: int | None = None
    ood: bool | None = None


def targets_of_columns(columns: Sequence[str]) -> tuple[TargetFacts, ...]:
    """Return the targets that a table's columns tell of, for where the model is not at hand."""
    found = []
    for column in columns:
        if column.endswith("_risk"):
            found.append(TargetFacts(name=column.removesuffix("_risk"), task="survival"))
        elif column.endswith("_predicted"):
            name = column.removesuffix("_predicted")
            chances = [one for one in columns if one.startswith(f"{name}_p_")]
            classes = tuple(one.removeprefix(f"{name}_p_") for one in chances)
            found.append(
                TargetFacts(name=name, task="classes" if classes else "regression", classes=classes)
            )
    named = tuple(f"{target.name}_p_" for target in found)
    rest: dict[str, list[str]] = {}
    for column in columns:
        name, between, label = column.partition("_p_")
        if between and not column.startswith(named):
            rest.setdefault(name, []).append(label)
    labels = [
        TargetFacts(name=name, task="multilabel", classes=tuple(classes))
        for name, classes in rest.items()
    ]
    return (*found, *labels)


def case_facts(
    table: PredictionTable, targets: Sequence[TargetFacts], *, folds: bool = True
) -> dict[str, CaseFacts]:
    """Return what a table says of each case; several rows of a case, of repeats, are averaged.

    Args:
        table: of predictions.
        targets: of the model.
        folds: whether the table's folds are those that cases were tested in.
    """
    names = list(table.columns)
    rows: dict[str, list[dict[str, str]]] = {}
    for cells in zip(*table.columns.values(), strict=True):
        row = dict(zip(names, cells, strict=True))
        rows.setdefault(row["case_id"], []).append(row)
    return {
        case_id: _facts(case_id, found, targets, folds=folds) for case_id, found in rows.items()
    }


def _facts(case_id: str, rows: _Rows, targets: Sequence[TargetFacts], *, folds: bool) -> CaseFacts:
    truth: dict[str, str | float | None] = {}
    predicted: dict[str, Predicted] = {}
    verdicts: list[bool] = []
    for target in targets:
        if target.task == "survival":
            truth[target.name], predicted[target.name] = _survival(target, rows)
        elif target.task == "regression":
            truth[target.name], predicted[target.name] = _number(target, rows)
        elif target.task == "multilabel":
            truth[target.name], predicted[target.name] = _labels(target, rows)
        else:
            truth[target.name], predicted[target.name] = _class(target, rows)
        known = truth[target.name]
        if known is not None and target.task not in ("survival", "regression"):
            verdicts.append(known == predicted[target.name].text)
    numbers = {row["fold"] for row in rows} if folds else set()
    flags = {row.get("ood", "") for row in rows}
    return CaseFacts(
        case_id=case_id,
        patient_id=rows[0]["patient_id"],
        truth=truth,
        predicted=predicted,
        correct=all(verdicts) if verdicts else None,
        fold=int(numbers.pop()) if len(numbers) == 1 else None,
        ood=None if flags <= {""} else "1" in flags,
    )


def _class(target: TargetFacts, rows: _Rows) -> tuple[str | None, Predicted]:
    name = target.name
    chances = {one: _mean(rows, f"{name}_p_{one}") for one in target.classes}
    called = {row[f"{name}_predicted"] for row in rows}
    if len(called) == 1:
        (text,) = called
    elif len(target.classes) == 2 and target.threshold is not None:
        text = target.classes[chances[target.classes[1]] >= target.threshold]
    else:
        text = max(chances, key=lambda one: chances[one])
    shown = target.classes[1] if len(target.classes) == 2 else text
    return rows[0][name] or None, Predicted(
        text=text,
        value=chances[shown],
        probabilities=chances,
        spread=_spread(rows, f"{name}_p_{shown}", f"{name}_sd_{shown}"),
    )


def _labels(target: TargetFacts, rows: _Rows) -> tuple[str | None, Predicted]:
    name = target.name
    cells = {one: rows[0][f"{name}_{one}"] for one in target.classes}
    chances = {one: _mean(rows, f"{name}_p_{one}") for one in target.classes}
    called = [one for one, chance in chances.items() if chance >= CALLED_FROM]
    stated = [one for one, cell in cells.items() if cell == "1"]
    known = all(cell != "" for cell in cells.values())
    return _listed(stated) if known else None, Predicted(
        text=_listed(called), value=None, probabilities=chances
    )


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "none"


def _number(target: TargetFacts, rows: _Rows) -> tuple[float | None, Predicted]:
    name = target.name
    value = _mean(rows, f"{name}_predicted")
    stated = rows[0][name]
    return float(stated) if stated else None, Predicted(
        text=f"{value:.4g}",
        value=value,
        spread=_spread(rows, f"{name}_predicted", f"{name}_sd"),
    )


def _survival(target: TargetFacts, rows: _Rows) -> tuple[str | None, Predicted]:
    name = target.name
    risk = _mean(rows, f"{name}_risk")
    time, event = rows[0][f"{name}_time"], rows[0][f"{name}_event"]
    stated = None
    if time:
        stated = f"{'event at' if event == '1' else 'no event until'} {float(time):g}"
    return stated, Predicted(
        text=f"risk {risk:.3g}",
        value=risk,
        spread=_spread(rows, f"{name}_risk", f"{name}_sd_risk"),
    )


def _mean(rows: _Rows, column: str) -> float:
    values = [float(row[column]) for row in rows if row.get(column)]
    return sum(values) / len(values) if values else math.nan


def _spread(rows: _Rows, column: str, stated: str) -> float | None:
    """Return the standard deviation over rows; the one that a single row states of its models."""
    values = [float(row[column]) for row in rows if row.get(column)]
    if len(values) > 1:
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    text = rows[0].get(stated, "")
    return float(text) if text else None
