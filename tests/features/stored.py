"""A folder of small feature files whose content is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bagscope.features.feature_file import FeatureHeader, write_feature_file

ENCODER = {"name": "demo", "dimension": 5, "mean": [0.5, 0.5]}
TILE = {
    "mpp": 0.5,
    "tile_px": 256,
    "overlap_px": 0,
    "bounds_l0": np.array([1, 2, 3, 4], np.int64),
    "mpp_estimated": np.bool_(False),
    "backend": "jpegtiff",
}


def vectors_of(slide_id: str, rows: int, dimension: int = 5) -> np.ndarray:
    seed = int.from_bytes(slide_id.encode(), "little")
    return np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float16)


def grid_of(rows: int) -> np.ndarray:
    """Return (column, row) of `rows` tiles on seven columns, ordered by row and column."""
    return np.stack([np.arange(rows) % 7, np.arange(rows) // 7], axis=1).astype(np.int32)


def store_slide(
    folder: Path, slide_id: str, rows: int, dimension: int = 5, **changes: Any
) -> np.ndarray:
    """Write one feature file; return its vectors."""
    vectors = vectors_of(slide_id, rows, dimension)
    values: dict[str, Any] = {
        "slide_id": slide_id,
        "fields": {"stage": "extract", "slide": slide_id, "encoder": "demo"},
        "encoder": ENCODER,
        "weights_sha256": "ab" * 32,
        "coords_l0": grid_of(rows) * 512,
        "grid": grid_of(rows),
        "tile": TILE,
        "recorded": {"device": "cpu"},
    }
    header = FeatureHeader(**{**values, **changes})
    write_feature_file(folder / f"{slide_id}.h5", header, vectors)
    return vectors


def store_three(folder: Path) -> dict[str, np.ndarray]:
    """Write three slides; return their vectors by id."""
    return {
        slide_id: store_slide(folder, slide_id, rows)
        for slide_id, rows in (("a", 600), ("b µ#2", 3), ("c", 0))
    }
