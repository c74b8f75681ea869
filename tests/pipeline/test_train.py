"""Which members a run tests, gathers and bundles; members are trained in this process."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bagscope.cohort.executors import worker
from bagscope.cohort.jobs import Failure, Job, RunOptions, RunReport, select_shard
from bagscope.cohort.progress import SilentReporter
from bagscope.errors import BagscopeError, ConfigError, FingerprintMismatch
from bagscope.mil.inference import Inferred
from bagscope.mil.member import Member
from bagscope.mil.sources import BagSource
from bagscope.mil.splits.plan import SplitSpec
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline import bundle, train, train_worker
from bagscope.pipeline.finished_run import read_run
from bagscope.pipeline.run_folder import alone_at_the_end
from bagscope.pipeline.study import RunSpec, Study, available_cores, open_study
from bagscope.pipeline.train import (
    TrainRequest,
    TrainResult,
    plan_training,
    train_run,
    worker_count,
)
from tests.cli.conftest import files_of
from tests.mil.made_bags import made_study

SMALL: dict[str, dict[str, Any]] = {
    "aggregator": {"options": {"hidden": 8, "attention": 4}},
    "bags": {"bags_per_step": 4},
    "training": {"epochs": 1, "patience": None, "min_epochs": 0},
}
LONGER = {**SMALL, "training": {**SMALL["training"], "epochs": 2}}
FOLDS = 3


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cohorts be worked through here, one job after the other."""

    def run_cohort(
        jobs: Sequence[Job], work: Any, *, stage: str, options: RunOptions, **rest: object
    ) -> RunReport:
        (rest["status_dir"] / stage).mkdir(parents=True, exist_ok=True)  # type: ignore[operator]
        counts = {"done": 0, "skipped": 0, "failed": 0}
        failures = []
        for job in select_shard(jobs, options.shard):
            try:
                counts[work(job).outcome] += 1
            except BagscopeError as error:
                counts["failed"] += 1
                failures.append(
                    Failure(
                        slide_id=job.slide_id, error_class=type(error).__name__, message=str(error)
                    )
                )
        total = sum(counts.values())
        return RunReport(stage=stage, total=total, counts=counts, failures=tuple(failures))  # type: ignore[arg-type]

    monkeypatch.setattr(train, "run_cohort", run_cohort)
    monkeypatch.setattr(bundle, "run_cohort", run_cohort)
    monkeypatch.setattr(worker, "tell", lambda message: None)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    made_study(folder)
    return folder


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untrained, tmp_path / "made"))


def opened(folder: Path, folds: int = FOLDS) -> Study:
    study = open_study(folder / "study")
    splits = SplitSpec.model_validate({"method": "kfold", "folds": folds})
    return dataclasses.replace(study, spec=study.spec.model_copy(update={"splits": splits}))


def trained(folder: Path, *, folds: int = FOLDS, **options: Any) -> TrainResult:
    asked = {"targets": (TargetSpec(column="label"),), "settings": SMALL, **options}
    request = TrainRequest(features=str(folder / "features"), **asked)
    return train_run(opened(folder, folds), request, SilentReporter())


def members_in(place: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(place.rglob("member.json"))]


def change_a_label(folder: Path) -> None:
    """Turn the label of one patient."""
    path = folder / "study" / "cohort.csv"
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    patient = rows[0]["patient_id"]
    for row in rows:
        if row["patient_id"] == patient:
            row["label"] = "1" if row["label"] == "0" else "0"
    write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_members_of_other_labels_are_neither_tested_nor_gathered(folder: Path) -> None:
    first = trained(folder)
    assert (first.exit_code, first.is_complete) == (0, True)
    before = files_of(first.folder)
    change_a_label(folder)
    again = trained(folder)
    # The fold that tests the patient never saw the label, and is as it should be.
    assert [failure.error_class for failure in again.trained.failures] == [
        "FingerprintMismatch"
    ] * (FOLDS - 1)
    assert again.tested is not None
    assert again.tested.total == 1
    assert (again.exit_code, again.is_complete, again.bundle) == (1, False, None)
    after = files_of(first.folder)
    changed = {name for name in after if after[name] != before[name]}
    assert all(name.startswith("fold_") for name in changed)


