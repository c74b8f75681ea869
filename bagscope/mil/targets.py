"""What a model is to predict: columns of the cohort table as numbers, and never a label coerced.

Every target of a bag is a row of float64, NaN where the label is missing:

    classes, ordinal   (1,)  index into `classes`
    multilabel         (L,)  0 or 1 for each of `classes`
    regression         (1,)  the value
    survival           (2,)  time, and 1 for an event or 0 for censored
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from bagscope.errors import CohortError
from bagscope.specs import Spec

Task = Literal["classes", "multilabel", "ordinal", "regression", "survival"]

MISSING = frozenset({"", "na", "n/a", "nan", "none", "null", "?"})
"""Cells, in lower case, that say that there is no label."""
SEPARATOR = ";"
"""What stands between the labels of a multi-label cell; "-" stands for "none of them"."""
NO_LABEL = "-"

_EVENT = {"1": 1.0, "true": 1.0, "yes": 1.0, "event": 1.0, "dead": 1.0, "deceased": 1.0}
_CENSORED = {"0": 0.0, "false": 0.0, "no": 0.0, "censored": 0.0, "alive": 0.0, "living": 0.0}

Value = tuple[float, ...]


class TargetSpec(Spec):
    """One target."""

    column: str = Field(default="", description="column of the cohort table; of survival: a name")
    task: Task = Field(default="classes", description="what kind of label it is")
    classes: tuple[str, ...] = Field(
        default=(), description="its values, in order; those of the table, sorted, if not set"
    )
    positive: str | None = Field(
        default=None, description="of two classes, the one whose probability is reported"
    )
    time: str | None = Field(default=None, description="survival: column of the follow-up time")
    event: str | None = Field(default=None, description="survival: column of the event")
    weight: float = Field(default=1.0, gt=0, description="of its loss, among several targets")

    @model_validator(mode="after")
    def _consistent(self) -> TargetSpec:
        if self.task == "survival":
            if not self.time or not self.event:
                raise ValueError("survival needs the columns of time and event")
        elif self.time or self.event:
            raise ValueError(f"time and event belong to survival, and the task is {self.task}")
        elif not self.column:
            raise ValueError("column is missing; name the column of the labels")
        if self.classes and self.task in ("regression", "survival"):
            raise ValueError(f"{self.task} has no classes, and they are {list(self.classes)}")
        if self.positive is not None and self.task != "classes":
            raise ValueError(f"positive belongs to classes, and the task is {self.task}")
        if self.positive is not None and len(self.classes) > 2:
            raise ValueError(f"positive is one of two classes, and there are {len(self.classes)}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes are {list(self.classes)}; name each one once")
        if self.positive is not None and self.classes and self.positive not in self.classes:
            raise ValueError(f"positive is {self.positive!r}, not one of {list(self.classes)}")
        return self

    @property
    def name(self) -> str:
        """Return what the target is called in files."""
        return self.column or "survival"

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the table that it is read from."""
        if self.task == "survival":
            return (self.time or "", self.event or "")
        return (self.column,)

    @property
    def is_categorical(self) -> bool:
        """Return whether a bag has exactly one of the classes."""
        return self.task in ("classes", "ordinal")


def resolve_classes(target: TargetSpec, rows: Iterable[Mapping[str, str]]) -> TargetSpec:
    """Return the target with its classes filled in from the table, where they are not given.

    Two classes are put in the order (negative, positive), so that the last one is the positive.

    Raises:
        CohortError: no such column, fewer than two classes, words as ordinal classes in no given
            order, or a positive class that is not one of two.
    """
    listed = list(rows)
    _require_columns(target, listed)
    if target.task in ("regression", "survival"):
        return target
    classes = list(target.classes)
    if not classes:
        found: set[str] = set()
        for row in listed:
            cell = row[target.column].strip()
            if cell.lower() not in MISSING:
                found.update(_labels(cell) if target.task == "multilabel" else (cell,))
        classes = sorted(found, key=_natural)
        words = [name for name in classes if _natural(name)[0]]
        if target.task == "ordinal" and words:
            raise CohortError(
                f"column {target.column!r}: the order of {', '.join(classes)} is not known; name "
                "the classes from low to high with --classes"
            )
    least = 1 if target.task == "multilabel" else 2
    if len(classes) < least:
        if target.classes:
            found_there = f"--classes names {', '.join(classes)} alone"
        elif classes:
            found_there = f"all labels are {classes[0]!r}"
        else:
            found_there = f"none of {len(listed)} rows names a class"
        raise CohortError(
            f"column {target.column!r}: {found_there}; at least "
            f"{'two classes are' if least == 2 else 'one class is'} needed to learn from"
        )
    if target.positive is not None:
        if target.positive not in classes:
            raise CohortError(
                f"column {target.column!r}: --positive {target.positive!r} is none of its values "
                f"({', '.join(classes)})"
            )
        if len(classes) > 2:
            raise CohortError(
                f"column {target.column!r}: has {len(classes)} classes ({', '.join(classes)}); "
                "--positive is one of two, leave it out"
            )
        classes.sort(key=lambda name: name == target.positive)
    return target.model_copy(update={"classes": tuple(classes)})


