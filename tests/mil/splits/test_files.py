"""Splits on disk: what a spreadsheet shows, what comes back, and what is never overwritten."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagscope.errors import ArtifactError, CohortError, FingerprintMismatch, SchemaError
from bagscope.mil.splits import SplitPlan, SplitSpec, make_splits, read_splits, write_splits
from bagscope.mil.splits.files import settings_path, was_edited
from bagscope.mil.targets import TargetSpec
from tests.mil.splits.tables import graded, table_of

ROWS = [
    {**row, "site": "nsw"[int(row["patient_id"][1:]) % 3]}
    for row in graded({"a": 9, "b": 9}, slides=2)
]


def plan_of(**options) -> SplitPlan:
    return make_splits(table_of(ROWS), SplitSpec(**options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "splits" / "default.csv"


@settings(max_examples=10)
@given(
    st.sampled_from(
        [
            {"folds": 3, "repeats": 2},
            {"method": "monte_carlo", "repeats": 12, "test_share": 0.3},
            {"method": "site_out", "stratify": False},
            {"method": "site_preserving", "folds": 2, "val_share": 0},
        ]
    ),
    st.integers(0, 5),
)
def test_what_was_written_comes_back(tmp_path_factory, options: dict, seed: int) -> None:
    path = tmp_path_factory.mktemp("splits") / "x.csv"
    plan = plan_of(seed=seed, **options)
    assert write_splits(plan, path)
    assert read_splits(path) == plan
    assert was_edited(read_splits(path), path) is False


def test_a_row_is_a_case_and_a_column_a_split(path: Path) -> None:
    write_splits(plan_of(folds=3), path)
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["case_id", "patient_id", "r0_f0", "r0_f1", "r0_f2"]
    assert [row["case_id"] for row in rows] == sorted(row["slide_id"] for row in ROWS)
    assert all(list(row.values()).count("test") == 1 for row in rows)
    assert b"\r" not in path.read_bytes()


def test_no_path_of_this_machine_is_written(path: Path, tmp_path: Path) -> None:
    official = tmp_path / "official.csv"
    sides = {f"{g}{i}": "test" if i < 3 else "train" for g in "ab" for i in range(9)}
    official.write_text("patient_id,split\n" + "\n".join(",".join(i) for i in sides.items()))
    write_splits(plan_of(method="fixed", file=str(official)), path)
    assert str(tmp_path) not in settings_path(path).read_text()
    assert read_splits(path).spec.file == "official.csv"


def test_the_same_again_changes_nothing_and_others_are_refused(path: Path) -> None:
    write_splits(plan_of(seed=1), path)
    before = path.read_bytes()
    assert not write_splits(plan_of(seed=1), path)
    with pytest.raises(FingerprintMismatch, match=r"spec\.seed is 1, asked for 2"):
        write_splits(plan_of(seed=2), path)
    assert path.read_bytes() == before
    assert write_splits(plan_of(seed=2), path, overwrite=True)
    assert path.read_bytes() != before


def test_an_edited_table_is_noticed_and_not_overwritten(path: Path) -> None:
    plan = plan_of()
    write_splits(plan, path)
    text = path.read_text()
    path.write_text(text.replace(",train,", ",test,", 1))
    assert was_edited(read_splits(path), path) is True
    with pytest.raises(FingerprintMismatch, match="edited"):
        write_splits(plan, path)
    # Saved by a spreadsheet in another country, but saying the same.
    path.write_bytes(b"\xef\xbb\xbf" + text.replace(",", ";").replace("\n", "\r\n").encode())
    assert read_splits(path) == plan
    assert not write_splits(plan, path)


def test_what_was_said_of_a_plan_comes_back_until_it_is_edited(path: Path) -> None:
    plan = replace(plan_of(), notes=("site n: 6 patients",))
    write_splits(plan, path)
    assert read_splits(path).notes == plan.notes
    copy = path.with_name("copy.csv")
    write_splits(read_splits(path), copy)
    assert settings_path(copy).read_bytes() == settings_path(path).read_bytes()
    path.write_text(path.read_text().replace(",train,", ",test,", 1))
    assert read_splits(path).notes == ()


def test_other_labels_are_another_split(path: Path) -> None:
    write_splits(plan_of(folds=3), path)
    rows = [{**row, "grade": "b" if row["patient_id"] == "a0" else row["grade"]} for row in ROWS]
    other = make_splits(table_of(rows), SplitSpec(folds=3))
    with pytest.raises(FingerprintMismatch, match="labels is"):
        write_splits(other, path)


def test_a_table_made_by_hand_needs_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("case_id,patient_id,note,r0_f0\ns1,p1,x,train\ns2,p2,,test\ns3,p3,,\n")
    plan = read_splits(path)
    assert plan.spec.method == "fixed"
    assert plan.splits[0].train == ("s1",)
    assert plan.patient_of == {"s1": "p1", "s2": "p2", "s3": "p3"}
    assert plan.per is None
    assert was_edited(plan, path) is None


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("case_id,patient_id,r0_f0\ns1,p1,tarin\n", SchemaError, "row 2, column r0_f0: 'tarin'"),
        ("case_id,patient_id\ns1,p1\n", SchemaError, "r0_f0"),
        ("slide,r0_f0\ns1,train\n", SchemaError, "case_id, patient_id"),
        ("", CohortError, "no header"),
    ],
)
def test_what_is_no_table_of_splits_is_refused(
    tmp_path: Path, text: str, kind: type[Exception], words: str
) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(kind, match=words):
        read_splits(path)


def test_missing_or_damaged_files_say_so(path: Path) -> None:
    with pytest.raises(ArtifactError, match="bagscope splits make"):
        read_splits(path)
    write_splits(plan_of(), path)
    settings = settings_path(path)
    settings.write_text(settings.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(SchemaError, match="version 9"):
        read_splits(path)
    settings.write_text("{}")
    with pytest.raises(SchemaError, match="lacks fields"):
        read_splits(path)


def test_a_plan_without_some_cases() -> None:
    plan = plan_of(folds=3)
    kept = [case_id for case_id in plan.case_ids if case_id.endswith("-0")]
    fewer = plan.restricted_to(kept)
    assert fewer.case_ids == tuple(kept)
    for whole, part in zip(plan.splits, fewer.splits, strict=True):
        assert part.test == tuple(case_id for case_id in whole.test if case_id.endswith("-0"))
        assert sorted([*part.train, *part.val, *part.test]) == kept


def test_targets_come_back_with_their_classes(path: Path) -> None:
    target = TargetSpec(column="grade", positive="a")
    write_splits(make_splits(table_of(ROWS, target), SplitSpec()), path)
    assert read_splits(path).targets == (
        TargetSpec(column="grade", positive="a", classes=("b", "a")),
    )
