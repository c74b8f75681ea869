"""Labels: what a cell means, and which cells mean nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from bagscope.errors import CohortError, ConfigError
from bagscope.mil.targets import (
    TargetSpec,
    Task,
    is_missing,
    notes_on_classes,
    read_value,
    resolve_classes,
    width_of,
)
from bagscope.specs import parse_spec

SURVIVAL = TargetSpec(task="survival", time="days", event="died")


def column(*cells: str, name: str = "y") -> list[Mapping[str, str]]:
    return [{name: cell} for cell in cells]


def read(target: TargetSpec, **cells: str) -> tuple[float, ...]:
    return read_value(target, cells, "slide s")


def spec_refusal(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_spec(TargetSpec, values, where="options")
    return str(caught.value)


def test_classes_come_from_the_table_numbers_by_value() -> None:
    found = resolve_classes(TargetSpec(column="y"), column("10", "9", "", "2", "NA", "9"))
    assert found.classes == ("2", "9", "10")
    words = resolve_classes(TargetSpec(column="y"), column("wild", "mutant", " wild "))
    assert words.classes == ("mutant", "wild")


def test_the_positive_class_comes_last() -> None:
    rows = column("mutant", "wild")
    assert resolve_classes(TargetSpec(column="y", positive="mutant"), rows).classes == (
        "wild",
        "mutant",
    )
    given = TargetSpec(column="y", classes=("mutant", "wild"), positive="mutant")
    assert resolve_classes(given, rows).classes == ("wild", "mutant")


def told(target: TargetSpec, *cells: str) -> str:
    rows = column(*cells)
    return "\n".join(notes_on_classes(target, resolve_classes(target, rows), rows))


def test_a_positive_class_that_nobody_named_is_said() -> None:
    note = told(TargetSpec(column="y"), "cancer", "normal", "")
    assert note == "column 'y': positive is normal (last in order); pass --positive to change"
    assert told(TargetSpec(column="y", positive="cancer"), "cancer", "normal") == ""
    assert told(TargetSpec(column="y", classes=("cancer", "normal")), "cancer", "normal") == ""
    assert told(TargetSpec(column="y"), "a", "b", "c") == ""
    assert told(TargetSpec(column="y", task="ordinal"), "0", "1") == ""
    assert told(TargetSpec(column="y", task="regression"), "0", "NA") == ""


@pytest.mark.parametrize("task", ["classes", "multilabel"])
def test_words_that_are_taken_as_no_label_are_said(task: Task) -> None:
    cells = ("none", "micro", " none ", "macro", "NA", "", "mega")
    note = told(TargetSpec(column="y", task=task), *cells)
    assert "'NA' (1), 'none' (2)" in note
    assert "--classes" in note
    named = TargetSpec(column="y", task=task, classes=("none", "micro", "macro", "mega"))
    assert told(named, *cells) == ""
    assert told(TargetSpec(column="y", task=task), "micro", "macro", "", "mega") == ""


def test_a_class_is_the_index_of_its_name() -> None:
    target = TargetSpec(column="y", classes=("low", "mid", "high"), task="ordinal")
    assert read(target, y=" high ") == (2.0,)
    assert width_of(target) == 1


@pytest.mark.parametrize("cell", ["", "  ", "NA", "nan", "None", "?", "N/A", "null"])
def test_cells_that_say_nothing_are_missing_in_every_task(cell: str) -> None:
    for target in (
        TargetSpec(column="y", classes=("a", "b")),
        TargetSpec(column="y", classes=("a", "b"), task="multilabel"),
        TargetSpec(column="y", task="regression"),
    ):
        value = read(target, y=cell)
        assert len(value) == width_of(target)
        assert is_missing(value)
        assert all(math.isnan(number) for number in value)
    assert is_missing(read(SURVIVAL, days=cell, died="1"))
    assert is_missing(read(SURVIVAL, days="3", died=cell))


def test_a_class_may_be_called_none_where_it_is_named() -> None:
    target = TargetSpec(column="y", classes=("none", "micro", "macro"))
    assert read(target, y="none") == (0.0,)
    assert is_missing(read(target, y=""))


def test_a_cell_of_several_labels() -> None:
    rows = column("b;a", "c", "-", "")
    target = resolve_classes(TargetSpec(column="y", task="multilabel"), rows)
    assert target.classes == ("a", "b", "c")
    assert read(target, y="c; a;") == (1.0, 0.0, 1.0)
    assert read(target, y="-") == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("cell", "event"),
    [("1", 1), ("1.0", 1), ("TRUE", 1), ("Dead", 1), ("0", 0), ("0.0", 0), ("Alive", 0)],
)
def test_survival_is_time_and_event(cell: str, event: int) -> None:
    assert read(SURVIVAL, days="12.5", died=cell) == (12.5, event)
    assert SURVIVAL.name == "survival"
    assert SURVIVAL.columns == ("days", "died")


@pytest.mark.parametrize(
    ("target", "cells", "words"),
    [
        (TargetSpec(column="y", classes=("low", "high")), {"y": "hihg"}, ["'hihg'", "'high'"]),
        (TargetSpec(column="y", classes=("a", "b")), {"y": "zzz"}, ["'zzz'", "leave the cell"]),
        (TargetSpec(column="y", task="regression"), {"y": "1,5"}, ["'1,5'", "number"]),
        (TargetSpec(column="y", task="regression"), {"y": "inf"}, ["'inf'", "finite"]),
        (SURVIVAL, {"days": "-3", "died": "1"}, ["'-3'", "column days", "negative"]),
        (SURVIVAL, {"days": "3", "died": "2"}, ["'2'", "column died", "no event"]),
    ],
)
def test_a_cell_that_is_no_label_is_refused(
    target: TargetSpec, cells: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(CohortError) as caught:
        read(target, **cells)
    for word in ["slide s", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("target", "rows", "words"),
    [
        (TargetSpec(column="grad"), column("a", name="grade"), ["'grad'", "'grade'"]),
        (TargetSpec(column="y"), column("a", "a", ""), ["all labels are 'a'"]),
        (TargetSpec(column="y"), column("", "NA"), ["none of 2 rows names a class"]),
        (
            TargetSpec(column="y", task="multilabel"),
            column("-", ""),
            ["none of 2 rows names a class"],
        ),
        (TargetSpec(column="y", positive="c"), column("a", "b"), ["'c'", "a, b"]),
        (TargetSpec(column="y", positive="c"), column("a", "b", "c"), ["3 classes", "one of two"]),
        (TargetSpec(column="y", task="ordinal"), column("low", "high"), ["order", "--classes"]),
        (SURVIVAL, column("1", name="days"), ["'died'", "days"]),
    ],
)
def test_a_column_that_gives_no_classes_is_refused(
    target: TargetSpec, rows: list[Mapping[str, str]], words: list[str]
) -> None:
    with pytest.raises(CohortError) as caught:
        resolve_classes(target, rows)
    for word in words:
        assert word in str(caught.value)


def test_ordinal_numbers_need_no_names() -> None:
    found = resolve_classes(TargetSpec(column="y", task="ordinal"), column("5", "0", "10"))
    assert found.classes == ("0", "5", "10")


def test_options_that_belong_elsewhere_are_refused() -> None:
    assert "time and event" in spec_refusal(task="survival", time="days")
    assert "belong to survival" in spec_refusal(column="y", time="days", event="died")
    assert "column is missing" in spec_refusal(task="regression")
    assert "name each one once" in spec_refusal(column="y", classes=["a", "a"])
    assert "'c'" in spec_refusal(column="y", classes=["a", "b"], positive="c")
    assert "regression has no classes" in spec_refusal(
        column="y", task="regression", classes=["a", "b"]
    )
    assert "the task is ordinal" in spec_refusal(column="y", task="ordinal", positive="1")
    assert "there are 3" in spec_refusal(column="y", classes=["a", "b", "c"], positive="a")
    assert "did you mean 'column'" in spec_refusal(columm="y")
