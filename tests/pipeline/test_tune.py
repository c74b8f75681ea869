from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bagscope import artifacts
from bagscope.cohort.progress import SilentReporter
from bagscope.errors import ConfigError, FingerprintMismatch
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.objectives.spec import EntropySpec, ObjectiveSpec
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.study import open_study
from bagscope.pipeline.train import TrainRequest
from bagscope.pipeline.tune import (
    OTHER_SCALES,
    TuneRequest,
    TuneTask,
    nested,
    plan_tuning,
    read_chosen,
    read_space,
    tune_run,
)
from tests.mil.made_bags import made_study

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

RECIPE = """
aggregator: {name: abmil, options: {hidden: 8, attention: 4}}
bags: {bags_per_step: 8}
training: {epochs: 2, patience: null, min_epochs: 0}
"""
SPACE = """
optimiser.lr: {low: 1.0e-4, high: 1.0e-1, log: true}
aggregator.options.hidden: {choices: [4, 8]}
bags.sample_tiles: {low: 3, high: 6}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    study, _ = made_study(tmp_path)
    (study / "study.yaml").write_text("splits: {method: kfold, folds: 2}\n")
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def request_of(folder: Path, **options: Any) -> TuneRequest:
    train = TrainRequest(
        targets=(TargetSpec(column="label"),),
        recipe=str(folder / "small.yaml"),
        features=str(folder / "features"),
        name="tuned",
    )
    return TuneRequest(
        train=train, **{"space": folder / "space.yaml", "trials": 3, "inner_folds": 2, **options}
    )


def tasks_of(folder: Path, **options: Any) -> dict[str, TuneTask]:
    _, tasks = plan_tuning(open_study(folder / "study"), request_of(folder, **options))
    return {name: dataclasses.replace(task, threads=1) for name, task in tasks.items()}


def chosen_by(task: TuneTask) -> dict[str, Any]:
    from bagscope.pipeline.tune_worker import tune_task

    tune_task(task, lambda facts: None)
    return dict(artifacts.read_json(task.folder / f"{task.split}.json"))


def test_no_test_case_is_in_a_search(folder: Path) -> None:
    planned, tasks = plan_tuning(open_study(folder / "study"), request_of(folder))
    assert len(tasks) == 2
    for name, task in tasks.items():
        tested = {case.patient_id for case in planned.tests[f"{name}_s0"].cases}
        assert tested
        assert not tested & {case.patient_id for case in task.cases}


def test_labels_of_the_test_fold_have_no_say(folder: Path, tmp_path: Path) -> None:
    name, task = next(iter(tasks_of(folder).items()))
    chosen = chosen_by(task)
    mine = {case.case_id for case in task.cases}
    table = folder / "study" / "cohort.csv"
    with table.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        if row["slide_id"] not in mine:
            row["label"] = str(1 - int(row["label"]))
    with table.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    again = dataclasses.replace(tasks_of(folder)[name], folder=tmp_path / "again")
    assert chosen_by(again) == chosen
    # The same change inside the training part is seen.
    for row in rows:
        if row["patient_id"] == task.cases[0].patient_id:
            row["label"] = str(1 - int(row["label"]))
    with table.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    other = dataclasses.replace(tasks_of(folder)[name], folder=tmp_path / "other")
    assert chosen_by(other)["trials"] != chosen["trials"]


def test_inner_folds_part_patients_and_score_each_once(folder: Path) -> None:
    from bagscope.pipeline.tune_worker import inner_folds

    task = next(iter(tasks_of(folder, inner_folds=3).values()))
    scored: list[str] = []
    for learnt, held in inner_folds(task):
        assert not {c.patient_id for c in learnt} & {c.patient_id for c in held}
        assert len(learnt) + len(held) == len(task.cases)
        assert {c.targets["label"] for c in held} == {(0.0,), (1.0,)}
        scored += [case.case_id for case in held]
    assert sorted(scored) == sorted(case.case_id for case in task.cases)


def test_the_best_of_what_was_tried_is_chosen_and_a_killed_search_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    from bagscope.pipeline.tune_worker import tune_task

    task = next(iter(tasks_of(folder).values()))
    whole = chosen_by(task)
    losses = [trial["loss"] for trial in whole["trials"]]
    assert len(losses) == 3
    assert whole["loss"] == min(losses)
    assert whole["options"] == whole["trials"][int(np.argmin(losses))]["options"]
    for trial in whole["trials"]:
        options = trial["options"]
        assert 1e-4 <= options["optimiser.lr"] <= 1e-1
        assert options["aggregator.options.hidden"] in (4, 8)
        assert options["bags.sample_tiles"] in (3, 4, 5, 6)
    assert read_chosen(task) == nested(whole["options"])

    class Killed(BaseException):
        pass

    def kill(facts: dict[str, Any]) -> None:
        if facts.get("trial") == 2:
            raise Killed

    elsewhere = dataclasses.replace(task, folder=tmp_path / "elsewhere")
    with pytest.raises(Killed):
        tune_task(elsewhere, kill)
    assert not (elsewhere.folder / f"{task.split}.json").exists()
    told: list[dict[str, Any]] = []
    tune_task(elsewhere, told.append)
    # Two epochs on each of two inner folds, each a sign of life.
    assert [facts.get("trial") for facts in told] == [None] * 4 + [3]
    assert json.loads((elsewhere.folder / f"{task.split}.json").read_text()) == whole
    # Chosen already, and of another search refused.
    assert tune_task(task, lambda facts: None).outcome == "skipped"
    with pytest.raises(FingerprintMismatch, match="trials is 3, asked for 4"):
        tune_task(dataclasses.replace(task, trials=4), lambda facts: None)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("optimiser.lrr: {low: 1, high: 2}", "did you mean 'lr'"),
        ("aggregator.options.hiden: {choices: [4]}", "did you mean 'hidden'"),
        ("optimiser.lr: {low: 2, high: 1}", "low below high"),
        ("optimiser.lr: {low: 0, high: 1, log: true}", "begins above 0"),
        ("optimiser.lr: {low: -1.0, high: 1}", "optimiser.lr is -1.0"),
        ("optimiser.lr: {choices: [1], low: 1}", "choices stand alone"),
        ("optimiser.lr: 3", "a line per option"),
        ("optimiser.lr: {lo: 3}", "did you mean 'low'"),
        *(
            (f"objective.{name}: {{choices: [1, 2]}}", f"objective.{name} changes what")
            for name in OTHER_SCALES
        ),
        ("objective: {choices: [{bins: 2}, {bins: 9}]}", "objective changes what"),
    ],
)
def test_a_space_that_does_not_fit_is_refused(folder: Path, space: str, says: str) -> None:
    (folder / "space.yaml").write_text(space)
    with pytest.raises(ConfigError) as raised:
        tasks_of(folder)
    assert says in str(raised.value)


SAME_SCALE: dict[str, Any] = {
    "label_smoothing": 0.2,
    "focal_gamma": 2.0,
    "terms": {"instance": 3.0},
    "entropy": EntropySpec(weight=0.5),
    "ordinal": "corn",
}


REGIME = """
aggregator: {options: {hidden: 8, attention: 4}}
bags: {bags_per_step: 4}
regime: {name: packmil, options: {share: 0.5}}
training: {epochs: 1, patience: null, min_epochs: 0}
"""


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("regime.options.shar: {choices: [0.5]}", "search space: regime packmil: unknown option"),
        ("regime.options.share: {low: 0.5, high: 1.5}", "share is 1.5"),
        ("bags.bags_per_step: {choices: [1, 4]}", "packs the bags of a step"),
    ],
)
def test_a_space_that_the_regime_does_not_take_is_refused(
    folder: Path, space: str, says: str
) -> None:
    (folder / "small.yaml").write_text(REGIME)
    (folder / "space.yaml").write_text(space)
    with pytest.raises(ConfigError) as raised:
        tasks_of(folder)
    assert says in str(raised.value)


def test_options_of_a_regime_are_searched(folder: Path) -> None:
    (folder / "small.yaml").write_text(REGIME)
    (folder / "space.yaml").write_text("regime.options.share: {choices: [0.25, 0.75]}")
    (task, *_) = tasks_of(folder).values()
    assert chosen_by(task)["options"]["regime.options.share"] in (0.25, 0.75)


def test_what_may_be_searched_of_the_objective_leaves_the_loss_s_scale() -> None:
    assert {*SAME_SCALE, *OTHER_SCALES} == set(ObjectiveSpec.model_fields)
    target = TargetSpec(column="y", classes=("a", "b"))
    labels = np.array([[0.0], [1.0], [1.0], [0.0]])
    logits = torch.tensor([[1.0, 2.0], [0.0, 3.0], [2.0, 0.5], [0.1, 0.2]])

    def loss(**options: Any) -> float:
        objective = build_objective([target], ObjectiveSpec(**options)).fit({"y": labels})
        return objective.validation_loss(logits, {"y": torch.from_numpy(labels)})

    for name, value in SAME_SCALE.items():
        assert loss(**{name: value}) == loss()
    assert loss(class_weights=(1.0, 5.0)) != loss()


def test_a_plain_run_of_that_name_is_refused_before_the_search(folder: Path) -> None:
    study, request = open_study(folder / "study"), request_of(folder)
    planned, _ = plan_tuning(study, request)
    planned.folder.mkdir(parents=True)
    (planned.folder / "config.yaml").write_text(yaml.safe_dump(planned.config))
    with pytest.raises(FingerprintMismatch, match="not tuned; choose another --name"):
        tune_run(study, request, SilentReporter())
    assert not (planned.folder / "tuning").exists()


def test_the_default_space_is_what_the_aggregator_has(folder: Path) -> None:
    (task, *_) = tasks_of(folder, space=None).values()
    assert set(task.space) == set(read_space(None))
    (folder / "small.yaml").write_text("aggregator: {name: mean}\n")
    (task, *_) = tasks_of(folder, space=None).values()
    assert {"optimiser.lr", "optimiser.weight_decay"} <= set(task.space)
    # It has a width of a projection, but here no projection.
    (folder / "small.yaml").write_text("aggregator: {name: abmil, options: {projection: false}}\n")
    (task, *_) = tasks_of(folder, space=None).values()
    assert set(task.space) == {"optimiser.lr", "optimiser.weight_decay"}


def test_without_optuna_it_says_how_to_get_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'bagscope\[tune\]'"):
        tasks_of(folder)
