"""Sides that somebody else has fixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagscope.errors import CohortError
from bagscope.mil.cases import Per
from bagscope.mil.splits import SplitPlan, SplitSpec, make_splits
from tests.mil.splits.tables import graded, table_of

ROWS = graded({"a": 6, "b": 6}, slides=2)


def with_sides(*, val: bool = True) -> list[dict[str, str]]:
    sides = ["train", "Training", "validation" if val else "train", "train", "test", "testing"]
    return [{**row, "split": sides[int(row["patient_id"][1:])]} for row in ROWS]


def from_file(folder: Path, text: str, per: Per = "slide") -> SplitPlan:
    path = folder / "official.csv"
    path.write_text(text)
    return make_splits(table_of(ROWS, per=per), SplitSpec(method="fixed", file=str(path)))


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(CohortError) as caught:
        from_file(folder, text)
    return str(caught.value)


def patient_lines(**sides: str) -> str:
    lines = [f"{g}{i},{sides.get(f'{g}{i}', 'train')}" for g in "ab" for i in range(6)]
    return "patient_id,split\n" + "\n".join(lines) + "\n"


TESTED = {"a0": "test", "b0": "test"}


def test_the_cohorts_own_column_is_kept_to_the_letter() -> None:
    (split,) = make_splits(table_of(with_sides()), SplitSpec(method="fixed")).splits
    assert split.test == ("a4-0", "a4-1", "a5-0", "a5-1", "b4-0", "b4-1", "b5-0", "b5-1")
    assert split.val == ("a2-0", "a2-1", "b2-0", "b2-1")
    assert len(split.train) == 12


def test_where_nothing_is_given_to_choose_by_a_part_of_training_is_carved_out() -> None:
    (split,) = make_splits(table_of(with_sides(val=False)), SplitSpec(method="fixed")).splits
    assert len(split.test) == 8
    assert len(split.val) == 4  # one patient of each class, two slides each
    assert {case_id[0] for case_id in split.val} == {"a", "b"}


@pytest.mark.parametrize("per", ["slide", "patient"])
def test_a_file_by_patient(tmp_path: Path, per: Per) -> None:
    (split,) = from_file(tmp_path, patient_lines(**TESTED, a1="val", b1="val"), per).splits
    assert split.test == (("a0", "b0") if per == "patient" else ("a0-0", "a0-1", "b0-0", "b0-1"))


@pytest.mark.parametrize("per", ["slide", "patient"])
def test_a_file_by_slide(tmp_path: Path, per: Per) -> None:
    lines = [f"{row['slide_id']}\t{TESTED.get(row['patient_id'], 'train')}" for row in ROWS]
    (split,) = from_file(tmp_path, "slide_id\tsplit\n" + "\n".join(lines), per).splits
    assert {case_id[:2] for case_id in split.test} == {"a0", "b0"}


def test_ids_that_the_cohort_does_not_have_are_named(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, patient_lines(**TESTED) + "a66,train\nzz,train\n")
    assert "row 14, column patient_id: 'a66' is not in the cohort" in sentence
    assert "row 15, column patient_id: 'zz'" in sentence


def test_slides_without_a_label_may_stand_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "official.csv"
    path.write_text(patient_lines(**TESTED) + "u,test\n")
    rows = [*ROWS, {"slide_id": "u-0", "patient_id": "u", "grade": ""}]
    (split,) = make_splits(table_of(rows), SplitSpec(method="fixed", file=str(path))).splits
    assert len(split.test) == 4


def test_cases_that_the_file_forgets_are_named(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, patient_lines(**TESTED).replace("b5,train\n", ""))
    assert "2 of 24 labelled cases have no side (b5-0, b5-1)" in sentence


def test_a_patient_on_two_sides_is_named(tmp_path: Path) -> None:
    lines = [f"{r['slide_id']},{TESTED.get(r['patient_id'], 'train')}" for r in ROWS]
    text = "slide_id,split\n" + "\n".join(lines).replace("a3-1,train", "a3-1,test")
    sentence = refusal(tmp_path, text)
    assert "1 patients are on several sides: a3 (train: a3-0, test: a3-1)" in sentence
    twice = refusal(tmp_path, patient_lines(**TESTED) + "a5,test\n")
    assert "a5-0 is on test and on train" in twice


def test_words_that_are_no_side_are_named(tmp_path: Path) -> None:
    assert "column split: 'holdout' is none of" in refusal(tmp_path, patient_lines(a0="holdout"))
    rows = with_sides()
    rows[0]["split"] = "fold1"
    with pytest.raises(CohortError, match=r"'fold1' is none of train, val and test \(a0-0\)"):
        make_splits(table_of(rows), SplitSpec(method="fixed"))


def test_a_file_without_its_columns_says_which(tmp_path: Path) -> None:
    assert "split and one of case_id" in refusal(tmp_path, "patient,split\na0,train\n")


def test_sides_without_a_class_or_without_cases_are_refused(tmp_path: Path) -> None:
    assert "test: has no patient of class b (grade)" in refusal(tmp_path, patient_lines(a0="test"))
    assert "test: has no case" in refusal(tmp_path, patient_lines(a0="val"))


def test_without_any_side_the_remedy_is_named() -> None:
    with pytest.raises(CohortError, match="--from"):
        make_splits(table_of(ROWS), SplitSpec(method="fixed"))
