"""Heatmaps: a grid of 20,000 tiles against a loop over tiles, and 200,000 tiles into every file.

python benchmarks/bench_heatmaps.py [--record] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import recording
from numpy.typing import NDArray

from bagscope.heatmaps.colours import shared_scale, usual_range
from bagscope.heatmaps.geojson import write_geojson
from bagscope.heatmaps.ome_tiff import write_ome_tiff
from bagscope.heatmaps.ome_zarr import write_ome_zarr
from bagscope.heatmaps.overview import Caption, draw_overview
from bagscope.heatmaps.raster import raster
from bagscope.heatmaps.scores import Column, on_scale
from bagscope.heatmaps.table import write_table
from bagscope.heatmaps.tile_places import TilePlaces, places_of
from bagscope.wsi.outline import MaskFrame

EXTENT_L0 = 400.0
HEIGHT_PX, WIDTH_PX = 3125, 3750


def main() -> None:
    """Measure, compare with the targets, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = [*grid_rows(arguments.rounds), *file_rows()]
    recording.show(rows)
    if arguments.record:
        recording.record("heatmaps", rows, packages=["numpy", "tifffile", "matplotlib", "zarr"])


def lattice(columns: int, rows: int, extent_l0: float) -> TilePlaces:
    """Return all tiles of a lattice."""
    row, column = (axis.ravel() for axis in np.mgrid[0:rows, 0:columns])
    grid = np.stack([column, row], axis=1).astype(np.int32)
    size = [round(columns * extent_l0), round(rows * extent_l0)]
    tile = {
        "extent_l0": extent_l0,
        "step_l0": extent_l0,
        "origin_l0": [0.0, 0.0],
        "bounds_l0": [0, 0, *size],
        "mpp_x_l0": 0.25,
        "mpp_y_l0": 0.25,
    }
    return places_of(np.rint(grid * extent_l0).astype(np.int32), grid, tile, len(grid))


def grid_rows(rounds: int) -> list[recording.Row]:
    """Compare a raster with a loop that adds each tile to the pixels under it."""
    places = lattice(160, 125, EXTENT_L0)
    values = np.random.default_rng(0).random(len(places))
    px_l0 = 160 * EXTENT_L0 / WIDTH_PX
    frame = MaskFrame(
        shape=(HEIGHT_PX, WIDTH_PX), origin_x_l0=0, origin_y_l0=0, px_l0_x=px_l0, px_l0_y=px_l0
    )
    np.testing.assert_allclose(
        raster(places, values, frame), tile_by_tile(places, values, frame), rtol=1e-5
    )
    ours, theirs = [], []
    for _ in range(rounds):  # in turn, so that a busy moment hits both
        ours.append(seconds(lambda: raster(places, values, frame)))
        theirs.append(seconds(lambda: tile_by_tile(places, values, frame)))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return [
        recording.Row("20,000 tiles on 3,750 × 3,125", statistics.median(ours) * 1e3, "ms"),
        recording.Row("the same, tile by tile", statistics.median(theirs) * 1e3, "ms"),
        recording.Row("times faster than tile by tile", ratio, "×", at_least=5),
    ]


def tile_by_tile(
    places: TilePlaces, values: NDArray[np.float64], frame: MaskFrame
) -> NDArray[np.float32]:
    """Return the raster by the usual loop: sums and counts of the tiles over each pixel."""
    sums = np.zeros(frame.shape, np.float32)
    counts = np.zeros(frame.shape, np.float32)
    first = np.ceil(places.coords_l0 / frame.px_l0_x - 0.5).astype(int)
    last = np.ceil((places.coords_l0 + places.extent_l0) / frame.px_l0_x - 0.5).astype(int)
    for (x0, y0), (x1, y1), value in zip(first.tolist(), last.tolist(), values, strict=True):
        sums[y0:y1, x0:x1] += value
        counts[y0:y1, x0:x1] += 1
    with np.errstate(invalid="ignore"):
        return sums / counts


def file_rows() -> list[recording.Row]:
    """Write every kind of file of 200,000 tiles, in processes of their own for their memory."""
    rows = []
    for name in ("png", "geojson", "ome-tiff", "ome-zarr", "csv"):
        spent, peak_mib = in_a_child(lambda name=name: write(name))
        rows.append(recording.Row(f"200,000 tiles, score + {name}", spent, "s"))
        rows.append(
            recording.Row(f"200,000 tiles, score + {name}, peak", peak_mib, "MiB", at_most=1536)
        )
    return rows


def write(name: str) -> None:
    """Score 448 × 448 tiles of a slide of 100,000 × 100,000 px and write one kind of file."""
    places = lattice(448, 448, 223.2)
    logits = np.random.default_rng(0).normal(size=(len(places), 1))
    values = on_scale(logits, "log_weight", "ratio", Column(name="", index=0))
    colours = shared_scale("ratio", "log_weight", [usual_range(values)])
    measured = {"ratio": values}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if name == "png":
            draw_overview(places, values, colours, Caption(slide_id="s"))
        elif name == "geojson":
            write_geojson(
                folder / "map.geojson",
                places,
                values,
                colours,
                slide_id="s",
                measurements=measured,
                max_tiles=len(places),
            )
        elif name == "ome-tiff":
            write_ome_tiff(folder / "s.ome.tif", places, values, colours, "score", slide_id="s")
            write_ome_tiff(folder / "c.ome.tif", places, values, colours, "colour", slide_id="s")
        elif name == "ome-zarr":
            write_ome_zarr(folder / "s.ome.zarr", places, values, colours, "score", slide_id="s")
            write_ome_zarr(folder / "c.ome.zarr", places, values, colours, "colour", slide_id="s")
        else:
            write_table(folder / "tiles.csv", places, measured, slide_id="s")


def in_a_child(work: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds that work takes in a forked process, and its peak resident MiB."""
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, "the child failed"
    unit = 1024 if os.uname().sysname == "Linux" else 1024**2
    return time.perf_counter() - begin, usage.ru_maxrss / unit


def seconds(work: Callable[[], object]) -> float:
    """Return how long work takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
