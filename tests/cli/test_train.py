"""`train`, as it is typed, on a small study with features."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagscope.features.feature_file import FeatureHeader, write_feature_file
from bagscope.features.store import FeatureStore
from tests.cli import drilled_training
from tests.cli.conftest import Ran, files_of, leftovers
from tests.mil.made_bags import DIMENSION, made_study

Command = Callable[..., Ran]
ROOT = Path(__file__).parents[2]
MEMBERS = ("member.json", "member.safetensors")
RECIPE = """
aggregator: {name: abmil, options: {hidden: 8, attention: 4}}
bags: {bags_per_step: 4}
optimiser: {lr: 0.003}
training: {epochs: 3, patience: null, min_epochs: 0}
"""
STUDY = "cohort: cohort.csv\nsplits: {method: kfold, folds: 3}\nrun: {workers: 2}\n"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a study, its features and a recipe, not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    study, _ = made_study(folder)
    (study / "study.yaml").write_text(STUDY)
    (folder / "small.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untrained, tmp_path / "made"))


def command(folder: Path, *more: object) -> list[str]:
    options = ["--recipe", folder / "small.yaml", "--target", "label"]
    return [
        str(part)
        for part in ("train", folder / "study", *options, "--features", folder / "features", *more)
    ]


def in_a_process(
    folder: Path, *more: object, kill_at: str = ""
) -> subprocess.CompletedProcess[str]:
    program = [str(Path(drilled_training.__file__))] if kill_at else ["-m", "bagscope"]
    return subprocess.run(
        [sys.executable, *program, *command(folder, *more)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "BAGSCOPE_DRILL": kill_at},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same after three folds were trained, not to be changed."""
    folder = Path(shutil.copytree(untrained, tmp_path_factory.mktemp("trained") / "made"))
    ran = in_a_process(folder)
    assert ran.returncode == 0, ran.stderr
    run = folder / "study" / "runs" / "small"
    assert f"next: bagscope evaluate {run} --features {folder / 'features'}\n" in ran.stdout
    return folder


def members_of(folder: Path, run: str = "small") -> dict[str, bytes]:
    runs = folder / "study" / "runs" / run
    return {name: found for name, found in files_of(runs).items() if Path(name).name in MEMBERS}


def predictions_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "study" / "runs" / "small" / "predictions.csv").open() as handle:
        return list(csv.DictReader(handle))


def rewritten(folder: Path, change: Callable[[list[dict[str, str]]], Any]) -> None:
    """Change the rows of the study's cohort table."""
    path = folder / "study" / "cohort.csv"
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    change(rows)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_a_run_holds_what_it_should(trained: Path) -> None:
    run = trained / "study" / "runs" / "small"
    folds = [f"fold_r0_f{fold}_s0" for fold in range(3)]
    assert sorted(path.name for path in run.glob("fold_*")) == folds
    for fold in folds:
        there = {path.name for path in (run / fold).iterdir()}
        # The state that a killed training goes on from is gone once there is a member.
        assert {*MEMBERS, "metrics.csv", "predictions.csv"} <= there
        assert "state.pt" not in there
        with (run / fold / "metrics.csv").open() as handle:
            assert [row["epoch"] for row in csv.DictReader(handle)] == ["1", "2", "3"]
    assert (run / "config.yaml").exists()
    assert (run / "splits.csv").read_bytes() == (
        trained / "study" / "splits" / "default.csv"
    ).read_bytes()
    assert leftovers(trained) == []


def test_every_case_is_tested_once_by_a_member_that_never_saw_it(trained: Path) -> None:
    rows = predictions_of(trained)
    with (trained / "study" / "cohort.csv").open() as handle:
        slides = {row["slide_id"]: row["patient_id"] for row in csv.DictReader(handle)}
    ids = [row["case_id"] for row in rows]
    assert sorted(ids) == sorted(slides)
    with (trained / "study" / "splits" / "default.csv").open() as handle:
        sides = {row["case_id"]: row for row in csv.DictReader(handle)}
    for row in rows:
        patient = slides[row["case_id"]]
        mates = [name for name, whose in slides.items() if whose == patient]
        assert {sides[name][f"r0_f{row['fold']}"] for name in mates} == {"test"}


