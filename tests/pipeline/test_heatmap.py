"""Planning heatmaps and drawing single ones, in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import special

from bagscope import artifacts
from bagscope.errors import ArtifactError, ConfigError, FingerprintMismatch, SlideError
from bagscope.heatmaps.choices import FORMATS
from bagscope.mil.score_file import read_score_file, write_score_file
from bagscope.pipeline.heatmap import HeatmapRequest, plan_heatmaps
from bagscope.pipeline.heatmap_captions import read_captions
from bagscope.pipeline.heatmap_worker import heatmap_task
from tests.heatmaps.made_run import made_study, write_scores

RNG = np.random.default_rng(0)


def log_weights(count: int, spread: float = 1.0) -> np.ndarray:
    return special.log_softmax(RNG.normal(0, spread, (count, 1)), axis=0)


def test_an_added_format_is_drawn_and_other_settings_are_refused(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    write_scores(run, "a", log_weights(12))
    request = HeatmapRequest(place=run, formats=("csv",))
    (task,) = plan_heatmaps(request).tasks.values()
    assert heatmap_task(task).outcome == "done"
    assert heatmap_task(task).outcome == "skipped"
    more = dataclasses.replace(task, formats=("geojson",))
    assert heatmap_task(more).outcome == "done"
    names = {"complete.json", "heatmap.geojson", "tiles.csv"}
    assert {path.name for path in task.target.iterdir()} == names
    assert artifacts.folder_faults(task.target) == []
    # Either alone is there already.
    assert heatmap_task(task).outcome == "skipped"
    other = dataclasses.replace(task, frame="openslide")
    with pytest.raises(FingerprintMismatch, match="frame is qupath, asked for openslide"):
        heatmap_task(other)
    assert heatmap_task(dataclasses.replace(other, overwrite=True)).outcome == "done"


def test_every_format_in_one_folder(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    write_scores(run, "a", log_weights(12))
    (task,) = plan_heatmaps(HeatmapRequest(place=run, formats=FORMATS)).tasks.values()
    assert heatmap_task(task).outcome == "done"
    assert {path.name for path in task.target.iterdir()} == {
        *("complete.json", "overview.png", "overview.svg", "tiles.csv", "tiles.parquet"),
        *("heatmap.geojson", "heatmap.geojson.gz", "heatmap.geojson.zip"),
        *("score.ome.tif", "colour.ome.tif", "score.ome.zarr", "colour.ome.zarr", "gallery"),
    }
    assert artifacts.folder_faults(task.target) == []
    assert heatmap_task(task).outcome == "skipped"


def test_a_slide_that_moved_away_and_came_back(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    write_scores(run, "a", log_weights(12))
    (task,) = plan_heatmaps(HeatmapRequest(place=run, formats=("svg",))).tasks.values()
    assert task.slide is not None
    away = task.slide.with_suffix(".away")
    task.slide.rename(away)
    result = heatmap_task(task)
    assert result.warnings == ("the slide is not at its path: its tiles are drawn alone",)
    picture = task.target / "overview.svg"
    assert "drawn without the slide" in picture.read_text(encoding="utf-8")
    away.rename(task.slide)
    assert heatmap_task(task).outcome == "done"
    assert "drawn without the slide" not in picture.read_text(encoding="utf-8")
    task.slide.rename(away)
    assert heatmap_task(task).outcome == "skipped"


def test_a_slide_of_another_size_is_refused(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    write_scores(run, "a", log_weights(12), width_l0=4096)
    (task,) = plan_heatmaps(HeatmapRequest(place=run)).tasks.values()
    with pytest.raises(SlideError, match="512×384 pixels, its tiles were cut from one of 4096×384"):
        heatmap_task(task)
    assert not task.target.exists()


def test_bags_that_never_were_slides(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    write_scores(run, "digits", log_weights(7), places=False)
    (task,) = plan_heatmaps(HeatmapRequest(place=run, formats=("png", "csv"))).tasks.values()
    result = heatmap_task(task)
    assert "never was a slide" in result.warnings[0]
    assert (task.target / "overview.png").stat().st_size > 1000


def test_a_patients_slides_share_one_scale(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a", "b"))
    case = {"stage": "scores", "case": "p", "slides": {"a": "1", "b": "2"}}
    both = log_weights(20)
    write_scores(run, "a", both[:12], case=case)
    write_scores(run, "b", both[12:], case=case)
    planned = plan_heatmaps(HeatmapRequest(place=run, formats=("csv",)))
    found = []
    for task in planned.tasks.values():
        heatmap_task(task)
        found.append(pd.read_csv(task.target / "tiles.csv")["ratio"])
    ratios = np.concatenate(found)
    np.testing.assert_allclose(ratios, 20 * np.exp(both[:, 0]), rtol=1e-5)
    assert ratios.mean() == pytest.approx(1, rel=1e-6)
    (run / "scores" / "b.h5").unlink()
    (task,) = plan_heatmaps(HeatmapRequest(place=run)).tasks.values()
    with pytest.raises(ArtifactError, match=r"b\.h5: no such score file"):
        heatmap_task(dataclasses.replace(task, overwrite=True))


def test_colours_hold_slides_that_are_not_drawn(tmp_path: Path) -> None:
    run = made_study(tmp_path)
    for slide_id, spread in (("a", 0.1), ("b", 3.0)):
        write_scores(run, slide_id, log_weights(40, spread))
    one = plan_heatmaps(HeatmapRequest(place=run, slides=("a",)))
    assert list(one.tasks) == ["a"]
    assert one.colours == plan_heatmaps(HeatmapRequest(place=run)).colours
    assert one.colours.high > 4
    given = plan_heatmaps(HeatmapRequest(place=run, limits=(0.5, 2.0))).colours
    assert (given.low, given.high) == (0.5, 2.0)


def test_classes_of_an_instance_model(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    logits = RNG.normal(size=(12, 2))
    write_scores(run, "a", logits, kind="instance_logit", names=("normal", "tumor"))
    artifacts.write_json(
        run / "model.bagscope" / "bundle.json",
        {"models": {"m": {"targets": {"label": {"task": "classes", "classes": []}}}}},
    )
    planned = plan_heatmaps(HeatmapRequest(place=run, formats=("csv",)))
    assert (planned.drawn, planned.colours.low, planned.colours.high) == ("probability-tumor", 0, 1)
    (task,) = planned.tasks.values()
    heatmap_task(task)
    table = pd.read_csv(task.target / "tiles.csv")
    expected = special.softmax(logits, axis=1)
    for place, name in enumerate(("normal", "tumor")):
        np.testing.assert_allclose(table[f"probability_{name}"], expected[:, place], rtol=1e-5)
    named = plan_heatmaps(HeatmapRequest(place=run, class_name="normal", scale="logit"))
    assert named.drawn == "logit-normal"
    assert named.colours.map_name == "RdBu_r"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"slides": ("A",)}, "--slide A: has no scores"),
        ({"scale": "probability"}, "choose one of ratio, logit, percentile"),
        ({"scale": "contribution"}, "no contributions"),
        ({"class_name": "tumor"}, "the same for all classes"),
        ({"formats": ("pdf",)}, "no format 'pdf'"),
        ({"limits": (2.0, 1.0)}, "the second must be the larger"),
        ({"limits": (0.0, 1.0)}, "a ratio is above 0"),
        ({"place": Path("nowhere")}, "no such folder"),
    ],
)
def test_what_can_not_be_drawn_is_refused_at_once(
    tmp_path: Path, options: dict[str, object], told: str
) -> None:
    run = made_study(tmp_path, ("a",))
    with pytest.raises(ConfigError, match="no scores there"):
        plan_heatmaps(HeatmapRequest(place=run))
    write_scores(run, "a", log_weights(5))
    with pytest.raises(ConfigError, match=told):
        plan_heatmaps(dataclasses.replace(HeatmapRequest(place=run), **options))  # type: ignore[arg-type]


def test_scores_that_can_not_be_read_are_no_missing_ones(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a", "b"))
    for slide_id in ("a", "b"):
        write_scores(run, slide_id, log_weights(5))
    path = run / "scores" / "b.h5"
    path.write_bytes(path.read_bytes()[:-100])
    tasks = plan_heatmaps(HeatmapRequest(place=run, slides=("b",), formats=("csv",))).tasks
    assert list(plan_heatmaps(HeatmapRequest(place=run)).tasks) == ["a", "b"]
    with pytest.raises(ArtifactError, match=r"b\.h5"):
        heatmap_task(tasks["b"])
    assert not tasks["b"].target.exists()


def test_predictions_have_heatmaps_of_their_own(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    there = tmp_path / "predictions" / "abmil" / "new"
    for place in (run, there):
        write_scores(place, "a", log_weights(12))
    folders = [plan_heatmaps(HeatmapRequest(place=place)).folder for place in (run, there)]
    assert folders == [tmp_path / "heatmaps" / name for name in ("abmil", "abmil.new")]
    (tmp_path / "cohort.csv").unlink()
    with pytest.raises(ConfigError, match="--out"):
        plan_heatmaps(HeatmapRequest(place=there))
    elsewhere = plan_heatmaps(HeatmapRequest(place=there, out=tmp_path / "out"))
    (task,) = elsewhere.tasks.values()
    (told,) = heatmap_task(dataclasses.replace(task, formats=("csv",))).warnings
    assert "is in no cohort of this study" in told


def test_of_many_classes_each_slide_shows_the_predicted_one(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a", "b"))
    for slide_id in "ab":
        logits = RNG.normal(size=(12, 3))
        write_scores(run, slide_id, logits, kind="instance_logit", names=("x", "y", "z"))
    (run / "predictions.csv").write_text(
        "case_id,t,t_predicted,t_p_x,t_p_y,t_p_z\na,x,x,0.8,0.1,0.1\nb,x,y,0.1,0.8,0.1\n"
    )
    planned = plan_heatmaps(HeatmapRequest(place=run))
    assert planned.drawn == "logit-predicted"
    assert [task.column.name for task in planned.tasks.values()] == ["x", "y"]
    assert plan_heatmaps(HeatmapRequest(place=run, class_name="z")).drawn == "logit-z"


def test_scores_of_different_models_are_refused(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a", "b"))
    for slide_id, names in (("a", ("x", "y")), ("b", ("x", "z"))):
        write_scores(run, slide_id, np.zeros((12, 2)), kind="instance_logit", names=names)
    with pytest.raises(ConfigError, match="different models"):
        plan_heatmaps(HeatmapRequest(place=run))


def test_captions(tmp_path: Path) -> None:
    table = tmp_path / "predictions.csv"
    table.write_text(
        "case_id,repeat,label,label_predicted,label_p_normal,label_p_tumor,age_predicted,os_risk\n"
        "x,0,tumor,normal,0.6,0.4,61.5,0.2\n"
        "x,1,tumor,tumor,0.2,0.8,63.5,0.4\n"
        "y,0,,normal,0.9,0.1,70,0.1\n"
    )
    found = read_captions(table)
    assert found["x"].text == (
        "label: predicted tumor (normal 0.40, tumor 0.60), labelled tumor · "
        "age: predicted 62.5 · os: risk 0.3"
    )
    assert "labelled" not in found["y"].text
    assert found["z"].text == ""
    table.write_text("case_id,label,label_predicted,label_p_a,label_p_b\nx,a,b,0.3,0.7\n")
    assert read_captions(table)["x"].predicted == "b"
    assert read_captions(tmp_path / "none.csv")["x"].predicted is None


def test_scores_for_other_logits_are_refused(tmp_path: Path) -> None:
    """Attention is one column whatever the classes are: the logits' names tell models apart."""
    run = made_study(tmp_path, ("a", "b"))
    for slide_id, names in (("a", ("x", "y")), ("b", ("x", "z"))):
        write_scores(
            run,
            slide_id,
            log_weights(12),
            contributions=np.zeros((12, 2), np.float32),
            contribution_names=names,
        )
    with pytest.raises(ConfigError, match="different models"):
        plan_heatmaps(HeatmapRequest(place=run))


