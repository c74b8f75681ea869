"""A small picture inside a JPEG file, where EXIF keeps it.

The overview of a slide is drawn twice: large, and small with lines as thick as the large one's. One
file holds both, so that a page of hundreds of slides needs no decoder to show the small ones.
"""

from __future__ import annotations

import struct

_MARKER = b"Exif\0\0"
_START_OF_IMAGE = b"\xff\xd8"
_APP0, _APP1, _START_OF_SCAN = 0xE0, 0xE1, 0xDA
_COMPRESSION, _OFFSET, _LENGTH = 0x0103, 0x0201, 0x0202
_SHORT, _LONG = 3, 4
_JPEG = 6
_LARGEST_SEGMENT = 0xFFFF - 2


def embed(jpeg: bytes, thumbnail: bytes) -> bytes:
    """Return `jpeg` with another JPEG as its thumbnail.

    Raises:
        ValueError: the thumbnail is larger than a JPEG segment (64 kB) can hold.
    """
    header = struct.pack("<2sHI", b"II", 42, 8)
    first = struct.pack("<HI", 0, 8 + 6)  # the main picture's directory: no entries
    entries = (
        (_COMPRESSION, _SHORT, _JPEG),
        (_OFFSET, _LONG, 8 + 6 + 2 + 3 * 12 + 4),
        (_LENGTH, _LONG, len(thumbnail)),
    )
    second = struct.pack("<H", len(entries))
    second += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    second += struct.pack("<I", 0)
    content = _MARKER + header + first + second + thumbnail
    if len(content) > _LARGEST_SEGMENT:
        raise ValueError(f"a thumbnail of {len(thumbnail)} bytes does not fit into a JPEG segment")
    at = len(_START_OF_IMAGE)
    if jpeg[at + 1] == _APP0:
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    segment = struct.pack(">BBH", 0xFF, _APP1, len(content) + 2) + content
    return jpeg[:at] + segment + jpeg[at:]


def extract(jpeg: bytes) -> bytes | None:
    """Return the thumbnail of a JPEG, or None where it has none."""
    at = len(_START_OF_IMAGE)
    while jpeg[:2] == _START_OF_IMAGE and at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        body = jpeg[at + 4 : at + 2 + length]
        if marker == _APP1 and body.startswith(_MARKER):
            return _from_tiff(body[len(_MARKER) :])
        if marker == _START_OF_SCAN:
            return None
        at += 2 + length
    return None


def _from_tiff(tiff: bytes) -> bytes | None:
    """Return what the second directory of an EXIF block points at."""
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, first)
        (second,) = struct.unpack_from(order + "I", tiff, first + 2 + 12 * count)
        if second == 0:
            return None
        (count,) = struct.unpack_from(order + "H", tiff, second)
        found = {}
        for i in range(count):
            tag, kind, _, long = struct.unpack_from(order + "HHII", tiff, second + 2 + 12 * i)
            (short,) = struct.unpack_from(order + "H", tiff, second + 2 + 12 * i + 8)
            found[tag] = short if kind == _SHORT else long
    except struct.error:
        return None
    if not {_OFFSET, _LENGTH} <= found.keys():
        return None
    picture = tiff[found[_OFFSET] : found[_OFFSET] + found[_LENGTH]]
    return picture if picture.startswith(_START_OF_IMAGE) else None
