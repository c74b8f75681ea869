"""Rollout of a trained slide transformer: in its score files, on heatmaps, in explanations."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from bagscope.errors import ConfigError
from bagscope.mil.explain.members import member_bags
from bagscope.mil.explain.rollout import tile_rollout
from bagscope.mil.member import load_member
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.score_file import read_score_file
from bagscope.pipeline import explain_worker
from bagscope.pipeline.explain import ExplainRequest, plan_explanations
from bagscope.pipeline.explain_options import ExplainOptions
from bagscope.pipeline.explain_worker import explain_task
from bagscope.pipeline.heatmap import HeatmapRequest, plan_heatmaps
from bagscope.pipeline.heatmap_worker import heatmap_task
from tests.pipeline.explainable import explainable_run, features_of

ROWS = {"a": 12, "b": 9, "c": 14}
ONLY = ExplainOptions(methods=("rollout",))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = TrainSpec.model_validate(
        {
            "aggregator": {"name": "vit", "options": {"hidden": 8, "heads": 2, "attention": 4}},
            "training": {"epochs": 1, "patience": None, "min_epochs": 0},
        }
    )
    patients = (("a", "c"), ("b",))
    return explainable_run(
        tmp_path_factory.mktemp("study"), ROWS, patients=patients, recipe=recipe, seeds=2
    )


def by_hand(run: Path) -> np.ndarray:
    """Return the mean over the members, times the tiles of the patient's bag."""
    found = []
    for name in ("f0s0", "f0s1"):
        member = load_member(run / name)
        each = tile_rollout(member.model(), member_bags(member, features_of(run, "a", "c"), (0,)))
        assert each is not None and each.sum() == pytest.approx(1, abs=1e-5)
        found.append(each)
    mean: np.ndarray = np.mean(found, axis=0) * (ROWS["a"] + ROWS["c"])
    return mean


def test_a_heatmap_shows_what_the_members_say(run: Path) -> None:
    files = [read_score_file(run / "scores" / f"{name}.h5") for name in "ac"]
    stored = np.concatenate([file.rollout for file in files if file.rollout is not None])
    np.testing.assert_allclose(stored, by_hand(run), rtol=1e-5)
    request = HeatmapRequest(place=run, slides=("c",), scale="rollout", formats=("csv", "geojson"))
    planned = plan_heatmaps(request)
    assert (planned.drawn, planned.colours.logarithmic) == ("rollout", True)
    assert planned.colours.title == "Attention through all layers relative to uniform"
    (task,) = planned.tasks.values()
    heatmap_task(task)
    with (task.target / "tiles.csv").open(newline="") as handle:
        drawn = [float(row["rollout"]) for row in csv.DictReader(handle)]
    np.testing.assert_allclose(drawn, stored[ROWS["a"] :], rtol=1e-5)
    # It orders the tiles in a way of its own, which nobody has judged.
    told = json.loads((task.target / "complete.json").read_text())["fields"]["faithfulness"]
    assert told["score"] is None


def test_disagreement_of_it_is_not_known(run: Path) -> None:
    with pytest.raises(ConfigError, match="of rollout the score files hold the members' mean"):
        plan_heatmaps(HeatmapRequest(place=run, scale="rollout", shows="disagreement"))


def test_a_slide_is_explained_with_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_worker, "draw", lambda shown: None)
    request = ExplainRequest(place=run, slides=("a",), options=ONLY)
    (task,) = plan_explanations(request).tasks.values()
    assert explain_task(task).outcome == "done"
    tables = []
    for name in "ac":
        with (task.folder / f"{name}.tiles.csv").open(newline="") as handle:
            tables += [float(row["rollout"]) for row in csv.DictReader(handle)]
    np.testing.assert_allclose(tables, by_hand(run), rtol=1e-5)


def test_of_a_model_without_layers_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain_worker, "draw", lambda shown: None)
    run = explainable_run(tmp_path / "study", {"a": 5, "b": 4})
    (task,) = plan_explanations(
        ExplainRequest(place=run, slides=("a",), options=ONLY)
    ).tasks.values()
    explain_task(task)
    record = json.loads((task.folder / "explanation.json").read_text())
    (sentence,) = record["left_out"]
    assert sentence.startswith("rollout: this model has no layers of attention")
    with pytest.raises(ConfigError, match="states no rollout in its score files"):
        plan_heatmaps(HeatmapRequest(place=run, scale="rollout"))
