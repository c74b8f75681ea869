"""`bagscope train --tasks`, from a file of tasks to the table, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from bagscope.cli.app import app
from bagscope.errors import ConfigError
from bagscope.features.store import FeatureStore
from bagscope.mil.cases import Case, CaseTable
from bagscope.mil.member import load_member
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.continual import TaskSpec, plan_continual, read_tasks, task_table
from bagscope.pipeline.study import open_study
from bagscope.pipeline.train import TrainRequest
from tests.mil.made_bags import made_study

QUICK = (
    "aggregator.options.hidden=8", "aggregator.options.heads=2", "aggregator.options.attention=4",
    "aggregator.options.groups=3", "training.epochs=2", "bags.bags_per_step=4",
)  # fmt: skip


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def settings() -> list[str]:
    return [part for one in QUICK for part in ("--set", one)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("continual")
    study, features = made_study(folder, 48)
    tasks = folder / "tasks.yaml"
    values = {
        "rank": 2,
        "tasks": [
            {"name": "first", "column": "label", "where": {"site": "a"}},
            {"name": "second", "column": "label", "classes": ["1", "0"], "where": {"site": ["b"]}},
        ],
    }
    tasks.write_text(yaml.safe_dump(values), encoding="utf-8")
    truth = folder / "truth"
    truth.mkdir()
    store = FeatureStore.open(str(features))
    for place, slide_id in enumerate(store.slide_ids):
        tiles = np.zeros(store.record(slide_id).shape[0])
        tiles[0] = place % 2
        np.save(truth / f"{slide_id}.npy", tiles)
    return study, features, tasks


def run(made: tuple[Path, Path, Path], *more: str) -> Result:
    study, features, tasks = made
    return invoke(
        "train", str(study), "--recipe", "comel", "--tasks", str(tasks),
        "--features", str(features), *settings(), *more,
    )  # fmt: skip


def refusal(result: Result) -> str:
    assert isinstance(result.exception, ConfigError)
    return str(result.exception)


def members(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("member.*"))
    }


@pytest.mark.slow
def test_tasks_are_learnt_in_order_and_what_is_left_is_told(
    made: tuple[Path, Path, Path],
) -> None:
    study, _, tasks = made
    planned = run(made, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "5 sequences, each by owlora, finetune" in planned.output
    found = run(made, "--annotations", str(tasks.parent / "truth"))
    assert found.exit_code == 0, found.output
    folder = study / "continual" / "comel"
    written = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    assert written["tasks"] == ["first", "second"] and len(written["sequences"]) == 5
    for way in ("owlora", "finetune"):
        for metric in ("accuracy", "tile_auroc"):
            (before, nothing), after = written["ways"][way][metric]["matrix"]
            assert nothing is None and all(0 <= value <= 1 for value in (before, *after))
    assert "adapters (OWLoRA) | " in (folder / "continual.md").read_text(encoding="utf-8")
    # The first task is learnt once; each later one in every way, as a member like any other.
    one = folder / "r0_f0_s0"
    names = {str(path.parent.relative_to(one)) for path in one.rglob("member.json")}
    assert names == {"0_first", "owlora/1_second", "finetune/1_second", "owlora/left_0_first"}
    member = load_member(one / "owlora" / "1_second")
    assert member.recipe.regime.name == "full" and member.targets[0].classes == ("1", "0")
    before, again = members(folder), run(made, "--annotations", str(tasks.parent / "truth"))
    assert again.exit_code == 0 and members(folder) == before
    # A member that is gone comes back the same.
    for name in ("member.json", "member.safetensors"):
        (one / "finetune" / "1_second" / name).unlink()
    assert run(made).exit_code == 0 and members(folder) == before
    # What is left of the first task, out of its bundle, is right as often as the matrix says.
    for task in ("first", "second"):
        model = str(folder / f"{task}.bagscope")
        said = invoke("predict", model, str(study), "--features", str(made[1]), "--members", "all")
        assert said.exit_code == 0, said.output
    out = study / "predictions" / "comel_first" / study.name
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as handle:
        rows = {(row["fold"], row["case_id"]): row for row in csv.DictReader(handle)}
    request = TrainRequest(targets=(), recipe="comel", features=str(made[1]))
    for test in plan_continual(open_study(study), request, tasks).tests.values():
        fold = test.folder.name[4]
        right = [
            (float(rows[fold, one.case_id]["label_p_1"]) > 0.5) == one.targets["label"][0]
            for one in test.cases[0]
        ]
        tested = json.loads((test.folder / "tested.json").read_text(encoding="utf-8"))
        assert np.mean(right) == tested["ways"]["owlora"]["accuracy"][1][0]
    other = run(made, "--set", "training.epochs=3")
    assert other.exit_code == 1 and "--overwrite" in other.output


def test_no_patient_that_is_tested_is_learnt_from_in_any_task(
    made: tuple[Path, Path, Path],
) -> None:
    study, features, tasks = made
    request = TrainRequest(targets=(), recipe="comel", features=str(features))
    planned = plan_continual(open_study(study), request, tasks, dry_run=True)
    for name, sequence in planned.sequences.items():
        learnt = {c.patient_id for one in sequence.tasks for c in (*one.train, *one.inner)}
        tested = {c.patient_id for cases in planned.tests[name].cases for c in cases}
        assert learnt and tested and not learnt & tested


def test_what_does_not_go_with_tasks_is_refused(made: tuple[Path, Path, Path]) -> None:
    for more, said in (
        (("--target", "label"), "--target"),
        (("--final",), "--final"),
        (("--overfit", "4"), "--overfit"),
    ):
        assert said in refusal(run(made, *more))
    study = str(made[0])
    found = invoke("train", study, "--target", "label", "--annotations", study)
    assert "belongs to --tasks" in refusal(found)
    found = run(made, "--set", "regime.name=pseudo_bags")
    assert "do not go together" in refusal(found)
    found = run(made, "--annotations", study)
    assert "no file of any slide" in refusal(found)


def case(place: int, label: float, site: str) -> Case:
    name = f"c{place}"
    return Case(
        case_id=name,
        patient_id=name,
        slide_ids=(name,),
        targets={"kind": (label,)},
        site=site,
        columns={"stain": "he" if place % 2 else "ihc"},
    )


def test_a_task_takes_its_cases_and_its_classes_alone() -> None:
    target = TargetSpec(column="kind", classes=("x", "y", "z"))
    labels = [0.0, 1.0, 2.0, float("nan"), 2.0, 1.0, 0.0, 2.0]
    cases = tuple(case(i, label, "ab"[i % 4 // 2]) for i, label in enumerate(labels))
    table = CaseTable(cases=cases, targets=(target,), per="slide")

    def taken(**options: Any) -> dict[str, float]:
        found = task_table(table, TaskSpec(name="t", column="kind", **options))
        return {one.case_id: one.targets["kind"][0] for one in found.cases}

    assert taken(classes=("z", "x")) == {"c0": 1.0, "c2": 0.0, "c4": 0.0, "c6": 1.0, "c7": 0.0}
    assert taken(where={"site": "a", "stain": ["he", "ihc"]}) == {
        "c0": 0.0, "c1": 1.0, "c4": 2.0, "c5": 1.0,
    }  # fmt: skip
    for options, said in (
        ({"classes": ("x", "w")}, "column kind has no w"),
        ({"where": {"site": "c"}}, "no case has c in column site"),
        ({"classes": ("x", "z"), "where": {"site": "a", "stain": "he"}}, "fewer than two"),
    ):
        with pytest.raises(ConfigError, match=said):
            taken(**options)


def test_a_file_of_tasks_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    for tasks, said in (
        ([{"name": "a", "column": "x"}], "at least two tasks"),
        ([{"name": "a", "column": "x"}, {"name": "b", "columm": "y"}], "task 2.*did you mean"),
        ([{"name": "a", "column": "x"}, {"name": "b/", "column": "y"}], "choose another"),
        (
            [{"name": "a", "column": "x"}, {"name": "b", "column": "y", "classes": ["z"]}],
            "has one class",
        ),
    ):
        path.write_text(yaml.safe_dump({"tasks": tasks}), encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            read_tasks(path)
