"""Every way in which splits can be wrong, planted and found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bagscope.mil.splits import Split, SplitPlan, SplitSpec, check_splits, make_splits
from bagscope.mil.splits.checking import examine_splits
from bagscope.mil.targets import TargetSpec
from tests.mil.splits.tables import graded, table_of

ROWS = graded({"a": 9, "b": 9}, slides=2)
TABLE = table_of(ROWS)
PLAN = make_splits(TABLE, SplitSpec(folds=3))
FIRST = PLAN.splits[0]


def with_first(**sides: tuple[str, ...]) -> SplitPlan:
    return replace(PLAN, splits=(replace(FIRST, **sides), *PLAN.splits[1:]))


def moved(case_id: str, source: str, side: str) -> SplitPlan:
    kept = tuple(name for name in FIRST.of(source) if name != case_id)
    return with_first(**{source: kept, side: (*FIRST.of(side), case_id)})


def faults(plan: SplitPlan) -> str:
    return "\n".join(check_splits(plan, TABLE))


def test_a_sound_plan_has_no_fault() -> None:
    assert check_splits(PLAN, TABLE) == []
    assert examine_splits(PLAN, None).faults == ()


def test_a_patient_on_two_sides_is_named() -> None:
    case_id = FIRST.train[0]
    patient = case_id[:2]
    found = faults(moved(case_id, "train", "test"))
    assert f"r0_f0: patient {patient} is on train and test" in found
    assert f"test: {case_id}" in found
    assert patient in "\n".join(examine_splits(moved(case_id, "train", "test"), None).faults)


def test_a_case_twice_is_named() -> None:
    case_id = FIRST.train[0]
    assert f"r0_f0: case {case_id} is 2 times on train" in faults(
        with_first(train=(*FIRST.train, case_id))
    )


def test_validation_over_test_is_named() -> None:
    found = faults(with_first(val=FIRST.test))
    for case_id in FIRST.test:
        assert f"r0_f0: case {case_id} is on val and test" in found


def test_a_case_on_no_side_is_named() -> None:
    assert f"r0_f0: on no side: {FIRST.val[0]}" in faults(with_first(val=FIRST.val[1:]))


def test_unknown_and_missing_cases_are_named() -> None:
    found = faults(with_first(train=(*FIRST.train, "zz")))
    assert "r0_f0: unknown cases: zz" in found
    strangers = replace(PLAN, patient_of={**PLAN.patient_of, "zz": "zz"})
    assert "not a labelled case of the cohort: zz" in faults(strangers)
    known = {c: p for c, p in PLAN.patient_of.items() if c != "a0-0"}
    assert "in the cohort, but not in the splits: a0-0" in faults(replace(PLAN, patient_of=known))


def test_a_patient_under_another_name_is_named() -> None:
    renamed = replace(PLAN, patient_of={**PLAN.patient_of, "a0-0": "x"})
    assert "a0-0 (x there, a0 in the cohort)" in faults(renamed)


@pytest.mark.parametrize("side", ["train", "test"])
def test_an_empty_class_is_named(side: str) -> None:
    lost = tuple(name for name in FIRST.of(side) if name[0] == "b")
    kept = tuple(name for name in FIRST.of(side) if name[0] == "a")
    plan = with_first(**{side: kept, "val": (*FIRST.val, *lost)})
    assert f"r0_f0, {side}: has no patient of class b (grade)" in faults(plan)


def test_an_empty_class_in_validation_is_a_note() -> None:
    lost = tuple(name for name in FIRST.val if name[0] == "b")
    kept = tuple(name for name in FIRST.val if name[0] == "a")
    found = examine_splits(with_first(val=kept, train=(*FIRST.train, *lost)), TABLE)
    assert not found.faults
    assert "r0_f0, val: has no patient of class b (grade)" in found.notes


def test_an_empty_side_is_named() -> None:
    assert "r0_f0, test: has no case" in faults(
        with_first(test=(), train=(*FIRST.train, *FIRST.test))
    )


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda splits: splits[:-1], "repeat 0: never tested: "),
        (lambda splits: (*splits, replace(splits[0], fold=7)), "tested in several folds: "),
        (lambda splits: (*splits, splits[0]), "splits of the same name: r0_f0"),
        (lambda splits: (), "there is no split"),
    ],
)
def test_rounds_that_do_not_add_up_are_named(
    broken: Callable[[tuple[Split, ...]], tuple[Split, ...]], words: str
) -> None:
    assert words in faults(replace(PLAN, splits=broken(PLAN.splits)))


def test_splits_of_slides_are_none_of_patients() -> None:
    found = check_splits(PLAN, table_of(ROWS, per="patient"))
    assert found == ["the splits are per slide, the cases per patient; make them again with "
                     "--per patient"]  # fmt: skip


def test_labels_that_changed_since_are_a_note() -> None:
    rows = [{**row, "grade": "b" if row["patient_id"] == "a0" else row["grade"]} for row in ROWS]
    found = examine_splits(PLAN, table_of(rows))
    assert not found.faults
    assert any("changed since" in note for note in found.notes)


def test_patients_that_may_be_one_are_a_note() -> None:
    named = {"a0": "P-01", "a1": "p_01", "a2": "P011", "a3": "P0-11"}
    rows = [{**row, "patient_id": named.get(row["patient_id"], row["patient_id"])} for row in ROWS]
    plan = make_splits(table_of(rows), SplitSpec(folds=3))
    assert [note for note in plan.notes if "taken as different" in note] == [
        "patients 'P-01' and 'p_01' are taken as different; if they are one, write the id in one "
        "way"
    ]


def test_survival_needs_an_event_on_both_sides() -> None:
    rows = [{"slide_id": f"s{i}", "days": str(i), "died": str(int(i < 10))} for i in range(20)]
    table = table_of(rows, TargetSpec(task="survival", time="days", event="died"))
    plan = make_splits(table, SplitSpec(folds=5))
    (first, *others) = plan.splits
    events = tuple(name for name in first.test if int(name[1:]) < 10)
    test = tuple(name for name in first.test if name not in events)
    broken = replace(plan, splits=(replace(first, test=test, val=(*first.val, *events)), *others))
    assert "test: has no patient of class event" in "\n".join(check_splits(broken, table))
