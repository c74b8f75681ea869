"""What a run starts from: its splits, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagscope.errors import ConfigError
from bagscope.mil.cases import CaseTable
from bagscope.mil.splits import SplitSpec
from bagscope.pipeline.study import Study, open_study
from bagscope.pipeline.train_data import split_plan
from tests.mil.splits.tables import graded, table_of

ROWS = graded({"a": 20, "b": 20})
SPEC = SplitSpec(folds=2)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "cohort.csv").write_text("slide_id,path\ns,s.svs\n")
    return open_study(tmp_path)


def notes_of(study: Study, table: CaseTable) -> tuple[str, ...]:
    return split_plan(study, table, name="default", spec=SPEC)[1]


def test_sound_splits_are_said_to_be_made_once_and_then_nothing(study: Study) -> None:
    table = table_of(ROWS)
    (made,) = notes_of(study, table)
    assert "made splits/default.csv" in made
    assert notes_of(study, table) == ()


def test_what_is_worth_knowing_of_splits_that_are_there_is_said(study: Study) -> None:
    notes_of(study, table_of(ROWS))
    changed = [{**row, "site": "east"} for row in ROWS]
    (note,) = notes_of(study, table_of(changed))
    assert "changed since the splits were made" in note
    path = study.folder / "splits" / "default.csv"
    header, first, *others = path.read_text().splitlines()
    swapped = first.replace("val", "train") if "val" in first else first.replace("train", "val")
    path.write_text("\n".join([header, swapped, *others]))
    notes = notes_of(study, table_of(ROWS))
    assert "splits/default.csv was edited since it was made" in notes


def test_cases_that_are_gone_are_named_and_not_called_a_change(study: Study) -> None:
    notes_of(study, table_of(ROWS))
    (note,) = notes_of(study, table_of(ROWS[1:]))
    assert note == "in the splits, but without features or label: a0-0 (1)"


def test_notes_of_the_table_are_not_said_again(study: Study) -> None:
    unlabelled = {"slide_id": "u", "patient_id": "u", "grade": ""}
    table = table_of([*ROWS, unlabelled])
    assert any("no label" in note for note in table.notes)
    assert not set(notes_of(study, table)) & set(table.notes)


def test_faults_of_splits_are_refused(study: Study) -> None:
    table = table_of(ROWS)
    notes_of(study, table)
    path = study.folder / "splits" / "default.csv"
    path.write_text(path.read_text().replace("test", "train"))
    with pytest.raises(ConfigError, match="never tested"):
        notes_of(study, table)
