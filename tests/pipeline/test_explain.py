"""Explaining cases in this process: against deletion by hand in float64, and what is refused."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from scipy import special

from bagscope import artifacts
from bagscope.errors import ArtifactError, ConfigError, FingerprintMismatch, SlideError
from bagscope.mil.bags import Bags
from bagscope.mil.member import load_member
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.score_file import read_score_file, write_score_file
from bagscope.pipeline import explain_worker
from bagscope.pipeline.explain import ExplainRequest, ExplainTask, plan_explanations
from bagscope.pipeline.explain_figure import Shown
from bagscope.pipeline.explain_figure import draw as draw_picture
from bagscope.pipeline.explain_options import ExplainOptions
from bagscope.pipeline.explain_summary import summarise
from bagscope.pipeline.explain_worker import explain_task
from bagscope.wsi.geojson import read_regions, write_regions
from bagscope.wsi.outline import Polygon, Region
from bagscope.wsi.slide import RectL0
from tests.pipeline.explainable import LEFT_L0, ROWS, TILE_L0, TOP_L0, explainable_run, features_of

BOUNDS = RectL0(x_l0=LEFT_L0, y_l0=TOP_L0, width_l0=7 * TILE_L0, height_l0=7 * TILE_L0)
FEW = ExplainOptions(controls=3, shares=(0.1,), dose_share=0.1, rounds=3)


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explainable_run(tmp_path_factory.mktemp("study"), seeds=2)


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """Return what is drawn, which is then not done: it costs more than all the rest."""
    seen: list[Shown] = []

    def listen(shown: Shown) -> bytes | None:
        seen.append(shown)
        return b"a picture" if shown.doses else None

    monkeypatch.setattr(explain_worker, "draw", listen)
    return seen


@pytest.fixture
def run(run_once: Path, tmp_path: Path) -> Path:
    """Return a run of a study that may be changed."""
    shutil.copytree(run_once.parents[1], tmp_path / "study")
    return tmp_path / "study" / "runs" / "made"


def task_of(run: Path, slide_id: str, options: ExplainOptions = FEW, **how: Any) -> ExplainTask:
    request = ExplainRequest(place=run, slides=(slide_id,), options=options, **how)
    (task,) = plan_explanations(request).tasks.values()
    return task


def explained(run: Path, slide_id: str, options: ExplainOptions = FEW, **how: Any) -> Path:
    task = task_of(run, slide_id, options, **how)
    assert explain_task(task).outcome == "done"
    return task.folder


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def record_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "explanation.json").read_text())
    return found


def by_hand(run: Path, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Return the mean probabilities that members give to a bag of these rows, in float64."""
    answers = []
    for name in names:
        member = load_member(run / name)
        model = copy.deepcopy(member.model()).double()
        with torch.no_grad():
            logits = model(Bags.of([torch.from_numpy(rows.astype(np.float64))])).logits.numpy()
        answers.append(special.softmax(logits / member.temperatures.get("label", 1.0), axis=1)[0])
    found: np.ndarray = np.mean(answers, axis=0)
    return found


def region(left: int, top: int, width: int, height: int, class_name: str = "Tumor") -> Region:
    """Return a rectangle in tiles of the made slides."""
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    exterior = (corners + np.array([left, top])) * TILE_L0 + np.array([LEFT_L0, TOP_L0])
    return Region(class_name=class_name, polygons=(Polygon(exterior_l0=exterior),))


def draw(folder: Path, slide_id: str, *regions: Region) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{slide_id}.geojson"
    write_regions(path, regions, bounds_l0=BOUNDS, slide_name=slide_id)
    return path


# --- numbers --------------------------------------------------------------------------------