def test_shards_that_train_anew_leave_no_run_of_mixed_members(folder: Path) -> None:
    whole = trained(folder)
    half = trained(folder, settings=LONGER, overwrite=True, shard=(1, 2))
    assert half.exit_code == 0
    assert sorted({facts["epochs"] for facts in members_in(whole.folder)}) == [1, 2]
    assert (half.is_complete, half.bundle) == (False, None)
    assert re.search(r"[12] of 3 members are trained as asked", half.notes[-1])
    assert not (whole.folder / "predictions.csv").exists()
    rest = trained(folder, settings=LONGER, overwrite=True, shard=(2, 2))
    assert (rest.exit_code, rest.is_complete) == (0, True)
    assert rest.bundle is not None
    assert [facts["epochs"] for facts in members_in(rest.bundle)] == [2] * FOLDS
    assert read_run(rest.folder).seeds == (0,)


def test_shards_in_turn_come_to_the_run_of_one_process(folder: Path, tmp_path: Path) -> None:
    whole = trained(Path(shutil.copytree(folder, tmp_path / "whole")))
    first, last = (trained(folder, shard=(number, 2)) for number in (1, 2))
    assert (first.exit_code, first.is_complete) == (0, False)
    assert (last.exit_code, last.is_complete) == (0, True)

    def kept(run: Path) -> dict[str, bytes]:
        # The lines of metrics.csv tell seconds.
        return {name: one for name, one in files_of(run).items() if "metrics.csv" not in name}

    assert kept(last.folder) == kept(whole.folder)


def test_one_process_at_a_time_ends_a_run(folder: Path) -> None:
    study = opened(folder)
    request = TrainRequest(targets=(TargetSpec(column="label"),), features=str(folder / "features"))
    planned = plan_training(study, request)
    (study.status_folder / "test" / "abmil").mkdir(parents=True)
    is_in = threading.Event()

    def end() -> None:
        with alone_at_the_end(study, planned, RunOptions()):
            is_in.set()

    other = threading.Thread(target=end)
    with alone_at_the_end(study, planned, RunOptions()):
        other.start()
        assert not is_in.wait(0.3)
    other.join(10)
    assert is_in.is_set()


def test_a_member_of_another_recipe_is_not_judged(folder: Path) -> None:
    # As they are written for a fold; the recipe makes a float of the rate.
    tuned = {"r0_f0": {"training": {"epochs": 2}, "optimiser": {"lr": 1}}}
    run = trained(folder, tuned=tuned).folder
    assert [facts.epochs for facts in read_run(run).members] == [2, 1, 1]
    path = run / "fold_r0_f1_s0" / "member.json"
    facts = json.loads(path.read_text())
    facts["recipe"]["training"]["epochs"] = 7
    path.write_text(json.dumps(facts))
    with pytest.raises(FingerprintMismatch, match=r"f1_s0 .*epochs is 7, asked for 1.*--overwrite"):
        read_run(run)


def test_members_of_survival_with_bins_of_their_own_can_be_judged(folder: Path) -> None:
    path = folder / "study" / "cohort.csv"
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        number = int(row["patient_id"][1:])
        row["days"], row["died"] = str(10 + 7 * number), str(int(number % 3 > 0))
    write_rows(path, rows)
    target = TargetSpec.model_validate({"task": "survival", "time": "days", "event": "died"})
    settings = {**SMALL, "objective": {"bins": 2}}
    run = trained(folder, targets=(target,), settings=settings).folder
    heads = {one.read_text().partition("\n")[0] for one in run.glob("fold_*/predictions.csv")}
    assert len(heads) > 1
    found = read_run(run)
    assert len(found.answers(found.target()).case) == len(rows)


WITHOUT_COORDINATES = (
    r"goes by distances in micrometres, and of .* \(24 of 24 cases\) there are no coordinates"
)


def test_tiles_without_the_places_that_a_model_goes_by_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=WITHOUT_COORDINATES):
        trained(folder, recipe="vit_alibi", settings={})
    assert not (folder / "study" / "runs").exists()


def test_a_seed_twice_is_refused_before_anything_is_written(folder: Path) -> None:
    before = files_of(folder)
    with pytest.raises(ConfigError, match=r"seeds are 0, 1, 0; give each once"):
        trained(folder, seeds=(0, 1, 0))
    assert files_of(folder) == before