def notes_on_classes(
    target: TargetSpec, resolved: TargetSpec, rows: Iterable[Mapping[str, str]]
) -> tuple[str, ...]:
    """Return sentences on what was read out of a table because the target does not say it.

    Args:
        target: as it was given.
        resolved: the same with its classes.
        rows: of the table.
    """
    if target.classes or not resolved.classes:
        return ()
    notes = []
    cells = Counter(row[target.column].strip() for row in rows)
    words = {cell: count for cell, count in cells.items() if cell and cell.lower() in MISSING}
    if words:
        told = ", ".join(f"{cell!r} ({count})" for cell, count in sorted(words.items()))
        notes.append(
            f"column {target.column!r}: cells taken as no label: {told}; where one is a class, "
            "name all classes with --classes"
        )
    if resolved.task == "classes" and len(resolved.classes) == 2 and target.positive is None:
        notes.append(
            f"column {target.column!r}: positive is {resolved.classes[-1]} (last in order); pass "
            "--positive to change"
        )
    return tuple(notes)


def read_value(target: TargetSpec, cells: Mapping[str, str], where: str) -> Value:
    """Return the numbers of one row's label, NaN where it is missing.

    Args:
        target: with its classes resolved.
        cells: of the row, by column.
        where: the row, for messages.

    Raises:
        CohortError: a cell that is no label; names row, column and value.
    """
    width = width_of(target)
    texts = [cells[column].strip() for column in target.columns]
    # A class may well be called "none"; then it stands in the given classes.
    if any(text.lower() in MISSING and text not in target.classes for text in texts):
        return (math.nan,) * width
    if target.task == "survival":
        return _survival(target, texts, where)
    (text,) = texts
    if target.task == "regression":
        return (_number(text, where, target.column),)
    if target.is_categorical:
        return (float(_index(target, text, where)),)
    chosen = {_index(target, label, where) for label in _labels(text)}
    return tuple(float(i in chosen) for i in range(width))


def width_of(target: TargetSpec) -> int:
    """Return how many numbers a label is."""
    if target.task == "multilabel":
        return len(target.classes)
    return 2 if target.task == "survival" else 1


def is_missing(value: Value) -> bool:
    """Return whether a label is missing."""
    return any(math.isnan(number) for number in value)


def _labels(cell: str) -> list[str]:
    parts = [part.strip() for part in cell.split(SEPARATOR)]
    return [part for part in parts if part and part != NO_LABEL]


def _index(target: TargetSpec, text: str, where: str) -> int:
    if text in target.classes:
        return target.classes.index(text)
    near = difflib.get_close_matches(text, target.classes, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else "leave the cell empty where it is not known"
    raise CohortError(
        f"{where}, column {target.column}: {text!r} is none of the classes "
        f"{', '.join(target.classes)}; {hint}"
    )


def _number(text: str, where: str, column: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise CohortError(f"{where}, column {column}: {text!r} is not a finite number; correct it")
    return number


def _survival(target: TargetSpec, texts: Sequence[str], where: str) -> Value:
    time = _number(texts[0], where, target.columns[0])
    if time < 0:
        raise CohortError(
            f"{where}, column {target.columns[0]}: {texts[0]!r} is a negative time; correct it"
        )
    text = texts[1].lower()
    text = text.removesuffix(".0")
    event = _EVENT.get(text, _CENSORED.get(text))
    if event is None:
        raise CohortError(
            f"{where}, column {target.columns[1]}: {texts[1]!r} is no event; write 1 for an event "
            "and 0 for a censored time"
        )
    return (time, event)


def _require_columns(target: TargetSpec, rows: Sequence[Mapping[str, str]]) -> None:
    known = list(rows[0]) if rows else []
    for column in target.columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else "pass --labels with a clinical table"
            there = ", ".join(known) or "none"
            raise CohortError(f"no label column {column!r} (there are: {there}); {hint}")


def _natural(text: str) -> tuple[int, float, str]:
    """Sort numbers by value and before words."""
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)
