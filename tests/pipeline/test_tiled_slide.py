"""A slide that took the place of the one that was tiled: its pixels are shown under no score."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from bagscope.errors import SlideError
from bagscope.heatmaps.review.live import reader
from bagscope.pipeline.heatmap import HeatmapRequest, plan_heatmaps
from bagscope.pipeline.heatmap_worker import heatmap_task
from bagscope.pipeline.review import ReviewRequest, plan_review
from bagscope.pipeline.review_worker import review_task
from bagscope.pipeline.view_run import LiveRun
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.opening import open_slide
from bagscope.wsi.tile_file import write_tile_file
from tests.builders import build_svs
from tests.features import engine_parts
from tests.heatmaps.made_run import TILE_PX, write_scores
from tests.pipeline.reviewed import reviewed_run, told


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run whose slide has a tiling with the scored tiles."""
    monkeypatch.setattr(engine_parts, "TILE_PX", TILE_PX)
    run = reviewed_run(tmp_path, ("a",))
    write_scores(run, "a", special.log_softmax(np.arange(12.0)[:, None], axis=0))
    path = tmp_path / "slides" / "a.svs"
    with open_slide(path) as slide:
        tiles = engine_parts.tiles_of(slide, 12)
    (tmp_path / "tilings" / "made").mkdir(parents=True)
    write_tile_file(
        tmp_path / "tilings" / "made" / "a.h5",
        tiles,
        slide_id="a",
        fields={"slide": slide_identity(path)},
        tissue_method="none",
        outline_geojson="",
        summary={},
    )
    return run


def put_another_in_its_place(run: Path) -> None:
    # As large as the one that was tiled: its size tells nothing.
    build_svs(run.parents[1] / "slides" / "a.svs", width_px=512, height_px=384, seed=7)


@pytest.mark.parametrize("name", ["png", "gallery"])
def test_no_heatmap_is_drawn_over_it(run: Path, name: str) -> None:
    (task,) = plan_heatmaps(HeatmapRequest(place=run, formats=(name,))).tasks.values()
    assert heatmap_task(task).outcome == "done"
    before = {path: path.read_bytes() for path in task.target.rglob("*") if path.is_file()}
    put_another_in_its_place(run)
    with pytest.raises(SlideError, match=r"a: a\.svs is not the file that was tiled"):
        heatmap_task(dataclasses.replace(task, overwrite=True))
    assert {path: path.read_bytes() for path in before} == before
    numbers = dataclasses.replace(task, formats=("csv",), overwrite=True)
    assert heatmap_task(numbers).outcome == "done"


def test_a_review_shows_no_picture_of_it(run: Path) -> None:
    (task,) = plan_review(ReviewRequest(place=run)).tasks.values()
    assert review_task(task).warnings == ()
    put_another_in_its_place(run)
    (told_user,) = review_task(dataclasses.replace(task, overwrite=True)).warnings
    assert "a.svs is not the file that was tiled" in told_user
    data = told(task.target / "slide.js", "slide")
    assert data["picture"] is None
    assert not list(task.target.rglob("*.jpg"))
    assert len(data["layers"]) == 1


def test_the_viewer_does_not_open_it(run: Path) -> None:
    place = LiveRun(run).slide_at("a")
    assert place is not None
    assert reader.opened(place).info.width_l0 == 512
    put_another_in_its_place(run)
    reader._open.pop(place).close()
    with pytest.raises(SlideError, match=r"a\.svs: is not the file that was tiled"):
        reader.opened(place)
