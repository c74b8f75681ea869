"""What can be asked of a heatmap; imports nothing, so that a command's help is there at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScaleName = Literal["ratio", "logit", "percentile", "probability", "contribution", "rollout"]
RATIOS: tuple[ScaleName, ...] = ("ratio", "rollout")
"""Those of which 1 is what each tile would have if all had the same."""
Shows = Literal["score", "disagreement"]
"""The mean over the members, or how far they are apart."""
FORMATS = (
    "png", "svg", "geojson", "geojson.gz", "geojson.zip", "ome-tiff", "ome-zarr", "csv", "parquet",
    "gallery",
)  # fmt: skip
DEFAULT_FORMATS = ("png", "geojson")
MAX_TILES = 50_000
"""More single tiles than this make QuPath slow; hot regions say the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryOptions:
    """What a gallery shows.

    Attributes:
        count: tiles at either end.
        apart: least distance between two of a side, in tile edges from corner to corner; with 0
            neighbours count as finds of their own.
        context: surroundings on every side of a tile, in tile edges.
    """

    count: int = 12
    apart: float = 2.0
    context: float = 0.0


FINE_PARTS = 4
"""Finer tiles along a step of the stored ones."""