@pytest.mark.slow
def test_the_same_again_skips_everything_and_tells_it_as_json(
    bagscope: Command, trained: Path
) -> None:
    before = files_of(trained / "study" / "runs" / "small")
    ran = bagscope(*command(trained, "--json"))
    assert ran.code == 0
    events = [json.loads(line) for line in ran.out.splitlines()]
    ended = [event for event in events if event["event"] == "slide_finished"]
    assert {event["slide_id"] for event in ended} >= {f"fold_r0_f{i}_s0" for i in range(3)}
    assert {event["outcome"] for event in ended} == {"skipped"}
    assert files_of(trained / "study" / "runs" / "small") == before


@pytest.mark.slow
def test_another_recipe_under_the_same_name_is_refused_and_overwrites(
    bagscope: Command, trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "made"))
    refused = bagscope(*command(folder, "--set", "training.epochs=2"))
    assert refused.code == 2
    assert "recipe.training.epochs is 3, asked for 2" in refused.err
    assert members_of(folder) == members_of(trained)
    ran = in_a_process(folder, "--set", "training.epochs=2", "--overwrite")
    assert ran.returncode == 0, ran.stderr
    after, before = members_of(folder), members_of(trained)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after if name.endswith(".json"))


@pytest.mark.slow
def test_one_worker_and_a_second_seed_change_no_bit_of_the_first(
    trained: Path, folder: Path
) -> None:
    tracked = ["--track", "tensorboard"] if find_spec("tensorboard") else []
    ran = in_a_process(folder, "--workers", 1, "--seeds", "0,1", *tracked)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"epoch 2/3, loss .*, validation .*, AUROC .* tiles/s, at most", ran.stderr)
    events = folder / "study" / "runs" / "small" / "tensorboard"
    assert len(list(events.glob("*/events.*"))) == (6 if tracked else 0)
    found, expected = members_of(folder), members_of(trained)
    assert len(found) == 2 * len(expected)
    assert {name: content for name, content in found.items() if "_s0/" in name} == expected
    assert len(predictions_of(folder)) == 2 * len(predictions_of(trained))


def test_a_dry_run_says_what_would_be_and_writes_nothing(bagscope: Command, folder: Path) -> None:
    before = files_of(folder)
    ran = bagscope(*command(folder, "--dry-run"))
    assert ran.code == 0
    assert "3 members" in ran.out
    assert "splits/default.csv would be made" in ran.out
    assert "fold_r0_f2_s0: " in ran.out
    assert "to test on" in ran.out
    told = bagscope(*command(folder, "--dry-run", "--json"))
    assert json.loads(told.out)["recipe"]["training"]["epochs"] == 3
    assert files_of(folder) == before


# --- bad input: one sentence, exit code 2 -------------------------------------------------------


def refused(bagscope: Command, folder: Path, *more: object) -> str:
    ran = bagscope(*command(folder, *more))
    assert ran.code == 2, (ran.code, ran.err)
    assert not (folder / "study" / "runs").exists()
    return ran.err


def test_an_option_that_there_is_not_is_met_with_the_nearest(
    bagscope: Command, folder: Path
) -> None:
    assert "did you mean 'epochs'" in refused(bagscope, folder, "--set", "training.epoch=2")
    err = refused(bagscope, folder, "--set", "aggregator.options.hiden=2")
    assert "did you mean 'hidden'" in err
    assert "abmil" in refused(bagscope, folder, "--set", "aggregator.name=abmill")
    assert "did you mean" in refused(bagscope, folder, "--recipe", "abmli")