def test_effects_are_those_of_deletion_by_hand(run: Path, tmp_path: Path) -> None:
    marked = draw(tmp_path / "drawn", "c", region(2, 1, 2, 2))
    folder = explained(run, "c", annotations=marked)
    features = features_of(run, "c").read(0).features.astype(np.float64)
    file = read_score_file(run / "scores" / "c.h5")
    hottest = np.argsort(-file.scores[:, 0].astype(np.float64), kind="stable")[:4]
    every = np.arange(ROWS["c"])
    inside = np.array([9, 10, 16, 17])
    wanted = {
        "remove hottest 10 %": np.setdiff1d(every, hottest),
        "keep only hottest 10 %": hottest,
        "hottest 10 % × 0": np.setdiff1d(every, hottest),
        "hottest 10 % × 1": every,
        "hottest 10 % × 4": np.concatenate([every, *[hottest] * 3]),
        "remove annotated tiles": np.setdiff1d(every, inside),
        "keep only annotated tiles": inside,
        "annotated tiles × 8": np.concatenate([every, *[inside] * 7]),
    }
    # Of slides a, c, e, fold 0 is the test fold: its two members answer, the others never.
    members = ("f0s0", "f0s1")
    rows = {row["intervention"]: row for row in read_table(folder / "effects.csv")}
    assert set(wanted) < set(rows)
    for name, kept in wanted.items():
        found = [float(rows[name][f"after_{column}"]) for column in ("no", "yes")]
        np.testing.assert_allclose(found, by_hand(run, members, features[kept]), atol=1e-9)
        assert int(rows[name]["tiles_after"]) == len(kept)
    before = float(rows["remove hottest 10 %"]["before_yes"])
    assert before == pytest.approx(by_hand(run, members, features)[1], abs=1e-9)
    record = record_in(folder)
    assert record["model"]["members"] == list(members)
    assert record["model"]["out_of_fold"]
    assert record["prediction"]["yes"] == pytest.approx(before)
    assert record["annotations"]["c"]["tiles_inside"] == 4


def test_each_tile_has_what_it_does_to_the_prediction(run: Path) -> None:
    options = dataclasses.replace(FEW, class_name="yes")
    folder = explained(run, "b", options)
    features = features_of(run, "b").read(0).features.astype(np.float64)
    members = ("f1s0", "f1s1")
    whole = by_hand(run, members, features)[1]
    alone = [
        whole - by_hand(run, members, np.delete(features, place, axis=0))[1]
        for place in range(len(features))
    ]
    rows = read_table(folder / "tiles.csv")
    found = np.array([float(row["leave_one_out"]) for row in rows])
    np.testing.assert_allclose(found, alone, atol=1e-8)
    assert [int(row["tile"]) for row in rows] == list(range(ROWS["b"]))
    assert int(rows[8]["x_l0"]) == LEFT_L0 + TILE_L0
    # Integrated gradients add up to what separates the bag from one of mean training tiles.
    record = record_in(folder)
    reached = []
    for name in members:
        member = load_member(run / name)
        bags = [features, np.tile(member.statistics.mean, (len(features), 1))]
        with torch.no_grad():
            logits = member.model()(Bags.of([torch.from_numpy(bag).float() for bag in bags]))
        odds = logits.logits[:, 1] - logits.logits[:, 0]
        reached.append(float(odds[0] - odds[1]))
    total = sum(float(row["integrated_gradients"]) for row in rows)
    assert record["gradients"]["reached"] == pytest.approx(np.mean(reached), abs=1e-5)
    assert total == pytest.approx(np.mean(reached), abs=0.02 * (1 + abs(np.mean(reached))))


def test_a_search_takes_out_what_hurts_most(run: Path) -> None:
    folder = explained(run, "d")
    features = features_of(run, "d").read(0).features.astype(np.float64)
    record = record_in(folder)
    column = ("no", "yes").index(record["explained"])
    rows = [row for row in read_table(folder / "search.csv") if row["search"] == "high effect"]
    remaining = list(range(ROWS["d"]))
    for row in rows[1:]:
        asked = {
            place: by_hand(run, ("f1s0", "f1s1"), features[[r for r in remaining if r != place]])
            for place in remaining
        }
        lowest = min(remaining, key=lambda place: asked[place][column])
        assert int(row["tile_row"]) == lowest
        assert float(row[record["explained"]]) == pytest.approx(asked[lowest][column], abs=1e-9)
        remaining.remove(lowest)
    regions = read_regions(folder / "regions.geojson", bounds_l0=BOUNDS)
    tiles = sum(r.measurements["tiles"] for r in regions if r.class_name == "High effect")
    assert tiles == len(rows) - 1 == 3


def test_a_donor_s_tiles_are_put_in(run: Path, tmp_path: Path) -> None:
    place = draw(tmp_path / "drawn", "b", region(0, 0, 3, 1))
    folder = explained(run, "d", donor="b", donor_region=place)
    own, donor = (features_of(run, one).read(0).features.astype(np.float64) for one in "db")
    scores = read_score_file(run / "scores" / "d.h5").scores[:, 0].astype(np.float64)
    hottest = np.argsort(-scores, kind="stable")[:3]
    rows = {row["intervention"]: row for row in read_table(folder / "effects.csv")}
    for name, kept in (
        ("add the region of b", own),
        ("replace as many hottest by the region of b", np.delete(own, hottest, axis=0)),
    ):
        wanted = by_hand(run, ("f1s0", "f1s1"), np.concatenate([kept, donor[:3]]))
        assert float(rows[name]["after_yes"]) == pytest.approx(wanted[1], abs=1e-9)
    # The donor itself is explained without a transplant, and says so.
    record = record_in(explained(run, "b", donor="b"))
    assert record["transplant"] is None
    assert "transplant: the slide is the donor itself." in record["left_out"]


