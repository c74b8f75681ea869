"""`bagscope heatmap` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import special

from bagscope.pipeline.heatmap import HeatmapRequest, plan_heatmaps
from bagscope.pipeline.heatmap_worker import heatmap_task
from bagscope.wsi.geojson import read_regions
from bagscope.wsi.slide import RectL0
from tests.cli.conftest import Ran, files_of, leftovers
from tests.heatmaps.made_run import made_study, write_scores

Command = Callable[..., Ran]


def test_one_bad_slide_stops_no_other_and_running_again_changes_nothing(
    bagscope: Command, tmp_path: Path
) -> None:
    run = made_study(tmp_path)
    rng = np.random.default_rng(0)
    for slide_id in "ab":
        write_scores(run, slide_id, special.log_softmax(rng.normal(0, 2, (12, 1)), axis=0))
    write_scores(run, "c", np.full((12, 1), np.nan))
    how = ("--formats", "geojson,csv", "--workers", 2)
    ran = bagscope("heatmap", run, *how)
    assert ran.code == 1
    assert "2 done, 1 failed" in ran.out
    assert "12 of 12 tiles have scores that are no finite numbers" in ran.out
    folder = tmp_path / "heatmaps" / "abmil"
    before = files_of(folder)
    drawn = {"tiles.csv", "heatmap.geojson", "complete.json"}
    assert set(before) == {f"{slide}/ratio/{name}" for slide in "ab" for name in drawn}
    bounds = RectL0(x_l0=0, y_l0=0, width_l0=512, height_l0=384)
    regions = read_regions(folder / "a" / "ratio" / "heatmap.geojson", bounds_l0=bounds)
    assert sum(region.object_type == "tile" for region in regions) == 12
    again = bagscope("heatmap", run, *how, "--slide", "a", "--json")
    assert again.code == 0
    assert files_of(folder) == before
    events = [json.loads(line) for line in again.out.splitlines()]
    assert events[0]["scale"] == "ratio"
    assert [e["outcome"] for e in events if e["event"] == "slide_finished"] == ["skipped"]
    assert leftovers(tmp_path) == []


def test_heatmaps_of_older_scores_are_refused_once_and_not_slide_by_slide(
    bagscope: Command, tmp_path: Path
) -> None:
    run = made_study(tmp_path)

    def score(numerics: int) -> None:
        for slide_id in "abc":
            case = {"case": slide_id, "slides": {slide_id: "f"}, "numerics": numerics}
            write_scores(run, slide_id, np.full((12, 1), -np.log(12)), case=case)

    how = ("--formats", "csv", "--workers", 1)
    score(1)
    assert bagscope("heatmap", run, *how).code == 0
    score(2)
    before = files_of(tmp_path / "heatmaps")
    ran = bagscope("heatmap", run, *how)
    assert ran.code == 2
    assert "holds heatmaps of other scores than those of now (3 of 3; " in ran.err
    assert ran.err.endswith(f"bagscope heatmap {run} --overwrite")
    assert "was made differently" not in ran.out + ran.err
    assert files_of(tmp_path / "heatmaps") == before
    assert bagscope("heatmap", run, *how, "--overwrite").code == 0
    assert bagscope("heatmap", run, *how).code == 0


def test_a_dry_run_writes_nothing(bagscope: Command, tmp_path: Path) -> None:
    run = made_study(tmp_path)
    write_scores(run, "a", np.full((12, 1), -np.log(12)))
    before = files_of(tmp_path)
    ran = bagscope("heatmap", run, "--dry-run", "--formats", "svg,csv")
    assert ran.code == 0
    assert "1 slide, ratio; colours from 0.5 to 2 on all of them" in ran.out
    assert files_of(tmp_path) == before
    assert bagscope("heatmap", run, "--dry-run", "--levels", "2;4").code == 2
    assert "numbers" in bagscope("heatmap", run, "--dry-run", "--levels", "nan").err


def test_verify_finds_a_flipped_bit_in_any_file(bagscope: Command, tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    write_scores(run, "a", np.full((12, 1), -np.log(12)))
    (task,) = plan_heatmaps(HeatmapRequest(place=run, formats=("csv", "ome-zarr"))).tasks.values()
    heatmap_task(task)
    assert bagscope("verify", tmp_path).code == 0
    chunk = task.target / "score.ome.zarr" / "0" / "c" / "0" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    ran = bagscope("verify", tmp_path)
    assert ran.code == 1
    assert f"score.ome.zarr/{chunk.relative_to(task.target / 'score.ome.zarr')}" in ran.out
