"""A heatmap as a table: a row per tile, its place and its score on every scale that there is."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import atomic_file
from bagscope.heatmaps.tile_places import TilePlaces

_DIGITS = 9
"""What float32 tells apart."""


def write_table(
    path: Path,
    places: TilePlaces,
    measurements: Mapping[str, NDArray[np.floating]],
    *,
    slide_id: str,
    grid: NDArray[np.int32] | None = None,
    facts: Mapping[str, float] | None = None,
) -> None:
    """Write a table atomically, as CSV or Parquet by the path's ending.

    Columns: slide_id, tile (its row in the feature file), x_l0 and y_l0 (top-left corner),
    extent_l0, column and row where there is a lattice, one of each measurement, and one of each of
    the slide's own facts, the same in every row; an empty cell is a number that is not known.
    """
    count = len(places)
    columns: dict[str, NDArray[np.generic]] = {
        "tile": np.arange(count, dtype=np.int32),
        "x_l0": places.coords_l0[:, 0],
        "y_l0": places.coords_l0[:, 1],
        "extent_l0": np.full(count, places.extent_l0),
    }
    if grid is not None:
        columns |= {"column": grid[:, 0], "row": grid[:, 1]}
    columns |= {name: np.asarray(values, np.float64) for name, values in measurements.items()}
    columns |= {name: np.full(count, value, np.float64) for name, value in (facts or {}).items()}
    with atomic_file(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, columns, slide_id)
        else:
            _write_csv(temporary, columns, slide_id)


def _write_csv(path: Path, columns: Mapping[str, NDArray[np.generic]], slide_id: str) -> None:
    texts = [
        ["" if math.isnan(value) else f"{value:.{_DIGITS}g}" for value in array.tolist()]
        if array.dtype.kind == "f"
        else array.tolist()
        for array in columns.values()
    ]
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["slide_id", *columns])
        writer.writerows([slide_id, *row] for row in zip(*texts, strict=True))


def _write_parquet(path: Path, columns: Mapping[str, NDArray[np.generic]], slide_id: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    length = len(next(iter(columns.values())))
    slides = pa.array([slide_id] * length, pa.string()).dictionary_encode()
    pq.write_table(pa.table({"slide_id": slides, **columns}), path)
