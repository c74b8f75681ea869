"""Slides: opening and reading them, pixel size, tissue, tiles.

Names are imported on first use, so that light commands stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagscope.wsi.geometry import ReadPlan, plan_read
    from bagscope.wsi.identity import slide_identity
    from bagscope.wsi.opening import open_slide
    from bagscope.wsi.reading import read_region_mpp, thumbnail
    from bagscope.wsi.slide import Level, RectL0, Slide, SlideInfo, Spacing, TileBatch
    from bagscope.wsi.tile_file import TileFile, read_tile_file, write_tile_file
    from bagscope.wsi.tiles import TiledSlide, TileSet, tile_slide
    from bagscope.wsi.tiling import TilingSpec
    from bagscope.wsi.tissue import TissueMap, segment_tissue

__all__ = [
    "Level",
    "ReadPlan",
    "RectL0",
    "Slide",
    "SlideInfo",
    "Spacing",
    "TileBatch",
    "TileFile",
    "TileSet",
    "TiledSlide",
    "TilingSpec",
    "TissueMap",
    "open_slide",
    "plan_read",
    "read_region_mpp",
    "read_tile_file",
    "segment_tissue",
    "slide_identity",
    "thumbnail",
    "tile_slide",
    "write_tile_file",
]

_HOMES = {
    "Level": "slide",
    "ReadPlan": "geometry",
    "RectL0": "slide",
    "Slide": "slide",
    "SlideInfo": "slide",
    "Spacing": "slide",
    "TileBatch": "slide",
    "TileFile": "tile_file",
    "TileSet": "tiles",
    "TiledSlide": "tiles",
    "TilingSpec": "tiling",
    "TissueMap": "tissue",
    "open_slide": "opening",
    "plan_read": "geometry",
    "read_region_mpp": "reading",
    "read_tile_file": "tile_file",
    "segment_tissue": "tissue",
    "slide_identity": "identity",
    "thumbnail": "reading",
    "tile_slide": "tiles",
    "write_tile_file": "tile_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
