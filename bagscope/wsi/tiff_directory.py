"""A small reader of TIFF and BigTIFF directories: tags only, no pixels.

It exists because the fast path needs nothing of a TIFF but where its tiles lie, and because
opening a slide must not cost the import of a whole TIFF library. Nothing in a file is believed
before it is checked against the file's size, since damaged slides are everyday input.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.errors import ReadError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUBFILE_TYPE = 254
IMAGE_WIDTH = 256
IMAGE_LENGTH = 257
BITS_PER_SAMPLE = 258
COMPRESSION = 259
PHOTOMETRIC = 262
IMAGE_DESCRIPTION = 270
SAMPLES_PER_PIXEL = 277
PLANAR_CONFIGURATION = 284
TILE_WIDTH = 322
TILE_LENGTH = 323
TILE_OFFSETS = 324
TILE_BYTE_COUNTS = 325
SAMPLE_FORMAT = 339
JPEG_TABLES = 347
IMAGE_DEPTH = 32997

_MAX_DIRECTORIES = 4096
_TYPE_CODES: Mapping[int, str] = {
    1: "u1", 2: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4",
    11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8",
}  # fmt: skip
_TYPE_BYTES: Mapping[int, int] = {
    **{type_: int(code[1:]) for type_, code in _TYPE_CODES.items()},
    5: 8,
    10: 8,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tag of a directory: its TIFF type, number of values, and where the values lie."""

    type: int
    count: int
    value_offset: int

    @property
    def length_bytes(self) -> int:
        """Return how many bytes the values occupy."""
        return self.count * _TYPE_BYTES.get(self.type, 1)


@dataclass(frozen=True, slots=True)
class Directory:
    """The tags of one image of a TIFF file, read from the file when asked for."""

    descriptor: int
    file_bytes: int
    byte_order: str
    entries: Mapping[int, Entry]

    def __contains__(self, tag: int) -> bool:
        return tag in self.entries

    def raw(self, tag: int) -> bytes:
        """Return a tag's bytes as stored, empty where the tag is absent.

        Raises:
            ReadError: the values lie beyond the end of the file.
        """
        entry = self.entries.get(tag)
        if entry is None:
            return b""
        return _read_exactly(
            self.descriptor, entry.value_offset, entry.length_bytes, self.file_bytes
        )

    def values(self, tag: int) -> NDArray[np.int64]:
        """Return a numeric tag's values: (count,) int64, empty where the tag is absent."""
        import numpy as np

        entry = self.entries.get(tag)
        if entry is None or entry.type not in _TYPE_CODES:
            return np.zeros(0, np.int64)
        dtype = np.dtype(_TYPE_CODES[entry.type]).newbyteorder(self.byte_order)  # type: ignore[arg-type]
        return np.frombuffer(self.raw(tag), dtype).astype(np.int64)

    def value(self, tag: int, default: int) -> int:
        """Return the first value of a numeric tag, or `default` where the tag is absent."""
        values = self.values(tag)
        return int(values[0]) if values.size else default

    def text(self, tag: int) -> str:
        """Return a text tag up to its first NUL, empty where the tag is absent."""
        return self.raw(tag).split(b"\0", 1)[0].decode("utf-8", "replace")

    @property
    def is_tiled(self) -> bool:
        """Return whether the image is stored in tiles and not in strips."""
        return TILE_OFFSETS in self.entries and TILE_WIDTH in self.entries


@dataclass(frozen=True, slots=True)
class TiffStructure:
    """All directories of a file, and the byte ranges that describe it (not its pixels).

    `spans` holds (offset, length) of the header, each directory and each value array, in file
    order: what a slide's identity is hashed from.
    """

    directories: tuple[Directory, ...]
    spans: tuple[tuple[int, int], ...]


def looks_like_tiff(head: bytes) -> bool:
    """Return whether a file's first bytes are those of a TIFF or BigTIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_structure(descriptor: int) -> TiffStructure:
    """Read every directory of an open TIFF or BigTIFF file.

    Raises:
        ReadError: not a TIFF, or its directories are damaged.
    """
    file_bytes = os.fstat(descriptor).st_size
    head = os.pread(descriptor, 16, 0)
    if not looks_like_tiff(head) or len(head) < 8:
        raise ReadError("not a TIFF file (its first bytes are not a TIFF header)")
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    if big and len(head) < 16:
        raise ReadError("BigTIFF header is cut short")
    (offset,) = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)
    spans = [(0, 16 if big else 8)]
    directories = []
    seen: set[int] = set()
    while offset:
        if offset in seen or len(seen) >= _MAX_DIRECTORIES:
            raise ReadError("TIFF directories form a loop; the file is damaged")
        seen.add(offset)
        directory, offset, found = _read_directory(descriptor, offset, file_bytes, order, big)
        directories.append(directory)
        spans += found
    if not directories:
        raise ReadError("TIFF file without a single image")
    return TiffStructure(tuple(directories), tuple(sorted(spans)))


def _read_directory(
    descriptor: int, offset: int, file_bytes: int, order: str, big: bool
) -> tuple[Directory, int, list[tuple[int, int]]]:
    """Return one directory, the offset of the next (0 after the last), and its byte ranges."""
    count_format, entry_format, next_format = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    inline_bytes = 8 if big else 4
    count_bytes = struct.calcsize(order + count_format)
    entry_bytes = struct.calcsize(order + entry_format) + inline_bytes
    next_bytes = struct.calcsize(order + next_format)
    (count,) = struct.unpack(
        order + count_format, _read_exactly(descriptor, offset, count_bytes, file_bytes)
    )
    table_bytes = count * entry_bytes
    table = _read_exactly(descriptor, offset + count_bytes, table_bytes + next_bytes, file_bytes)
    entries = {}
    spans = [(offset, count_bytes + table_bytes + next_bytes)]
    for i in range(count):
        tag, type_, values = struct.unpack_from(order + entry_format, table, i * entry_bytes)
        value_at = i * entry_bytes + entry_bytes - inline_bytes
        length = values * _TYPE_BYTES.get(type_, 1)
        if length <= inline_bytes:
            value_offset = offset + count_bytes + value_at
        else:
            (value_offset,) = struct.unpack_from(order + next_format, table, value_at)
            spans.append((value_offset, length))
        entries[tag] = Entry(type_, values, value_offset)
    (following,) = struct.unpack_from(order + next_format, table, table_bytes)
    return Directory(descriptor, file_bytes, order, entries), following, spans


def _read_exactly(descriptor: int, offset: int, length: int, file_bytes: int) -> bytes:
    if offset + length > file_bytes:
        raise ReadError(
            f"TIFF directory points to byte {offset + length:,} of a file of {file_bytes:,}; "
            "the file is cut short or damaged: copy it again"
        )
    data = os.pread(descriptor, length, offset)
    if len(data) != length:
        raise ReadError(f"only {len(data):,} of {length:,} bytes could be read at {offset:,}")
    return data
