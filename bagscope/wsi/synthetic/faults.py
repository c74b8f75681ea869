"""Damage a good SVS in the ways that slides arrive damaged."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

_TILE_BYTE_COUNTS = 325


def truncated_copy(source: Path, target: Path, *, keep: float = 0.6) -> Path:
    """Copy only the first part of a file, as an interrupted transfer leaves it."""
    shutil.copyfile(source, target)
    truncate(target, keep)
    return target


def corrupt_tile_copy(source: Path, target: Path, *, tiles: Sequence[int] = (0,)) -> Path:
    """Copy a slide with some level-0 tiles (by index, row by row) overwritten with garbage."""
    shutil.copyfile(source, target)
    corrupt_tiles(target, tiles)
    return target


def missing_tile_copy(source: Path, target: Path, *, tiles: Sequence[int] = (0,)) -> Path:
    """Copy a slide with the byte counts of some level-0 tiles set to zero."""
    shutil.copyfile(source, target)
    remove_tiles(target, tiles)
    return target


def zero_byte_file(target: Path) -> Path:
    """Make a file without a single byte."""
    target.write_bytes(b"")
    return target


def truncate(path: Path, keep: float) -> None:
    """Cut a file down to a part of its bytes, in place."""
    with path.open("r+b") as handle:
        handle.truncate(int(path.stat().st_size * keep))


def corrupt_tiles(path: Path, tiles: Sequence[int]) -> None:
    """Overwrite level-0 tiles with bytes that no JPEG decoder accepts, in place."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        spans = [(page.dataoffsets[tile], page.databytecounts[tile]) for tile in tiles]
    with path.open("r+b") as handle:
        for offset, count in spans:
            handle.seek(offset)
            handle.write(b"\xa5" * count)


def remove_tiles(path: Path, tiles: Sequence[int]) -> None:
    """Set the byte counts of level-0 tiles to zero, in place."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages.first.tags[_TILE_BYTE_COUNTS]
        width = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        start = tag.valueoffset
    with path.open("r+b") as handle:
        for tile in tiles:
            handle.seek(start + tile * width)
            handle.write(bytes(width))