def test_tiles_of_another_slide_are_refused(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    write_scores(run, "a", log_weights(40))
    (task,) = plan_heatmaps(HeatmapRequest(place=run)).tasks.values()
    with pytest.raises(SlideError, match="these are the features of another slide"):
        heatmap_task(task)
    write_scores(run, "a", log_weights(12))
    path = run / "scores" / "a.h5"
    file = read_score_file(path)
    assert file.grid is not None
    write_score_file(path, dataclasses.replace(file, grid=file.grid[:11]))
    with pytest.raises(ArtifactError, match="12 scores, but grid of 11 tiles; predict again"):
        heatmap_task(task)


def test_a_single_tile_is_drawn_and_its_picture_says_so(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    entry = {"basis": "scores", "column": "", "score": None, "warning": "A single tile: …"}
    told = {"judged": [entry], "unjudged": "", "forward_passes": None, "agreement": None}
    write_scores(run, "a", log_weights(1), faithfulness=told)
    planned = plan_heatmaps(HeatmapRequest(place=run, formats=("svg", "csv")))
    (task,) = planned.tasks.values()
    assert planned.doubted == ()
    heatmap_task(task)
    picture = (task.target / "overview.svg").read_text(encoding="utf-8")
    assert "a single tile has" in picture and "Not to be believed" not in picture
    table = pd.read_csv(task.target / "tiles.csv")
    assert table["ratio"].tolist() == [1.0] and table["faithfulness"].isna().all()