@pytest.mark.parametrize(
    "more",
    [
        ["--dry-run"],
        ["--final"],
        ["--name", "other"],
        ["--overwrite"],
        ["--seeds", "0,1"],
        ["--shard", "1/2"],
        ["--split", "other"],
        ["--track", "tensorboard"],
    ],
)
def test_a_sanity_run_refuses_what_it_would_not_heed(
    bagscope: Command, untrained: Path, more: list[str]
) -> None:
    err = refused(bagscope, untrained, "--overfit", 2, *more)
    assert "--overfit trains one model" in err
    assert more[0] in err


def test_a_label_column_that_there_is_not(bagscope: Command, folder: Path) -> None:
    rewritten(folder, lambda rows: [row.update(grade=row.pop("label")) for row in rows])
    assert "no label column 'label'" in refused(bagscope, folder)


def test_missing_labels_are_listed_and_left_out(bagscope: Command, folder: Path) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        rows[3]["label"], rows[5]["label"] = "", "NaN"

    rewritten(folder, change)
    with (folder / "study" / "cohort.csv").open() as handle:
        ids = [row["slide_id"] for row in csv.DictReader(handle)]
    ran = bagscope(*command(folder, "--dry-run"))
    assert ran.code == 0
    assert f"left out, has no label: {ids[3]}, {ids[5]} (2)" in ran.out
    rewritten(folder, lambda rows: [row.update(label="") for row in rows])
    assert "column 'label'" in refused(bagscope, folder)


def test_a_single_class(bagscope: Command, folder: Path) -> None:
    rewritten(folder, lambda rows: [row.update(label="1") for row in rows])
    assert "column 'label': all labels are '1'" in refused(bagscope, folder)


def test_a_class_with_fewer_patients_than_folds(bagscope: Command, folder: Path) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        positive = sorted({row["patient_id"] for row in rows if row["label"] == "1"})
        for row in rows:
            row["label"] = str(int(row["patient_id"] in positive[:2]))

    rewritten(folder, change)
    err = refused(bagscope, folder)
    assert "class '1' has 2 patients (p1, p11)" in err
    assert "folds" in err


def test_labels_that_contradict_each_other_within_a_patient(
    bagscope: Command, folder: Path
) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        rows[0]["label"] = "1"

    rewritten(folder, change)
    err = refused(bagscope, folder, "--set", "bags.per=patient")
    assert "patient p0, column label" in err
    assert "contradict" in err


@pytest.mark.parametrize("cell", ["inf", "high"])
def test_a_number_that_is_none(bagscope: Command, folder: Path, cell: str) -> None:
    rewritten(folder, lambda rows: rows[4].update(label=cell))
    err = refused(bagscope, folder, "--task", "regression")
    with (folder / "study" / "cohort.csv").open() as handle:
        name = list(csv.DictReader(handle))[4]["slide_id"]
    assert f"slide {name}, column label: {cell!r} is not a finite number" in err


