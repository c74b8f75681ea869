"""What can be asked of a heatmap; imports nothing, so that a command's help is there at once."""

from __future__ import annotations

from typing import Literal

ScaleName = Literal["ratio", "logit", "percentile", "probability", "contribution"]
Shows = Literal["score", "disagreement"]
"""The mean over the members, or how far they are apart."""
FORMATS = (
    "png", "svg", "geojson", "geojson.gz", "geojson.zip", "ome-tiff", "ome-zarr", "csv", "parquet",
)  # fmt: skip
DEFAULT_FORMATS = ("png", "geojson")
MAX_TILES = 50_000
"""More single tiles than this make QuPath slow; hot regions say the same."""
