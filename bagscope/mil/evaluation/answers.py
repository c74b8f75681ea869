"""What a run said of its test cases: its table of predictions, read back as arrays per target.

Where several seeds were trained, the answer to a case is the mean over them, as when several
models answer together; each seed's own answers stay at hand.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bagscope.errors import SchemaError
from bagscope.mil.evaluation.inputs import FloatArray, IntArray
from bagscope.mil.prediction_table import KEYS
from bagscope.mil.targets import TargetSpec

Text = npt.NDArray[np.str_]
CALLED_FROM = 0.5
"""Probability from which one label of several is called."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answers:
    """Predictions of one target, a row for each case and each fold that tests it.

    Attributes:
        case: (n,) ids.
        patient: (n,) ids.
        site: (n,), empty where it is not known.
        repeat: (n,) round of folds.
        fold: (n,) within the repeat.
        truth: (n, w) label, without NaN but among several labels.
        predicted: (n, k) probabilities of the classes, one value, or one risk.
        called: (n,) index of the class that is called, (n, L) of 0 and 1 for several labels; empty
            for a number or a time.
    """

    target: TargetSpec
    case: Text
    patient: Text
    site: Text
    repeat: IntArray
    fold: IntArray
    truth: FloatArray
    predicted: FloatArray
    called: IntArray

    def __len__(self) -> int:
        return len(self.case)

    @property
    def fold_names(self) -> tuple[str, ...]:
        """Return the name of each fold, as splits call it, in order."""
        return tuple(f"r{repeat}_f{fold}" for repeat, fold in self._folds)

    @property
    def fold_rows(self) -> tuple[IntArray, ...]:
        """Return the rows of each fold."""
        return tuple(
            np.flatnonzero((self.repeat == repeat) & (self.fold == fold))
            for repeat, fold in self._folds
        )

    @property
    def repeat_rows(self) -> tuple[IntArray, ...]:
        """Return the rows of each round of folds."""
        return tuple(np.flatnonzero(self.repeat == repeat) for repeat in np.unique(self.repeat))

    @property
    def keys(self) -> tuple[tuple[str, int, int], ...]:
        """Return what tells the rows apart: case, repeat and fold."""
        return tuple(zip(self.case.tolist(), self.repeat.tolist(), self.fold.tolist(), strict=True))

    def of_rows(self, rows: IntArray) -> Answers:
        """Return some of the rows."""
        names = ("case", "patient", "site", "repeat", "fold", "truth", "predicted", "called")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @property
    def _folds(self) -> list[tuple[int, int]]:
        pairs = np.unique(np.stack([self.repeat, self.fold]), axis=1)
        return [(int(repeat), int(fold)) for repeat, fold in pairs.T]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionTable:
    """The cells of a table of predictions, by column."""

    columns: Mapping[str, list[str]]
    source: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def where(self, column: str, value: str) -> PredictionTable:
        """Return the rows whose cell in a column is this one."""
        rows = [row for row, cell in enumerate(self.columns[column]) if cell == value]
        kept = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return replace(self, columns=kept)


