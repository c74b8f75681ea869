"""A gallery among a heatmap's other files: added, kept, and said to be missing."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from bagscope import artifacts
from bagscope.errors import FingerprintMismatch
from bagscope.heatmaps.choices import GalleryOptions
from bagscope.pipeline.heatmap import HeatmapRequest, HeatmapTask, plan_heatmaps
from bagscope.pipeline.heatmap_worker import heatmap_task
from tests.heatmaps.made_run import made_study, write_scores

TWO = GalleryOptions(count=2, apart=0)


def task_of(run: Path, *formats: str, **options: object) -> HeatmapTask:
    request = HeatmapRequest(place=run, formats=formats, gallery=TWO)
    (task,) = plan_heatmaps(dataclasses.replace(request, **options)).tasks.values()  # type: ignore[arg-type]
    return task


def log_weights(count: int = 12) -> np.ndarray:
    return special.log_softmax(np.random.default_rng(0).normal(size=(count, 1)), axis=0)


def rows_of(task: HeatmapTask, scale: str) -> list[dict[str, str]]:
    path = task.target.with_name(scale) / "gallery" / "gallery.csv"
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_it_is_added_and_kept_when_the_slide_moves_away(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    scores = log_weights()
    write_scores(run, "a", scores)
    task = task_of(run, "gallery")
    assert task.slide is not None
    away = task.slide.with_suffix(".away")
    task.slide.rename(away)
    told = "no gallery: the slide is not at its path"
    for expected in ("done", "skipped"):
        result = heatmap_task(dataclasses.replace(task, formats=("gallery", "csv")))
        assert (result.outcome, told in result.warnings) == (expected, True)
    assert not (task.target / "gallery").exists()
    away.rename(task.slide)
    assert heatmap_task(task).outcome == "done"
    rows = rows_of(task, "ratio")
    order = np.argsort(-scores[:, 0])
    assert [int(row["tile"]) for row in rows] == [*order[:2], *order[::-1][:2]]
    pictures = {path.name: path.read_bytes() for path in (task.target / "gallery").iterdir()}
    # Another format is added while the slide is away: the gallery is what it was.
    task.slide.rename(away)
    assert heatmap_task(dataclasses.replace(task, formats=("parquet",))).outcome == "done"
    assert {p.name: p.read_bytes() for p in (task.target / "gallery").iterdir()} == pictures
    assert artifacts.folder_faults(task.target) == []
    away.rename(task.slide)
    assert heatmap_task(task).outcome == "skipped"
    # Who asks for no gallery need not know how it was made; who asks for another is refused.
    csv_alone = dataclasses.replace(task, formats=("csv",), gallery=GalleryOptions(count=5))
    assert heatmap_task(csv_alone).outcome == "skipped"
    with pytest.raises(FingerprintMismatch, match="count is 2, asked for 5"):
        heatmap_task(dataclasses.replace(csv_alone, formats=("gallery",)))


def test_each_class_has_its_own_but_of_two_probabilities(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for names, scale, found in (
        (("x", "y", "z"), "probability", {"x", "y", "z"}),
        (("x", "y"), "probability", {"y"}),
        (("x", "y"), "logit", {"x", "y"}),
    ):
        run = made_study(tmp_path / f"{len(names)}{scale}", ("a",))
        logits = rng.normal(size=(12, len(names)))
        write_scores(run, "a", logits, kind="instance_logit", names=names)
        artifacts.write_json(
            run / "model.bagscope" / "bundle.json",
            {"models": {"m": {"targets": {"label": {"task": "classes", "classes": []}}}}},
        )
        task = task_of(run, "gallery", scale=scale, class_name="y")
        assert heatmap_task(task).outcome == "done"
        rows = rows_of(task, task.target.name)
        assert {row["class"] for row in rows} == found
        column = names.index("y")
        values = logits if scale == "logit" else special.softmax(logits, axis=1)
        best = next(row for row in rows if (row["side"], row["class"]) == ("top", "y"))
        assert float(best["value"]) == pytest.approx(values[:, column].max(), rel=1e-5)


def test_bags_that_never_were_slides_have_none(tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    write_scores(run, "digits", log_weights(7), places=False)
    result = heatmap_task(task_of(run, "gallery", "csv"))
    assert "no gallery: this never was a slide" in result.warnings


def test_an_unreadable_tile_is_said(tmp_path: Path) -> None:
    from bagscope.wsi.synthetic.faults import corrupt_tiles

    run = made_study(tmp_path, ("a",))
    scores = np.full((12, 1), -3.0)
    scores[0] = 1.0
    write_scores(run, "a", scores)
    task = task_of(run, "gallery")
    assert task.slide is not None
    corrupt_tiles(task.slide, [0])
    result = heatmap_task(task)
    assert any(note.startswith("gallery: tile at x=0, y=0: ") for note in result.warnings)
    assert rows_of(task, "ratio")[0]["file"] == ""
