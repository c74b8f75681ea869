"""Cases: slides and patients with labels, and what contradicts itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bagscope.errors import CohortError
from bagscope.mil.cases import cases_of
from bagscope.mil.targets import TargetSpec, is_missing
from tests.mil.splits.tables import GRADE, cohort_of, table_of

SIZE = TargetSpec(column="size", task="regression")
ROWS = [
    {"slide_id": "s1", "patient_id": "p1", "site": "north", "grade": "b", "size": "2"},
    {"slide_id": "s2", "patient_id": "p2", "site": "south", "grade": "a", "size": ""},
    {"slide_id": "s3", "patient_id": "p1", "site": "north", "grade": "", "size": "2.0"},
    {"slide_id": "s4", "patient_id": "p3", "site": "north", "grade": "NA", "size": ""},
]


def refusal(rows: list[dict[str, str]], *targets: TargetSpec, **options) -> str:
    with pytest.raises(CohortError) as caught:
        cases_of(cohort_of(rows), targets or (GRADE,), **{"per": "patient", **options})
    return str(caught.value)


def test_per_patient_slides_are_gathered_in_the_cohorts_order() -> None:
    table = table_of(ROWS, (GRADE, SIZE), per="patient")
    first, second = table.cases
    assert (first.case_id, first.patient_id, first.slide_ids) == ("p1", "p1", ("s1", "s3"))
    assert first.targets == {"grade": (1.0,), "size": (2.0,)}
    assert first.site == "north"
    assert second.slide_ids == ("s2",)
    assert second.targets["grade"] == (0.0,)
    assert is_missing(second.targets["size"])
    assert table.patient_ids == ("p1", "p2")
    assert table.known_ids == {"s1", "s2", "s3", "s4", "p1", "p2", "p3"}


def test_a_case_without_any_label_is_left_out_and_named() -> None:
    table = table_of(ROWS, (GRADE, SIZE), per="patient")
    assert table.left_out == {"p3": "has no label"}
    assert any("p3" in note and "no label" in note for note in table.notes)
    per_slide = table_of(ROWS, (GRADE,))
    assert [case.case_id for case in per_slide.cases] == ["s1", "s2"]
    assert set(per_slide.left_out) == {"s3", "s4"}


def test_what_the_table_decided_about_classes_is_noted() -> None:
    notes = table_of(ROWS, (GRADE, SIZE)).notes
    assert any("positive is b" in note for note in notes)
    assert any("'NA' (1)" in note for note in notes)
    resolved = table_of(ROWS).targets
    assert not any("positive is" in note for note in table_of(ROWS, resolved).notes)


def test_without_targets_every_slide_is_a_case() -> None:
    table = cases_of(cohort_of(ROWS), (), per="slide")
    assert [case.case_id for case in table.cases] == ["s1", "s2", "s3", "s4"]
    assert not table.left_out


def test_chosen_cases_keep_the_tables_order() -> None:
    table = table_of(ROWS)
    assert [case.case_id for case in table.chosen(["s2", "s1", "nobody"])] == ["s1", "s2"]


def test_slides_without_features_are_refused_or_left_out() -> None:
    sentence = refusal(ROWS, available={"s1", "s2"})
    assert "2 of 4 slides have no features (s3, s4)" in sentence
    assert "--skip-missing" in sentence
    table = cases_of(
        cohort_of(ROWS), (GRADE,), per="patient", available={"s1", "s2"}, skip_missing=True
    )
    assert table.cases[0].slide_ids == ("s1",)
    assert table.left_out == {"s3": "has no features", "s4": "has no features"}
    assert any("no features: s3, s4 (2)" in note for note in table.notes)


def test_no_features_at_all_can_not_be_skipped() -> None:
    assert "4 of 4 slides" in refusal(ROWS, available=set(), skip_missing=True)


def test_slides_of_a_patient_that_contradict_each_other_are_named() -> None:
    rows = [*ROWS, {**ROWS[0], "slide_id": "s5", "grade": "a", "site": "south"}]
    sentence = refusal(rows)
    assert "patient p1, column grade" in sentence
    assert "s1: b, s5: a" in sentence
    assert "column site" in sentence
    by_slide = table_of(rows)
    assert len(by_slide.cases) == 3  # per slide both may be true
    assert any("1 of 2 patients have different labels (p1: s1, s5)" in n for n in by_slide.notes)
    assert not any("different labels" in note for note in table_of(ROWS).notes)


def test_every_bad_cell_is_named_at_once() -> None:
    rows = [{**row, "size": f"x{i}"} for i, row in enumerate(ROWS)]
    sentence = refusal(rows, SIZE)
    for i in range(4):
        assert f"'x{i}'" in sentence


def test_a_cohort_without_any_label_is_refused() -> None:
    sentence = refusal([{**row, "size": ""} for row in ROWS], SIZE)
    assert "no slide has features and a label in size" in sentence


def test_two_targets_of_one_name_are_refused() -> None:
    assert "named twice: grade" in refusal(ROWS, GRADE, GRADE)


def test_the_site_can_be_a_target() -> None:
    table = table_of(ROWS, TargetSpec(column="site"))
    assert table.targets[0].classes == ("north", "south")


def test_a_cohort_without_patients_says_what_that_means() -> None:
    cohort = replace(cohort_of(ROWS), patient_id_given=False)
    notes = cases_of(cohort, (GRADE,), per="slide").notes
    assert any("patient of its own" in note for note in notes)
