"""Write Aperio-style SVS files: tiled JPEG in a classic TIFF or a BigTIFF.

Tiles are appended as they come, of whichever level; the directories follow the pixels. The head of
the file leaves room for either kind of TIFF, and which one it is gets decided by the final size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal, Self

from bagscope.wsi.synthetic.jpeg_tiles import SUBSAMPLING_FACTORS, Subsampling, TileEncoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AssociatedName = Literal["thumbnail", "label", "macro"]
TileMap = Callable[
    [Callable[["NDArray[np.uint8]"], bytes], "list[NDArray[np.uint8]]"], Iterable[bytes]
]
"""Applies the encoder to tiles in order: `map`, or a thread pool's."""

_LIBRARY = "Aperio Image Library (bagscope synthetic slide)"
_HEAD_BYTES = 16
_CLASSIC_LIMIT_BYTES = 2**32 - 2**24
_SHORT, _LONG, _ASCII, _UNDEFINED, _LONG8 = 3, 4, 2, 7, 16
_VALUE_FORMATS = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}
_Tag = tuple[int, int, "list[int] | bytes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SvsHeader:
    """What the file says of itself.

    Attributes:
        mpp: micrometres per level-0 pixel, or None to leave it unsaid.
        objective: objective power, or None to leave it unsaid.
        extra: further `key = value` entries of the first image description.
    """

    mpp: float | None
    objective: float | None
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class _LevelState:
    width_px: int
    height_px: int
    columns: int
    rows: int
    offsets: list[int] = field(default_factory=list)
    byte_counts: list[int] = field(default_factory=list)


class SvsWriter:
    """An SVS file in the making; a context manager that finishes the file where all went well.

    Args:
        path: the file to make; written in place, so hand over a temporary name.
        level_sizes_px: (width, height) of each level, finest first.
        tile_px: edge of the stored tiles, a multiple of 16.
        header: what the file says of itself.
        quality: libjpeg quality of the tiles, 1 to 100.
        subsampling: chroma storage of the tiles.
        force_bigtiff: write a BigTIFF even where a classic TIFF would do.
        tile_map: how the encoder is applied to the tiles of one row.

    Raises:
        ValueError: the levels or the tile size can't be written, or tiles are missing at the end.
    """

    def __init__(
        self,
        path: Path,
        level_sizes_px: Sequence[tuple[int, int]],
        *,
        tile_px: int,
        header: SvsHeader,
        quality: int,
        subsampling: Subsampling,
        force_bigtiff: bool = False,
        tile_map: TileMap = map,
    ) -> None:
        if tile_px % 16 or tile_px <= 0:
            raise ValueError(f"tile_px is {tile_px}; TIFF needs a positive multiple of 16")
        if any(min(size) < 1 for size in level_sizes_px):
            raise ValueError(f"level sizes are {list(level_sizes_px)}; leave out the empty ones")
        self.encoder = TileEncoder(quality=quality, subsampling=subsampling)
        self._header, self._quality, self._subsampling = header, quality, subsampling
        self._tile_px, self._force_bigtiff, self._tile_map = tile_px, force_bigtiff, tile_map
        self._levels = [
            _LevelState(
                width_px=width,
                height_px=height,
                columns=-(-width // tile_px),
                rows=-(-height // tile_px),
            )
            for width, height in level_sizes_px
        ]
        self._associated: dict[AssociatedName, list[_Tag]] = {}
        self._handle: BinaryIO = path.open("wb")
        self._handle.write(bytes(_HEAD_BYTES))

    def write_tile_row(
        self, level: int, rows: NDArray[np.uint8], known: Mapping[int, bytes] | None = None
    ) -> None:
        """Append the next row of tiles of one level.

        Args:
            level: index of the level.
            rows: (tile_px or what is left, level width, 3) uint8 RGB.
            known: tile column → its stream, for tiles that were encoded before.
        """
        known = known or {}
        state, edge = self._levels[level], self._tile_px
        fresh = [column for column in range(state.columns) if column not in known]
        tiles = [_full_tile(rows[:, c * edge : (c + 1) * edge], edge) for c in fresh]
        streams = dict(zip(fresh, self._tile_map(self.encoder.encode, tiles), strict=True))
        for column in range(state.columns):
            content = known[column] if column in known else streams[column]
            state.offsets.append(self._handle.tell())
            state.byte_counts.append(len(content))
            self._handle.write(content)

    def write_associated(self, name: AssociatedName, image: NDArray[np.uint8]) -> None:
        """Add an associated image, (height, width, 3) uint8 RGB."""
        encoder = TileEncoder(quality=80, subsampling="4:2:0")
        offset = self._handle.tell()
        content = encoder.encode(image)
        self._handle.write(content)
        base, (height, width) = self._levels[0], image.shape[:2]
        line = f"{name} {width}x{height}"
        if name == "thumbnail":
            line = f"{base.width_px}x{base.height_px} -> {width}x{height} - "
        self._associated[name] = [
            (254, _LONG, [{"thumbnail": 0, "label": 1, "macro": 9}[name]]),
            (256, _LONG, [width]),
            (257, _LONG, [height]),
            (258, _SHORT, [8, 8, 8]),
            (259, _SHORT, [7]),
            (262, _SHORT, [6]),
            (270, _ASCII, f"{_LIBRARY}\r\n{line}\0".encode("ascii")),
            (273, _LONG, [offset]),
            (277, _SHORT, [3]),
            (278, _LONG, [height]),
            (279, _LONG, [len(content)]),
            (284, _SHORT, [1]),
            (347, _UNDEFINED, encoder.tables),
            (530, _SHORT, [2, 2]),
            (32997, _LONG, [1]),
        ]

    def _finish(self) -> None:
        """Write the directories and the head; the file is a slide from here on."""
        for index, state in enumerate(self._levels):
            if len(state.offsets) != state.columns * state.rows:
                raise ValueError(
                    f"level {index} got {len(state.offsets)} of {state.columns * state.rows} tiles"
                )
        big = self._force_bigtiff or self._handle.tell() > _CLASSIC_LIMIT_BYTES
        directories = [self._level_tags(index, big) for index in range(len(self._levels))]
        # The second directory is where readers of Aperio files expect the thumbnail.
        if "thumbnail" in self._associated:
            directories.insert(1, self._associated["thumbnail"])
        directories += [self._associated[n] for n in ("label", "macro") if n in self._associated]
        _write_directories(self._handle, directories, big)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._handle:
            if exc_type is None:
                self._finish()

    def _level_tags(self, index: int, big: bool) -> list[_Tag]:
        state = self._levels[index]
        return [
            (254, _LONG, [0]),
            (256, _LONG, [state.width_px]),
            (257, _LONG, [state.height_px]),
            (258, _SHORT, [8, 8, 8]),
            (259, _SHORT, [7]),
            (262, _SHORT, [2 if self._subsampling == "rgb" else 6]),
            (270, _ASCII, self._description(index).encode("ascii") + b"\0"),
            (277, _SHORT, [3]),
            (284, _SHORT, [1]),
            (322, _LONG, [self._tile_px]),
            (323, _LONG, [self._tile_px]),
            (324, _LONG8 if big else _LONG, state.offsets),
            (325, _LONG, state.byte_counts),
            (347, _UNDEFINED, self.encoder.tables),
            (530, _SHORT, list(SUBSAMPLING_FACTORS[self._subsampling])),
            (32997, _LONG, [1]),
        ]

    def _description(self, index: int) -> str:
        base, state, edge = self._levels[0], self._levels[index], self._tile_px
        whole = f"{base.width_px}x{base.height_px}"
        colour = "RGB" if self._subsampling == "rgb" else "YCC"
        text = f"{_LIBRARY}\r\n{whole} [0,0 {whole}] ({edge}x{edge})"
        if index:
            text += f" -> {state.width_px}x{state.height_px} ({edge}x{edge})"
        text += f" JPEG/{colour} Q={self._quality}"
        if index:
            return text
        entries = dict(self._header.extra)
        if self._header.objective is not None:
            entries["AppMag"] = f"{self._header.objective:g}"
        if self._header.mpp is not None:
            entries["MPP"] = f"{self._header.mpp:.6g}"
        return "|".join([text, *(f"{key} = {value}" for key, value in entries.items())])


def write_pyramid(
    path: Path,
    levels: Sequence[NDArray[np.uint8]],
    *,
    tile_px: int,
    header: SvsHeader,
    quality: int,
    subsampling: Subsampling,
    force_bigtiff: bool = False,
    associated: Mapping[AssociatedName, NDArray[np.uint8]] | None = None,
) -> None:
    """Write an SVS from whole arrays of any sizes, one per level; for small files.

    Args:
        path: the file to make; written in place, so hand over a temporary name.
        levels: (height, width, 3) uint8 RGB each, finest first.
        tile_px: edge of the stored tiles.
        header: what the file says of itself.
        quality: libjpeg quality of the tiles, 1 to 100.
        subsampling: chroma storage of the tiles.
        force_bigtiff: write a BigTIFF even where a classic TIFF would do.
        associated: further images by name.
    """
    with SvsWriter(
        path,
        [(level.shape[1], level.shape[0]) for level in levels],
        tile_px=tile_px,
        header=header,
        quality=quality,
        subsampling=subsampling,
        force_bigtiff=force_bigtiff,
    ) as writer:
        for index, level in enumerate(levels):
            for top in range(0, level.shape[0], tile_px):
                writer.write_tile_row(index, level[top : top + tile_px])
        for name, image in (associated or {}).items():
            writer.write_associated(name, image)


def _full_tile(piece: NDArray[np.uint8], edge: int) -> NDArray[np.uint8]:
    """Return `piece` grown to a full tile by repeating its last row and column."""
    import numpy as np

    below, right = edge - piece.shape[0], edge - piece.shape[1]
    if not below and not right:
        return piece
    return np.pad(piece, ((0, below), (0, right), (0, 0)), mode="edge")


def _write_directories(handle: BinaryIO, directories: Sequence[Sequence[_Tag]], big: bool) -> None:
    """Append the chain of directories and fill in the head of the file."""
    entry_format, inline_bytes = ("<HHQ", 8) if big else ("<HHI", 4)
    pointer = "<Q" if big else "<I"
    next_pointer_at = 8 if big else 4
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if big else struct.pack("<2sHI", b"II", 42, 0)
    handle.seek(0)
    handle.write(head)
    for tags in directories:
        handle.seek(0, 2)
        entries = []
        for code, kind, values in tags:
            content, count = _value_bytes(kind, values)
            if len(content) > inline_bytes:
                _align(handle)
                place = handle.tell()
                handle.write(content)
                content = struct.pack(pointer, place)
            entries.append(
                struct.pack(entry_format, code, kind, count) + content.ljust(inline_bytes, b"\0")
            )
        _align(handle)
        start = handle.tell()
        handle.write(struct.pack("<Q" if big else "<H", len(entries)) + b"".join(entries))
        after = handle.tell()
        handle.write(struct.pack(pointer, 0))
        handle.seek(next_pointer_at)
        handle.write(struct.pack(pointer, start))
        next_pointer_at = after


def _value_bytes(kind: int, values: list[int] | bytes) -> tuple[bytes, int]:
    if isinstance(values, bytes):
        return values, len(values)
    return struct.pack(f"<{len(values)}{_VALUE_FORMATS[kind]}", *values), len(values)


def _align(handle: BinaryIO) -> None:
    handle.write(bytes(-handle.tell() % 8))