def test_nothing_of_a_run_outlives_its_configuration(folder: Path) -> None:
    run = trained(folder, final=True).folder
    for name in ("metrics.json", "report.html", "figures/roc.svg", "scores/gone.h5", "notes.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("of before")
    fewer = trained(folder, folds=2, split="two", settings=LONGER, overwrite=True)
    assert (fewer.exit_code, fewer.is_complete) == (0, True)
    names = {path.name for path in run.iterdir()}
    assert {name for name in names if name.startswith("fold_")} == {
        "fold_r0_f0_s0",
        "fold_r0_f1_s0",
    }
    assert not names & {"metrics.json", "report.html", "figures", "final"}
    assert not (run / "scores" / "gone.h5").exists()
    # What is not ours stays.
    assert (run / "notes.txt").read_text() == "of before"
    assert [facts["epochs"] for facts in members_in(run / "model.bagscope")] == [2, 2]


def test_members_are_dealt_to_the_gpus_with_a_worker_for_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices(name: str) -> list[str]:
        request = TrainRequest(
            targets=(TargetSpec(column="label"),), features=str(folder / "features"), device=name
        )
        planned = plan_training(opened(folder), request)
        own = [task.device for task in planned.members.values()]
        assert [task.device for task in planned.tests.values()] == own
        return own

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices("cuda") == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices("cuda:1") == ["cuda:1"] * FOLDS
    assert devices("cpu") == ["cpu"] * FOLDS
    by_itself, asked = RunSpec(), RunSpec(workers=5)
    assert [worker_count(by_itself, name) for name in ("cuda", "cuda:1")] == [2, 1]
    assert worker_count(by_itself, "cpu") == available_cores()
    assert worker_count(asked, "cuda") == 5
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices("cuda") == ["cuda"] * FOLDS
    assert worker_count(by_itself, "cuda") == 1


@pytest.mark.slow
def test_a_final_model_repeats_what_plateau_left_the_members(folder: Path) -> None:
    settings = {
        **SMALL,
        "optimiser": {"schedule": "plateau", "plateau_patience": 1, "lr": 0.5},
        "training": {**SMALL["training"], "epochs": 6, "checkpoint": "last"},
    }
    run = trained(folder, settings=settings, final=True).folder
    rates = {
        path.parent.name: [
            float(row["lr"]) for row in csv.DictReader(path.read_text().splitlines())
        ]
        for path in run.glob("*/metrics.csv")
    }
    final = rates.pop("final")
    assert min(map(min, rates.values())) < 0.5
    assert final == [sorted(of_epoch)[1] for of_epoch in zip(*rates.values(), strict=True)]


def test_reading_is_a_sign_of_life_that_is_no_news(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[bytes] = []
    monkeypatch.setattr(worker, "tell", heard.append)
    monkeypatch.setattr(train_worker, "_SIGN_OF_LIFE_S", -1.0)
    run = trained(folder).folder
    news = [message for message in heard if message]
    assert len(news) == FOLDS  # an epoch of each
    assert len(heard) > 5 * FOLDS
    listen = train._listener("train/abmil", SilentReporter())
    for message in heard:
        listen("member", message)
    facts = json.loads((run / "fold_r0_f0_s0" / "member.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_fold_is_predicted_again_only_where_something_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(folder).folder
    before = files_of(run)
    asked: list[int] = []
    infer = Member.infer

    def counted(member: Member, source: BagSource, device: str = "cpu") -> Inferred:
        asked.append(len(source.cases))
        return infer(member, source, device)

    monkeypatch.setattr(Member, "infer", counted)
    again = trained(folder)
    assert again.tested is not None
    assert (asked, again.tested.counts["skipped"]) == ([], FOLDS)
    tables = [run / f"fold_r0_f{fold}_s0" / "predictions.csv" for fold in range(FOLDS)]
    tables[0].write_text(tables[0].read_text().replace("c", "d"))
    tables[1].unlink()
    assert trained(folder).is_complete
    assert len(asked) == 2
    assert files_of(run) == before
    # Labels of the fold itself: its member never saw them, its table states them.
    change_a_label(folder)
    relabelled = trained(folder)
    assert relabelled.tested is not None
    assert relabelled.tested.counts["done"] == 1
    assert len(asked) == 3
    (changed,) = [
        name
        for name, one in files_of(run).items()
        if one != before[name] and name.endswith("predictions.csv")
    ]
    assert changed.startswith("fold_")
