"""What a table of predictions says of cases, against rows that are written by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from bagscope.heatmaps.review.answers import (
    CaseFacts,
    TargetFacts,
    case_facts,
    targets_of_columns,
)
from bagscope.mil.evaluation.answers import PredictionTable
from bagscope.mil.prediction_table import target_columns
from bagscope.mil.targets import TargetSpec

CLASSES = TargetFacts(name="label", task="classes", classes=("normal", "tumor"), threshold=0.3)
GRADE = TargetFacts(name="grade", task="ordinal", classes=("1", "2", "3"))
MARKERS = TargetFacts(name="marker", task="multilabel", classes=("er", "pr"))
AGE = TargetFacts(name="age", task="regression")
DEATH = TargetFacts(name="os", task="survival")


def facts(
    targets: Sequence[TargetFacts], *rows: Mapping[str, Any], folds: bool = True
) -> dict[str, CaseFacts]:
    keys = {"case_id": "x", "patient_id": "p", "site": "", "repeat": 0, "fold": 0, "seed": 0}
    full = [{name: str(cell) for name, cell in (keys | dict(row)).items()} for row in rows]
    columns = {name: [row[name] for row in full] for name in full[0]}
    return case_facts(PredictionTable(columns=columns, source="t"), targets, folds=folds)


def said(truth: str, called: str, tumor: float, **cells: Any) -> dict[str, Any]:
    chances = {"label_p_normal": 1 - tumor, "label_p_tumor": tumor}
    return {"label": truth, "label_predicted": called, **chances, **cells}


def test_of_two_classes_the_last_is_sorted_by() -> None:
    found = facts((CLASSES,), said("tumor", "tumor", 0.4, fold=2))["x"]
    assert found.truth == {"label": "tumor"}
    assert found.predicted["label"].to_json() == {
        "text": "tumor",
        "value": 0.4,
        "probabilities": {"normal": 0.6, "tumor": 0.4},
        "low": None,
        "high": None,
    }
    assert (found.correct, found.fold, found.ood) == (True, 2, None)


def test_repeats_are_averaged_and_their_spread_is_told() -> None:
    values = (0.1, 0.2, 0.9)
    rows = [
        said("normal", "tumor" if value > 0.5 else "normal", value, fold=fold, repeat=fold)
        for fold, value in enumerate(values)
    ]
    found = facts((CLASSES,), *rows)["x"]
    predicted = found.predicted["label"]
    # The mean of 0.4 is above the threshold of 0.3, where most members called it normal.
    assert predicted.text == "tumor"
    assert found.correct is False
    assert found.fold is None
    assert predicted.value == pytest.approx(0.4)
    data = predicted.to_json()
    assert data["high"] == pytest.approx(0.4 + np.std(values, ddof=1))
    assert data["low"] == 0.0  # no chance is below


def test_the_spread_that_a_prediction_states_is_its_own() -> None:
    row = said("", "tumor", 0.8, label_sd_tumor="0.05", label_sd_normal="0.05", ood="1")
    found = facts((CLASSES,), row, folds=False)["x"]
    data = found.predicted["label"].to_json()
    assert (data["low"], data["high"]) == (pytest.approx(0.75), pytest.approx(0.85))
    assert found.truth == {"label": None}
    assert (found.correct, found.fold, found.ood) == (None, None, True)


def test_of_several_targets_all_known_ones_must_be_right() -> None:
    numbers = {"age": "61", "age_predicted": "58.25", "os_time": "12.5", "os_event": "0"}
    grade = {"grade": "", "grade_predicted": "2", "grade_p_1": 0.1, "grade_p_2": 0.6}
    markers = {"marker_er": "1", "marker_pr": "0", "marker_p_er": "0.7", "marker_p_pr": "0.6"}
    row = said("tumor", "tumor", 0.9) | numbers | grade | markers
    row |= {"grade_p_3": 0.3, "os_risk": "-1.25", "os_s_12": "0.5"}
    targets = (CLASSES, GRADE, MARKERS, AGE, DEATH)
    found = facts(targets, row)["x"]
    assert found.truth == {
        "label": "tumor",
        "grade": None,
        "marker": "er",
        "age": 61.0,
        "os": "no event until 12.5",
    }
    assert {name: one.text for name, one in found.predicted.items()} == {
        "label": "tumor",
        "grade": "2",
        "marker": "er, pr",
        "age": "58.25",
        "os": "risk -1.25",
    }
    assert found.predicted["grade"].value == 0.6
    assert found.predicted["os"].probabilities is None
    assert found.correct is False
    right = facts(targets, row | {"marker_pr": "1", "os_event": "1"})["x"]
    assert right.correct is True
    assert right.truth["os"] == "event at 12.5"
    assert facts((AGE, DEATH), row)["x"].correct is None


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (TargetSpec(column="label", classes=("no", "yes")), ()),
        (TargetSpec(column="m", task="multilabel", classes=("er", "pr", "her2")), ()),
        (TargetSpec(column="age", task="regression"), ()),
        (TargetSpec(task="survival", time="t", event="e", column="os"), ("risk", "s_12")),
    ],
)
def test_targets_are_found_in_a_tables_own_columns(
    target: TargetSpec, names: tuple[str, ...]
) -> None:
    width = len(names) or len(target.classes) or 1
    values = np.full((1, width), 0.5)
    values = values[:, 0] if target.task == "regression" else values
    columns = target_columns(target, [(math.nan,) * 3], values, names or target.classes, None)
    assert targets_of_columns(("case_id", *columns)) == (
        TargetFacts(name=target.name, task=target.task, classes=target.classes),
    )