def read_predictions(path: Path) -> PredictionTable:
    """Read a table of predictions.

    Raises:
        SchemaError: it is not there, or no such table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: can't be read ({error}); train the run again") from error
    head, *rows = list(csv.reader(io.StringIO(text))) or [[]]
    lacking = [name for name in KEYS if name not in head]
    if lacking or not rows:
        what = f"has no column {', '.join(lacking)}" if lacking else "has no row"
        raise SchemaError(f"{path}: {what}; it is no table of predictions")
    uneven = [number for number, row in enumerate(rows, 2) if len(row) != len(head)]
    if uneven:
        raise SchemaError(
            f"{path}: row {uneven[0]} has {len(rows[uneven[0] - 2])} cells for {len(head)} columns"
        )
    columns = {name: [row[place] for row in rows] for place, name in enumerate(head)}
    return PredictionTable(columns=columns, source=path.name)


def answers_of(table: PredictionTable, target: TargetSpec) -> Answers:
    """Return a target's answers; cases without its label are left out.

    Raises:
        SchemaError: columns that are missing, or cells that are no numbers or classes.
    """
    truth, predicted, called = _labels(table, target)
    has = np.flatnonzero(~np.isnan(truth).all(axis=1))
    answers = Answers(
        target=target,
        case=_texts(table, "case_id"),
        patient=_texts(table, "patient_id"),
        site=_texts(table, "site"),
        repeat=_numbers(table, "repeat").astype(np.int64),
        fold=_numbers(table, "fold").astype(np.int64),
        truth=truth,
        predicted=predicted,
        called=called,
    ).of_rows(has)
    if np.isnan(answers.predicted).any():
        row = int(np.argwhere(np.isnan(answers.predicted))[0, 0])
        raise SchemaError(
            f"{table.source}: case {answers.case[row]} has a label of {target.name} and no "
            "prediction; train the run again"
        )
    return answers


def mean_answers(
    answers: Sequence[Answers], thresholds: Mapping[tuple[int, int], float] | None = None
) -> Answers:
    """Return the mean over seeds; the rows must be the same.

    Args:
        answers: of each seed.
        thresholds: of the last of two classes by (repeat, fold), the mean of the seeds'; where
            none is given, the most probable class is called.
    """
    first = answers[0]
    if len(answers) == 1:
        return first
    order = {key: row for row, key in enumerate(first.keys)}
    aligned = [
        one.of_rows(np.argsort([order[key] for key in one.keys], kind="stable")) for one in answers
    ]
    predicted = np.mean([one.predicted for one in aligned], axis=0)
    called = first.called
    if first.target.task == "multilabel":
        called = (predicted >= CALLED_FROM).astype(np.int64)
    elif first.target.is_categorical:
        called = predicted.argmax(axis=1)
        if thresholds and len(first.target.classes) == 2:
            pairs = zip(first.repeat.tolist(), first.fold.tolist(), strict=True)
            limits = np.array([thresholds.get(pair, CALLED_FROM) for pair in pairs])
            called = (predicted[:, 1] >= limits).astype(np.int64)
    return replace(first, predicted=predicted, called=called)


def _labels(table: PredictionTable, target: TargetSpec) -> tuple[FloatArray, FloatArray, IntArray]:
    name = target.name
    nothing = np.empty((len(table), 0), np.int64)
    if target.task == "survival":
        truth = _stacked(table, (f"{name}_time", f"{name}_event"))
        return truth, _stacked(table, (f"{name}_risk",)), nothing
    if target.task == "regression":
        return _stacked(table, (name,)), _stacked(table, (f"{name}_predicted",)), nothing
    chances = _stacked(table, [f"{name}_p_{one}" for one in target.classes])
    if target.task == "multilabel":
        truth = _stacked(table, [f"{name}_{one}" for one in target.classes])
        return truth, chances, (chances >= CALLED_FROM).astype(np.int64)
    labels = _classes(table, name, target, missing=True)
    called = _classes(table, f"{name}_predicted", target, missing=False)
    return labels[:, None], chances, called.astype(np.int64)


def _classes(
    table: PredictionTable, column: str, target: TargetSpec, *, missing: bool
) -> FloatArray:
    places: dict[str, float] = {one: float(place) for place, one in enumerate(target.classes)}
    if missing:
        places.setdefault("", np.nan)
    cells = _cells(table, column)
    unknown = [(row, cell) for row, cell in enumerate(cells) if cell not in places]
    if unknown:
        row, cell = unknown[0]
        raise SchemaError(
            f"{table.source}: case {table.columns['case_id'][row]}, column {column}: {cell!r} is "
            f"none of the classes {', '.join(target.classes)}; the table was edited, train again"
        )
    return np.array([places[cell] for cell in cells])


def _stacked(table: PredictionTable, columns: Iterable[str]) -> FloatArray:
    return np.stack([_numbers(table, column) for column in columns], axis=1)


def _numbers(table: PredictionTable, column: str) -> FloatArray:
    cells = _cells(table, column)
    try:
        return np.array([float(cell) if cell else np.nan for cell in cells])
    except ValueError as error:
        raise SchemaError(
            f"{table.source}: column {column} holds what is no number ({error}); the table was "
            "edited, train again"
        ) from error


def _texts(table: PredictionTable, column: str) -> Any:
    return np.array(_cells(table, column), dtype=np.str_)


def _cells(table: PredictionTable, column: str) -> list[str]:
    if column not in table.columns:
        raise SchemaError(
            f"{table.source}: has no column {column!r}; it is of another run, or was edited"
        )
    return table.columns[column]