def test_annotations_over_the_run(run: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    draw(drawn, "a", region(0, 0, 2, 2), region(4, 1, 2, 1))
    draw(drawn, "b", region(3, 1, 2, 2), region(0, 3, 1, 1, "Necrosis"))
    draw(drawn, "c")
    options = dataclasses.replace(
        FEW, methods=("necessity", "faithfulness"), annotation_classes=("tumor",)
    )
    request = ExplainRequest(place=run, options=options, annotations=drawn)
    planned = plan_explanations(request)
    assert "no annotation of d, e (2)" in planned.notes[-1]
    for task in planned.tasks.values():
        explain_task(task)
    summary = summarise(planned)
    assert summary is not None and summary.cases == 5
    found = json.loads(summary.path.read_text())
    annotated = found["annotations"]
    assert (annotated["slides"], annotated["lesions"]) == (3, 3)
    aurocs = []
    for slide_id, inside in (("a", [0, 1, 7, 8, 11, 12]), ("b", [10, 11, 17, 18])):
        scores = read_score_file(run / "scores" / f"{slide_id}.h5").scores[:, 0]
        truth = np.isin(np.arange(len(scores)), inside)
        pairs = np.sign(scores[truth][:, None] - scores[~truth][None])
        aurocs.append((pairs.mean() + 1) / 2)
    assert annotated["estimates"]["auroc"]["value"] == pytest.approx(np.mean(aurocs))
    assert annotated["without_value"]["auroc"] == ["c"]
    # The mean change over slides is that of their own tables.
    rows = [row for row in read_table(planned.folder / "summary.csv") if row["group"] == "all"]
    (row,) = (r for r in rows if r["intervention"] == "remove hottest 10 %" and r["column"] == "no")
    deltas = []
    for slide_id in ROWS:
        own = read_table(planned.folder / slide_id / "effects.csv")
        deltas.append(float(own[0]["delta_no"]))
    assert float(row["change"]) == pytest.approx(np.mean(deltas), rel=1e-4)
    assert int(row["cases"]) == 5


# --- what is there, and what is refused -----------------------------------------------------


def test_what_is_there_is_kept_and_other_options_are_refused(run: Path, drawn: list[Shown]) -> None:
    task = task_of(run, "d")
    explain_task(task)
    files = {path.name: path.read_bytes() for path in task.folder.iterdir()}
    assert set(files) == {
        *("complete.json", "effects.csv", "explanation.json", "overview.png", "regions.geojson"),
        *("search.csv", "tiles.csv"),
    }
    picture = draw_picture(drawn[0])
    assert picture is not None and picture.startswith(b"\x89PNG")
    assert explain_task(task).outcome == "skipped"
    other = task_of(run, "d", dataclasses.replace(FEW, rounds=2))
    with pytest.raises(FingerprintMismatch, match="options"):
        explain_task(other)
    # A damaged file is made again, to the same bytes.
    (task.folder / "effects.csv").write_text("")
    assert explain_task(task).outcome == "done"
    assert {path.name: path.read_bytes() for path in task.folder.iterdir()} == files
    assert artifacts.folder_faults(task.folder) == []
    assert explain_task(dataclasses.replace(other, overwrite=True)).outcome == "done"


def test_stopped_anywhere_it_ends_at_the_same_bytes(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = task_of(run, "d", dataclasses.replace(FEW, methods=("necessity",)))
    steps: list[str] = []
    monkeypatch.setattr(artifacts, "observe_step", steps.append)
    explain_task(task)
    whole = {path.name: path.read_bytes() for path in task.folder.iterdir()}
    outcomes = []
    for place in range(len(steps)):
        other = dataclasses.replace(task, folder=tmp_path / f"stopped-{place}")
        left = [place]

        def stop(name: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt(name)

        monkeypatch.setattr(artifacts, "observe_step", stop)
        with pytest.raises(KeyboardInterrupt):
            explain_task(other)
        monkeypatch.setattr(artifacts, "observe_step", None)
        outcomes.append(explain_task(other).outcome)
        assert {path.name: path.read_bytes() for path in other.folder.iterdir()} == whole
    # Only once the folder had its name nothing was left to do.
    made = outcomes.index("skipped")
    assert outcomes == ["done"] * made + ["skipped"] * (len(steps) - made)
    assert steps[made] == "after-rename"


def test_a_single_tile_has_nothing_to_compare(tmp_path: Path) -> None:
    run = explainable_run(tmp_path / "study", {"one": 1, "two": 2})
    folder = explained(run, "one")
    assert {path.name for path in folder.iterdir()} == {
        "complete.json", "explanation.json", "tiles.csv",
    }  # fmt: skip
    record = record_in(folder)
    assert "The slide has a single tile: there is nothing to take out." in record["left_out"]
    assert record["faithfulness"] is None
    record = record_in(explained(run, "two"))
    assert [one["tiles_after"] for one in record["effects"]][:2] == [1, 1]
    assert math.isfinite(record["faithfulness"]["score"])


def test_slides_of_a_patient_are_one_bag(tmp_path: Path) -> None:
    run = explainable_run(tmp_path / "study", patients=[("a", "d"), ("b",), ("c", "e")])
    task = task_of(run, "d")
    assert (task.case_id, task.slide_ids) == ("patient/0", ("a", "d"))
    explain_task(task)
    assert task.folder.name == "a"
    features = features_of(run, "a", "d").read(0).features.astype(np.float64)
    scores = np.concatenate(
        [read_score_file(run / "scores" / f"{one}.h5").scores[:, 0] for one in "ad"]
    ).astype(np.float64)
    hottest = np.argsort(-scores, kind="stable")[:4]
    row = read_table(task.folder / "effects.csv")[0]
    wanted = by_hand(run, ("f0s0",), np.delete(features, hottest, axis=0))
    assert float(row["after_yes"]) == pytest.approx(wanted[1], abs=1e-9)
    tables = [read_table(task.folder / f"{one}.tiles.csv") for one in "ad"]
    assert [len(table) for table in tables] == [ROWS["a"], ROWS["d"]]
    assert {row["slide_id"] for row in tables[1]} == {"d"}


def test_a_model_without_a_closed_form_is_asked_bag_by_bag(tmp_path: Path) -> None:
    recipe = TrainSpec.model_validate(
        {
            "aggregator": {"name": "max", "options": {"hidden": 8}},
            "training": {"epochs": 2, "patience": None, "min_epochs": 0},
        }
    )
    run = explainable_run(tmp_path / "study", {"a": 12, "b": 9}, recipe=recipe)
    folder = explained(run, "a")
    record = record_in(folder)
    assert not record["model"]["closed_form"]
    features = features_of(run, "a").read(0).features.astype(np.float64)
    row = read_table(folder / "tiles.csv")[5]
    column = ("no", "yes").index(record["explained"])
    whole, without = (
        by_hand(run, ("f0s0",), bag) for bag in (features, np.delete(features, 5, axis=0))
    )
    wanted = whole[column] - without[column]
    assert float(row["leave_one_out"]) == pytest.approx(wanted, abs=1e-6)


def test_what_takes_too_long_is_left_out_unless_it_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bagscope.pipeline import explain_case, explain_parts

    monkeypatch.setattr(explain_parts, "MOST_TILE_PASSES", 100)
    monkeypatch.setattr(explain_case, "_is_closed", lambda *_: False)
    folder = explained(run, "d")
    record = record_in(folder)
    assert [text.split(":")[0] for text in record["left_out"]] == ["search", "leave-one-out"]
    assert not (folder / "search.csv").exists()
    named = dataclasses.replace(FEW, methods=("search",))
    assert record_in(explained(run, "a", named))["search"]["high effect"]["rounds"] == 3


@pytest.mark.parametrize(
    ("options", "how", "said"),
    [
        ({"class_name": "maybe"}, {}, "--class 'maybe': no class of label"),
        ({"target": "grade"}, {}, "--target 'grade': no such target"),
        ({"methods": ("serch",)}, {}, "--methods: no method 'serch'.*search"),
        ({"shares": (0.1, 1.5)}, {}, "--shares has 1.5; write shares above 0"),
        ({"rounds": 0}, {}, "--rounds is 0"),
        ({"annotation_classes": ("Tumor",)}, {}, "--annotation-class has no meaning without"),
        ({}, {"slides": ("z",)}, "--slide z: has no scores"),
        ({}, {"donor": "z"}, "--transplant z: has no scores"),
        ({}, {"donor_region": Path("x.geojson")}, "--donor-region has no meaning without"),
        ({}, {"annotations": Path("gone")}, "--annotations gone: no such GeoJSON"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    run_once: Path, options: dict[str, Any], how: dict[str, Any], said: str
) -> None:
    request = ExplainRequest(place=run_once, options=ExplainOptions(**options), **how)
    with pytest.raises(ConfigError, match=said):
        plan_explanations(request)


def test_scores_that_can_not_be_read_are_no_missing_ones(run: Path) -> None:
    path = run / "scores" / "d.h5"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"--slide d: .*d\.h5"):
        plan_explanations(ExplainRequest(place=run, slides=("d",)))
    assert any("d.h5" in note for note in plan_explanations(ExplainRequest(place=run)).notes)


def test_features_that_are_gone_or_others_are_refused(run: Path, tmp_path: Path) -> None:
    features = run.parents[1] / "features" / "made" / "demo"
    task = task_of(run, "d")
    moved = features.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="if they were moved, name where they lie with --feat"):
        plan_explanations(ExplainRequest(place=run))
    assert task_of(run, "d", features=str(moved)).location == str(moved)
    with pytest.raises(ArtifactError, match="d"):
        explain_task(dataclasses.replace(task, location=str(tmp_path / "nowhere")))
    # Where only one slide was extracted anew, that one is refused and the others are found.
    one = explainable_run(tmp_path / "one", {"a": 22, "b": 5})
    there = shutil.copytree(tmp_path / "moved", features)
    shutil.copy(one.parents[1] / "features" / "made" / "demo" / "a.h5", there / "a.h5")
    assert task_of(run, "d").location == str(there)
    with pytest.raises(FingerprintMismatch, match="a: its features"):
        explain_task(task_of(run, "a"))
    shutil.rmtree(there)
    # Tiles that are others have another fingerprint, whatever their number.
    other = explainable_run(tmp_path / "other", {slide_id: n + 1 for slide_id, n in ROWS.items()})
    shutil.copytree(other.parents[1] / "features" / "made" / "demo", features)
    with pytest.raises(ConfigError, match="of other tiles, or of other settings"):
        plan_explanations(ExplainRequest(place=run))
    with pytest.raises(FingerprintMismatch, match=r"d: its features in .* are not those that it"):
        explain_task(task_of(run, "d", features=str(features)))


def test_features_whose_tiles_were_moved_by_hand_are_refused(run: Path) -> None:
    path = run.parents[1] / "features" / "made" / "demo" / "d.h5"
    with h5py.File(path, "r+") as file:
        file["coords"][0] += TILE_L0
    task = task_of(run, "d")
    with pytest.raises(FingerprintMismatch, match=r"d: its features in .* at other places"):
        explain_task(task)


def test_scores_that_are_no_numbers_or_of_another_model_are_refused(run: Path) -> None:
    path = run / "scores" / "d.h5"
    task, file = task_of(run, "d"), read_score_file(path)
    write_score_file(path, dataclasses.replace(file, scores=np.full_like(file.scores, np.nan)))
    with pytest.raises(ArtifactError, match="14 of 14 tiles have scores that are no finite"):
        explain_task(task)
    few = {"scores": file.scores[:1], "coords_l0": None, "grid": None, "member_scores": None}
    write_score_file(path, dataclasses.replace(file, **few, contributions=None))
    with pytest.raises(FingerprintMismatch, match="d: has 1 scores and features of 14 tiles"):
        explain_task(task)
    fields = {**file.fields, "members": {"f1s0": "00", "f1s1": "11"}}
    write_score_file(path, dataclasses.replace(file, fields=fields))
    with pytest.raises(FingerprintMismatch, match="d: was scored by other members"):
        explain_task(task)
    shutil.rmtree(run / "model.bagscope")
    with pytest.raises(ConfigError, match="name the model with --model"):
        plan_explanations(ExplainRequest(place=run))


def test_annotations_of_another_slide_or_class_are_refused(run: Path, tmp_path: Path) -> None:
    far = draw(tmp_path / "drawn", "d", region(40, 40, 2, 2))
    with pytest.raises(SlideError, match=r"d: every region of d.geojson lies outside the slide"):
        explain_task(task_of(run, "d", annotations=far))
    options = dataclasses.replace(FEW, annotation_classes=("Stroma",))
    with pytest.raises(ConfigError, match=r"'Stroma': no region has this class; .* 'Tumor'"):
        task_of(run, "d", options, annotations=far)
    with pytest.raises(ConfigError, match="is one file for 5 slides"):
        plan_explanations(ExplainRequest(place=run, annotations=far))
    with pytest.raises(ConfigError, match="has no file of the slides asked about"):
        task_of(run, "a", annotations=far.parent)
