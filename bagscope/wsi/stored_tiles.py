"""Where the stored JPEG tiles of a tiled TIFF lie, and whether the fast path may read them.

Frames: `_lv` pixels of a level; a stored tile is named by its `number`, row by row from the top
left; `column` and `row` count stored tiles.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.errors import ReadError
from bagscope.wsi import tiff_directory as tiff
from bagscope.wsi.jpeg_stream import stream_prefix
from bagscope.wsi.slide import Level
from bagscope.wsi.tiff_directory import Directory, TiffStructure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FAST_VENDORS = ("aperio", "generic-tiff", "philips")
_JPEG = 7
_RGB, _YCBCR = 2, 6


class NotStoredAsTiles(Exception):
    """The file is not what the fast path knows; the message says in which respect."""


@dataclass(frozen=True, slots=True)
class StoredLevel:
    """One level of a tiled JPEG TIFF.

    Attributes:
        width_lv: the level's width; pixels of a stored tile beyond it are not part of the image.
        height_lv: its height.
        tile_width_px: a stored tile's width.
        tile_height_px: a stored tile's height.
        across: stored tiles per row.
        down: rows of stored tiles.
        offsets: (across · down,) int64, of each tile's first byte in the file.
        byte_counts: (across · down,) int64, 0 where the tile is missing.
        prefix: what makes a stored tile a complete JPEG when put before it.
        redrawn: tiles that OpenSlide draws from the level above, since they are missing here or
            lie over missing ones there.
    """

    width_lv: int
    height_lv: int
    tile_width_px: int
    tile_height_px: int
    across: int
    down: int
    offsets: NDArray[np.int64]
    byte_counts: NDArray[np.int64]
    prefix: bytes
    redrawn: frozenset[int] = frozenset()


def stored_levels(path: Path, vendor: str, levels: Sequence[Level]) -> tuple[StoredLevel, ...]:
    """Match a file's directories to the levels that OpenSlide found in it.

    Raises:
        NotStoredAsTiles: another vendor, another codec, or directories that don't match.
    """
    if vendor not in FAST_VENDORS:
        raise NotStoredAsTiles(f"vendor {vendor} lays its tiles out differently")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _matched_levels(tiff.read_structure(descriptor), vendor, levels)
    except ReadError as error:
        # OpenSlide made sense of directories that we do not: then it shall read them.
        raise NotStoredAsTiles(str(error)) from error
    finally:
        os.close(descriptor)


def _matched_levels(
    structure: TiffStructure, vendor: str, levels: Sequence[Level]
) -> tuple[StoredLevel, ...]:
    tiled = [
        directory
        for i, directory in enumerate(structure.directories)
        if directory.is_tiled
        and (vendor != "generic-tiff" or i == 0 or directory.value(tiff.SUBFILE_TYPE, 0) & 1)
    ]
    if vendor == "generic-tiff":
        tiled.sort(key=lambda directory: -directory.value(tiff.IMAGE_WIDTH, 0))
        widths = [directory.value(tiff.IMAGE_WIDTH, 0) for directory in tiled]
        if len(set(widths)) != len(widths):
            raise NotStoredAsTiles("two levels of the same width can't be told apart")
    if len(tiled) != len(levels):
        raise NotStoredAsTiles(f"{len(tiled)} tiled directories for {len(levels)} levels")
    found = [
        _stored_level(directory, level, clipped=vendor == "philips")
        for directory, level in zip(tiled, levels, strict=True)
    ]
    return tuple(_with_redrawn(found) if vendor == "aperio" else found)


def _stored_level(directory: Directory, level: Level, *, clipped: bool) -> StoredLevel:
    """Read one directory; `clipped` levels may be smaller than the image that they are cut from."""
    expected = {
        tiff.COMPRESSION: (_JPEG,),
        tiff.PLANAR_CONFIGURATION: (1,),
        tiff.SAMPLES_PER_PIXEL: (3,),
        tiff.PHOTOMETRIC: (_RGB, _YCBCR),
        tiff.IMAGE_DEPTH: (1,),
        tiff.SAMPLE_FORMAT: (1,),
    }
    for tag, accepted in expected.items():
        if (value := directory.value(tag, 1)) not in accepted:
            raise NotStoredAsTiles(f"TIFF tag {tag} is {value}")
    if directory.values(tiff.BITS_PER_SAMPLE).tolist() != [8, 8, 8]:
        raise NotStoredAsTiles("samples are not of 8 bits")
    width_px = directory.value(tiff.IMAGE_WIDTH, 0)
    height_px = directory.value(tiff.IMAGE_LENGTH, 0)
    same = (width_px, height_px) == (level.width_px, level.height_px)
    inside = level.width_px <= width_px and level.height_px <= height_px
    if not (same or (clipped and inside)):
        raise NotStoredAsTiles(
            f"directory of {width_px}×{height_px} px for a level of "
            f"{level.width_px}×{level.height_px}"
        )
    tile_width_px = directory.value(tiff.TILE_WIDTH, 0)
    tile_height_px = directory.value(tiff.TILE_LENGTH, 0)
    if tile_width_px <= 0 or tile_height_px <= 0:
        raise NotStoredAsTiles(f"stored tiles of {tile_width_px}×{tile_height_px} px")
    across, down = math.ceil(width_px / tile_width_px), math.ceil(height_px / tile_height_px)
    offsets = directory.values(tiff.TILE_OFFSETS)
    byte_counts = directory.values(tiff.TILE_BYTE_COUNTS)
    if offsets.size != across * down or byte_counts.size != offsets.size:
        raise NotStoredAsTiles(
            f"{offsets.size} tile offsets and {byte_counts.size} sizes for {across * down} tiles"
        )
    return StoredLevel(
        width_lv=level.width_px,
        height_lv=level.height_px,
        tile_width_px=tile_width_px,
        tile_height_px=tile_height_px,
        across=across,
        down=down,
        offsets=offsets,
        byte_counts=byte_counts,
        prefix=stream_prefix(
            directory.raw(tiff.JPEG_TABLES),
            is_rgb=directory.value(tiff.PHOTOMETRIC, 0) == _RGB,
        ),
    )


def _with_redrawn(levels: Sequence[StoredLevel]) -> list[StoredLevel]:
    """Mark what OpenSlide redraws in Aperio files: missing tiles, and those over missing ones.

    The scanner writes damaged tiles over missing ones, so OpenSlide distrusts them, and so on up
    the pyramid.
    """
    import dataclasses

    import numpy as np

    marked: list[StoredLevel] = []
    inherited: set[int] = set()
    for i, level in enumerate(levels):
        missing = {*np.flatnonzero(level.byte_counts == 0).tolist(), *inherited}
        marked.append(dataclasses.replace(level, redrawn=frozenset(missing)))
        if i + 1 == len(levels) or not missing:
            inherited = set()
            continue
        above = levels[i + 1]
        columns = max(1, math.floor(level.across / above.across + 0.5))
        rows = max(1, math.floor(level.down / above.down + 0.5))
        inherited = {
            (number // level.across) // rows * above.across + (number % level.across) // columns
            for number in missing
        }
    return marked