def test_survival_without_an_event(bagscope: Command, folder: Path) -> None:
    def change(rows: list[dict[str, str]]) -> None:
        for place, row in enumerate(rows):
            row["days"], row["died"] = str(10 + place // 4), "0"

    rewritten(folder, change)
    options = ["--recipe", str(folder / "small.yaml"), "--features", str(folder / "features")]
    for method in ("kfold", "monte_carlo"):
        (folder / "study" / "study.yaml").write_text(
            STUDY.replace("kfold, folds: 3", "kfold, folds: 3" if method == "kfold" else method)
        )
        ran = bagscope("train", folder / "study", *options, "--time", "days", "--event", "died")
        assert ran.code == 2
        assert "event" in ran.err
        assert not (folder / "study" / "runs").exists()


def slide_of(folder: Path, place: int) -> Path:
    return sorted((folder / "features").glob("*.h5"))[place]


def rewrite_features(path: Path, features: np.ndarray, **header: Any) -> None:
    """Put other features into a file, under the header that it has or another one."""
    record = FeatureStore.open(str(path.parent)).record(path.stem)
    kept = FeatureHeader(
        slide_id=path.stem,
        fields=dict(record.fields),
        encoder=dict(record.encoder),
        weights_sha256=record.weights_sha256,
        coords_l0=None,
        grid=None,
        tile={},
        recorded={},
    )
    path.unlink()
    write_feature_file(path, dataclasses.replace(kept, **header), features)


def test_slides_without_features(bagscope: Command, folder: Path) -> None:
    gone = slide_of(folder, 2)
    gone.unlink()
    err = refused(bagscope, folder)
    assert f"1 of 24 slides have no features ({gone.stem})" in err
    assert "--skip-missing" in err
    ran = bagscope(*command(folder, "--dry-run", "--skip-missing"))
    assert ran.code == 0
    assert f"left out, has no features: {gone.stem} (1)" in ran.out


def test_bags_without_a_tile(bagscope: Command, folder: Path) -> None:
    path = slide_of(folder, 3)
    rewrite_features(path, np.zeros((0, DIMENSION), np.float32))
    err = refused(bagscope, folder)
    assert f"1 of 24 cases have features of no tile ({path.stem})" in err
    ran = bagscope(*command(folder, "--dry-run", "--skip-missing"))
    assert ran.code == 0
    assert f"left out, has no tile: {path.stem} (1)" in ran.out


def test_features_of_several_dimensions_or_encoders(bagscope: Command, folder: Path) -> None:
    path = slide_of(folder, 1)
    rewrite_features(path, np.ones((3, DIMENSION + 3), np.float32))
    err = refused(bagscope, folder)
    assert "mixes encoders" in err
    assert path.name in err
    rewrite_features(path, np.ones((3, DIMENSION), np.float32), encoder={"name": "another"})
    err = refused(bagscope, folder)
    assert "mixes encoders" in err
    assert path.name in err


@pytest.mark.slow
def test_features_that_are_no_numbers_fail_the_members_that_need_them(folder: Path) -> None:
    path = slide_of(folder, 1)
    rewrite_features(path, np.full((2, DIMENSION), np.nan, np.float32))
    ran = in_a_process(folder, "--set", "training.epochs=1")
    assert ran.returncode == 1
    assert f"{path.stem}: 2 of 2 tiles have features that are no finite numbers" in ran.stdout


# --- killed -------------------------------------------------------------------------------------


def states_of(folder: Path) -> list[int]:
    """Return how many epochs the state of each unfinished member holds."""
    runs = folder / "study" / "runs" / "small"
    return [len(torch.load(path, weights_only=True)["history"]) for path in runs.rglob("state.pt")]


def results_of(folder: Path) -> dict[str, bytes]:
    """Return every file of the run but the lines of metrics.csv, which tell seconds."""
    found = files_of(folder / "study" / "runs" / "small")
    return {
        name: b"" if name.endswith("metrics.csv") else content for name, content in found.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_one_step_after_another_it_ends_at_the_same_bits(
    trained: Path, folder: Path
) -> None:
    def killed(step: str) -> None:
        ran = in_a_process(folder, "--workers", 1, kill_at=step)
        assert ran.returncode == -signal.SIGKILL, (step, ran.stderr)

    # While the state of the second epoch is written: the renames are state, metrics, state.
    killed("before-rename:3")
    assert states_of(folder) == [1]
    assert list(folder.rglob("*.tmp")), "it was killed with nothing in hand"
    # Between two epochs.
    killed("state-written:1")
    assert states_of(folder) == [2]
    # Between the weights and the facts that make a member of them.
    killed("weights-written:1")
    assert states_of(folder) == [3]
    (half,) = (folder / "study" / "runs" / "small").rglob("member.safetensors")
    assert not half.with_name("member.json").exists()
    # Between the member and the removal of its state.
    killed("member-written:1")
    assert half.with_name("member.json").exists()
    assert states_of(folder) == [3]
    ran = in_a_process(folder)
    assert ran.returncode == 0, ran.stderr
    assert results_of(folder) == results_of(trained)
    assert leftovers(folder) == []
