"""A slide as a Deep Zoom pyramid: read from its own levels, never from label or macro images.

Frames: `_l0` and `_lv` as in `bagscope.wsi.slide`; `_px` pixels of one of the picture's own levels,
of which 0 is a single pixel and the last is the finest, each twice as fine as the one before.

A pixel of the finest level is a whole number of pixels of a stored one, so that nothing is shifted
or interpolated: where the picture says that a pixel lies, there it was read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from bagscope.artifacts import Json
from bagscope.errors import ReadError
from bagscope.heatmaps.review.choices import QUALITY, THUMB_PX
from bagscope.wsi.geometry import choose_level
from bagscope.wsi.overlay import encode_jpeg
from bagscope.wsi.reading import read_resized, resize_into

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.slide import Slide, SlideInfo

TILE_PX = 510
OVERLAP_PX = 1
"""With its neighbours' pixels around it a tile is 512 pixels wide, and no seam is seen."""
_FACTOR = 4
"""How much finer than the picture a level may be that is read for it, where there is a choice."""
_PARTS = 4
_STRIPE_PX = 8
_STRIPES = ((225, 225, 230), (120, 125, 140))

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """The scanned area of a slide as an image.

    Attributes:
        width: of the finest level.
        height: of the finest level.
        downsample: level-0 pixels per pixel of the finest level.
        x_l0: left edge.
        y_l0: upper edge.
    """

    width: int
    height: int
    downsample: float
    x_l0: float
    y_l0: float

    @property
    def last_level(self) -> int:
        """Return the number of the finest level."""
        return math.ceil(math.log2(max(self.width, self.height)))

    def size_px(self, level: int) -> tuple[int, int]:
        """Return the width and height of a level."""
        scale = 1 << (self.last_level - level)
        return -(-self.width // scale), -(-self.height // scale)

    def tile_counts(self, level: int) -> tuple[int, int]:
        """Return how many columns and rows of tiles a level has."""
        width, height = self.size_px(level)
        return -(-width // TILE_PX), -(-height // TILE_PX)

    def has(self, level: int, column: int, row: int) -> bool:
        """Return whether there is such a tile."""
        if not 0 <= level <= self.last_level:
            return False
        columns, rows = self.tile_counts(level)
        return 0 <= column < columns and 0 <= row < rows

    def tiles(self) -> Iterator[tuple[int, int, int]]:
        """Yield (level, column, row) of every tile, the coarsest first."""
        for level in range(self.last_level + 1):
            columns, rows = self.tile_counts(level)
            yield from ((level, column, row) for row in range(rows) for column in range(columns))

    def to_json(self) -> dict[str, Json]:
        """Return what the page needs to know."""
        return {
            "width": self.width,
            "height": self.height,
            "tile_size": TILE_PX,
            "overlap": OVERLAP_PX,
            "downsample": self.downsample,
            "x_l0": self.x_l0,
            "y_l0": self.y_l0,
        }


def plan_picture(info: SlideInfo, max_px: int | None = None) -> Picture:
    """Return the picture of a slide's scanned area.

    Args:
        info: of the slide.
        max_px: what its longer edge may have at most; level 0 itself if None.
    """
    bounds = info.bounds_l0
    needed = 1.0 if max_px is None else max(1.0, max(bounds.width_l0, bounds.height_l0) / max_px)
    choices = []
    for level in info.levels:
        factor = math.ceil(needed / level.downsample - 1e-9)
        downsample = level.downsample * factor
        # Cheap to read unless that costs half the resolution, then the finest that fits.
        preference = (downsample > 2 * needed, factor > _FACTOR)
        choices.append((*preference, downsample, factor, level.downsample))
    *_, downsample, _, stored = min(choices)
    return Picture(
        width=max(1, math.ceil(bounds.width_l0 / downsample - 1e-6)),
        height=max(1, math.ceil(bounds.height_l0 / downsample - 1e-6)),
        downsample=downsample,
        x_l0=round(bounds.x_l0 / stored) * stored,
        y_l0=round(bounds.y_l0 / stored) * stored,
    )


def picture_tile(
    slide: Slide, picture: Picture, level: int, column: int, row: int, *, quality: int = QUALITY
) -> tuple[bytes, bool]:
    """Return one tile of a slide's pyramid as JPEG, and whether all of it could be read.

    What can't be read is striped, so that nobody takes it for glass or tissue. A tile that fails
    as a whole is read again in parts, and loses no more of itself than it must.

    Raises:
        ValueError: there is no such tile (`Picture.has`).
    """
    box_px = _box_px(picture, level, column, row)
    try:
        return encode_jpeg(_read(slide, picture, level, box_px), quality=quality), True
    except ReadError:
        pixels = _in_parts(slide, picture, level, box_px)
    return encode_jpeg(pixels, quality=quality), False


def unreadable_tile(picture: Picture, level: int, column: int, row: int) -> bytes:
    """Return a tile of which nothing could be read: all stripes, as JPEG.

    Raises:
        ValueError: there is no such tile (`Picture.has`).
    """
    left, top, right, bottom = _box_px(picture, level, column, row)
    return encode_jpeg(_striped(right - left, bottom - top), quality=QUALITY)


def thumbnail_jpeg(slide: Slide, picture: Picture, *, width_px: int = THUMB_PX) -> bytes:
    """Return the whole picture as JPEG, its longer edge of so many pixels at most.

    Raises:
        ReadError: pixels could not be decoded.
    """
    import numpy as np

    level = min(picture.last_level, (width_px - 1).bit_length())
    width, height = picture.size_px(level)
    pixels = _read(slide, picture, level, (0, 0, width, height))
    scale = max(1.0, max(width, height) / width_px)
    small = np.empty((max(1, int(height / scale)), max(1, int(width / scale)), 3), np.uint8)
    resize_into(pixels, small)
    return encode_jpeg(small, quality=QUALITY)


def _box_px(picture: Picture, level: int, column: int, row: int) -> Box:
    """Return a tile's left, top, right and bottom edge, overlaps included."""
    if not picture.has(level, column, row):
        raise ValueError(f"no tile {level}/{column}_{row} in {picture}; ask `has` first")
    width, height = picture.size_px(level)
    return (
        max(0, column * TILE_PX - OVERLAP_PX),
        max(0, row * TILE_PX - OVERLAP_PX),
        min(width, (column + 1) * TILE_PX + OVERLAP_PX),
        min(height, (row + 1) * TILE_PX + OVERLAP_PX),
    )


def _read(slide: Slide, picture: Picture, level: int, box_px: Box) -> NDArray[np.uint8]:
    """Read a box of one of the picture's levels: (height, width, 3) uint8 RGB.

    The last pixels of a level may stand for an area that reaches beyond the picture; viewers draw
    them cut to the picture's edge, so what is read ends there too.
    """
    scale = 1 << (picture.last_level - level)
    downsamples = [level.downsample for level in slide.info.levels]
    stored = choose_level(downsamples, picture.downsample * scale)
    factor = picture.downsample / downsamples[stored]
    left, top, right, bottom = box_px

    def span_lv(start_px: int, end_px: int, origin_l0: float, length: int) -> tuple[int, int]:
        origin_lv = _nearest(origin_l0 / downsamples[stored])
        first = _nearest(start_px * scale * factor)
        end = _nearest(min(end_px * scale, length) * factor)
        return origin_lv + first, max(1, end - first)

    x_lv, width_lv = span_lv(left, right, picture.x_l0, picture.width)
    y_lv, height_lv = span_lv(top, bottom, picture.y_l0, picture.height)
    return read_resized(
        slide, stored, (x_lv, y_lv), (width_lv, height_lv), (right - left, bottom - top)
    )


def _in_parts(slide: Slide, picture: Picture, level: int, box_px: Box) -> NDArray[np.uint8]:
    """Read what of a box can be read; the rest is striped."""
    import numpy as np

    left, top, right, bottom = box_px
    pixels = _striped(right - left, bottom - top)
    edges_x = np.linspace(left, right, _PARTS + 1).astype(int).tolist()
    edges_y = np.linspace(top, bottom, _PARTS + 1).astype(int).tolist()
    for y0, y1 in pairwise(edges_y):
        for x0, x1 in pairwise(edges_x):
            if x1 > x0 and y1 > y0:
                with contextlib.suppress(ReadError):
                    part = _read(slide, picture, level, (x0, y0, x1, y1))
                    pixels[y0 - top : y1 - top, x0 - left : x1 - left] = part
    return pixels


def _striped(width_px: int, height_px: int) -> NDArray[np.uint8]:
    import numpy as np

    y, x = np.ogrid[:height_px, :width_px]
    stripes: NDArray[np.uint8] = np.asarray(_STRIPES, np.uint8)[(x + y) // _STRIPE_PX % 2]
    return stripes


def _nearest(position: float) -> int:
    # round() goes to the even neighbour, which would pull every other edge apart.
    return math.floor(position + 0.5)
