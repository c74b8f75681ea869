"""`splits make` and `splits check`, as they are typed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bagscope.cli.target_options import require_targets, targets_of
from bagscope.errors import ConfigError
from bagscope.mil.targets import TargetSpec
from tests.cli.conftest import Ran, files_of
from tests.mil.splits.tables import store_vectors

Command = Callable[..., Ran]
COLUMNS = ("slide_id", "path", "patient_id", "site", "split", "grade", "size", "days", "died")


def rows() -> list[dict[str, str]]:
    return [
        {
            "slide_id": f"s{i}-{j}",
            "path": f"s{i}-{j}.svs",
            "patient_id": f"p{i}",
            "site": ("north", "south", "west")[i % 3],
            "split": "test" if i < 6 else "train",
            "grade": "ab"[i % 2],
            "size": str(i / 4),
            "days": str(10 + i),
            "died": str(int(i % 4 > 0)),
        }
        for i in range(24)
        for j in range(1 + i % 2)
    ]


def write_cohort(study: Path, table: list[dict[str, str]]) -> None:
    study.mkdir(exist_ok=True)
    with (study / "cohort.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerows(table)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_cohort(tmp_path / "study", rows())
    return tmp_path / "study"


def test_splits_are_made_shown_and_sound(bagscope: Command, study: Path) -> None:
    ran = bagscope("splits", "make", study, "--target", "grade")
    assert ran.code == 0
    header, *lines = (line.split() for line in ran.out.splitlines() if line.strip())
    assert header == ["split", "side", "patients", "slides", "a", "b"]
    tested = [line for line in lines if line[0] == "test"]
    assert sum(int(line[1]) for line in tested) == 24
    assert sum(int(line[2]) for line in tested) == 36
    assert sum(int(line[3]) for line in tested) == 12
    assert "5 splits, written" in ran.out
    assert (study / "splits" / "default.csv").exists()
    checked = bagscope("splits", "check", study)
    assert checked.code == 0
    assert "0 faults" in checked.out


def test_the_same_again_is_harmless_and_others_are_refused(bagscope: Command, study: Path) -> None:
    bagscope("splits", "make", study, "--target", "grade")
    before = files_of(study)
    assert "the same" in bagscope("splits", "make", study, "--target", "grade").out
    refused = bagscope("splits", "make", study, "--target", "grade", "--seed", 5)
    assert refused.code == 2
    assert "spec.seed is 0, asked for 5" in refused.err
    assert files_of(study) == before
    assert bagscope("splits", "make", study, "-t", "grade", "--seed", 5, "--overwrite").code == 0
    assert files_of(study) != before


def test_a_dry_run_writes_nothing(bagscope: Command, study: Path) -> None:
    before = files_of(study)
    ran = bagscope("splits", "make", study, "--target", "grade", "--dry-run")
    assert ran.code == 0
    assert "not written" in ran.out
    assert files_of(study) == before


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--target", "grade", "--folds", 3, "--repeats", 2], 6),
        (["--target", "size:regression", "--method", "monte_carlo", "--repeats", 4], 4),
        (["--time", "days", "--event", "died", "--folds", 3], 3),
        (["--target", "grade", "--method", "site_out", "--per", "patient"], 3),
        (["--target", "grade", "--method", "site_preserving", "--folds", 2], 2),
        (["--target", "grade", "--method", "fixed"], 1),
        (["--target", "grade", "--classes", "b,a", "--val-share", 0, "--no-stratify"], 5),
        (["--target", "grade", "--positive", "a", "--folds", 2, "--repeats", 7], 14),
    ],
)
def test_every_method_is_for_programs_too(
    bagscope: Command, study: Path, options: list[object], count: int
) -> None:
    ran = bagscope("splits", "make", study, *options, "--name", "x", "--json")
    assert ran.code == 0, ran.err
    *events, totals = (json.loads(line) for line in ran.out.splitlines())
    sides = [event for event in events if event["event"] == "side"]
    assert len(sides) == 3 * count
    path = study / "splits" / "x.csv"
    assert totals == {"event": "totals", "path": str(path), "splits": count, "written": True}
    for start in range(0, len(sides), 3):
        assert sum(side["slides"] for side in sides[start : start + 3]) == 36
    assert bagscope("splits", "check", path).code == 0


def test_long_tables_are_cut(bagscope: Command, study: Path) -> None:
    ran = bagscope("splits", "make", study, "--target", "grade", "--folds", 2, "--repeats", 7)
    assert "and 2 more splits; --json shows all" in ran.out


def test_a_study_says_how_it_is_split_and_options_go_over_it(
    bagscope: Command, study: Path, tmp_path: Path
) -> None:
    (study / "study.yaml").write_text(
        "targets: [{column: grade, positive: a}]\nsplits: {folds: 3, repeats: 2, seed: 4}\n"
    )

    def spec_of(name: str, *options: object) -> dict[str, object]:
        ran = bagscope("splits", "make", study, "--name", name, *options)
        assert ran.code == 0, ran.err
        settings = json.loads((study / "splits" / f"{name}.json").read_text())
        assert settings["fields"]["targets"][0]["classes"] == ["b", "a"]
        return settings["fields"]["spec"]

    shared = {"val_share": 0.2, "stratify": True, "seed": 4}
    assert spec_of("own") == {"method": "kfold", "folds": 3, "repeats": 2, **shared}
    assert spec_of("more", "--folds", 4)["folds"] == 4
    assert spec_of("other", "--method", "site_out") == {"method": "site_out", **shared}
    (study / "sides.csv").write_text(
        "patient_id,split\n" + "\n".join(f"p{i},{'test' if i < 6 else 'train'}" for i in range(24))
    )
    (study / "study.yaml").write_text(
        "targets: [{column: grade, positive: a}]\n"
        "splits: {method: fixed, file: sides.csv, seed: 4}\n"
    )
    assert spec_of("fixed") == {"method": "fixed", "file": "sides.csv", **shared}


def test_a_file_fixes_the_sides(bagscope: Command, study: Path, tmp_path: Path) -> None:
    official = tmp_path / "official.tsv"
    lines = [f"p{i}\t{'test' if i > 17 else 'train'}" for i in range(24)]
    official.write_text("patient_id\tsplit\n" + "\n".join(lines) + "\n")
    ran = bagscope("splits", "make", study, "--target", "grade", "--from", official, "--json")
    assert ran.code == 0
    sides = {event["side"]: event for event in map(json.loads, ran.out.splitlines()[:3])}
    assert sides["test"]["counts"] == {"a": 3, "b": 3}
    assert sides["val"]["patients"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no target"),
        (["--target", "grad"], "did you mean 'grade'?"),
        (["--target", "grade", "--folds", 13], "class 'a' has 12 patients"),
        (["--target", "grade", "--method", "kfolds"], "method is 'kfolds'"),
        (["--target", "grade", "--method", "site_out", "--folds", 3], "makes no use of folds"),
        (["--target", "grade", "--test-share", 0.1], "makes no use of test_share"),
        (["--target", "grade", "--name", "a/b"], "--name 'a/b' contains '/'"),
        (["--target", "grade", "--from", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_wrong_usage_is_one_sentence(
    bagscope: Command, study: Path, options: list[object], words: str
) -> None:
    ran = bagscope("splits", "make", study, *options)
    assert ran.code == 2
    assert words in ran.err
    assert not (study / "splits").exists()


def test_faults_are_named_and_exit_1(bagscope: Command, study: Path) -> None:
    bagscope("splits", "make", study, "--target", "grade")
    path = study / "splits" / "default.csv"
    lines = path.read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("s1-0,"))
    side = lines[row].split(",")[2]
    other = "test" if side != "test" else "train"
    lines[row] = lines[row].replace(f"p1,{side}", f"p1,{other}", 1)
    path.write_text("\n".join([*lines, lines[3]]) + "\n")
    for place in (study, path):
        ran = bagscope("splits", "check", place)
        assert ran.code == 1
        assert "fault: r0_f0: patient p1 is on " in ran.out
        assert f"fault: r0_f0: case {lines[3].split(',')[0]} is 2 times on" in ran.out
        assert "note: the table was edited since it was made" in ran.out
    ran = bagscope("splits", "check", study, "--json")
    *events, totals = (json.loads(line) for line in ran.out.splitlines())
    assert ran.code == 1
    assert totals["faults"] == sum(event["event"] == "fault" for event in events) > 1


def test_a_cohort_that_has_grown_is_noticed(bagscope: Command, study: Path) -> None:
    bagscope("splits", "make", study, "--target", "grade")
    more = {**rows()[0], "slide_id": "new", "patient_id": "p99"}
    write_cohort(study, [*rows(), more])
    ran = bagscope("splits", "check", study)
    assert ran.code == 1
    assert "in the cohort, but not in the splits: new (1)" in ran.out


def test_a_table_of_somebody_else_is_checked_by_what_it_says(
    bagscope: Command, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text("case_id,patient_id,r0_f0\na,p1,train\nb,p2,test\nc,p1,test\n")
    ran = bagscope("splits", "check", path)
    assert ran.code == 1
    assert "patient p1 is on train and test (train: a; test: c)" in ran.out
    assert "note: no study beside the splits" in ran.out
    assert bagscope("splits", "check", path, "--name", "x").code == 2


def test_missing_splits_say_how_to_make_them(bagscope: Command, study: Path) -> None:
    ran = bagscope("splits", "check", study)
    assert ran.code == 1
    assert "bagscope splits make" in ran.err


def test_tissue_scanned_twice_is_a_fault(bagscope: Command, study: Path) -> None:
    bagscope("splits", "make", study, "--target", "grade", "--folds", 2)
    folder = study / "features" / "0.50mpp_256px" / "demo"
    vectors = {
        row["slide_id"]: np.random.default_rng(i).normal(size=(40, 8)).astype(np.float16)
        for i, row in enumerate(rows())
    }
    store_vectors(folder, vectors)
    assert bagscope("splits", "check", study, "--features", folder).code == 0
    with (study / "splits" / "default.csv").open(newline="") as handle:
        sides = {row["case_id"]: row["r0_f0"] for row in csv.DictReader(handle)}
    tested, taught = (
        next(case_id for case_id, side in sides.items() if side == wanted)
        for wanted in ("test", "train")
    )
    store_vectors(folder, {tested: vectors[taught]})
    ran = bagscope("splits", "check", study, "--features", folder)
    assert ran.code == 1
    for word in (tested, taught, "40 tiles in common (100% of the smaller one)"):
        assert word in ran.out


def test_bytes_do_not_depend_on_the_process(study: Path, tmp_path: Path) -> None:
    made = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "bagscope", "splits", "make", str(study)]
        command += ["--target", "grade", "--name", f"n{seed}", "--repeats", "2"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        made.append((study / "splits" / f"n{seed}.csv").read_bytes())
    assert made[0] == made[1]


# --- targets --------------------------------------------------------------------------------


def test_options_become_targets() -> None:
    assert targets_of(["grade"]) == (TargetSpec(column="grade"),)
    assert targets_of(["isup:ordinal", "age:regression"]) == (
        TargetSpec(column="isup", task="ordinal"),
        TargetSpec(column="age", task="regression"),
    )
    assert targets_of(["a:b"], classes="x, y", positive="x") == (
        TargetSpec(column="a:b", classes=("x", "y"), positive="x"),
    )
    survival = TargetSpec(task="survival", time="t", event="e")
    assert targets_of(None, time="t", event="e") == (survival,)
    assert targets_of(["grade"], time="t", event="e") == (TargetSpec(column="grade"), survival)
    assert targets_of(["os"], "survival", time="t", event="e") == (
        TargetSpec(column="os", task="survival", time="t", event="e"),
    )
    assert targets_of(None) == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": None, "task": "ordinal"}, "of no target"),
        ({"target": None, "time": "t"}, "time and event"),
        ({"target": ["a"], "task": "survival"}, "time and event"),
        ({"target": ["a", "b"], "classes": "x,y"}, "a, b"),
        ({"target": ["a"], "task": "regression", "positive": "x"}, "there are: none"),
        (
            {"target": ["a"], "task": "regression", "time": "t", "event": "e"},
            "--task is regression",
        ),
        ({"target": ["a"], "task": "class"}, "task is 'class'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        targets_of(**arguments)


def test_a_verb_may_insist_on_a_target() -> None:
    with pytest.raises(ConfigError, match="--target COLUMN"):
        require_targets(())
    require_targets((TargetSpec(column="a"),))
