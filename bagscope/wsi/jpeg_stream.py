"""JPEG streams out of TIFF tiles: spliced tables, a stated colour space, strict decoding.

A TIFF tile holds an abbreviated JPEG: the tables stand once per image, and whether its three
components are RGB or YCbCr stands in the TIFF and not in the JPEG. A decoder that sees the tile
alone would guess YCbCr. So the stream that is decoded is

    SOI  APP14 (the colour space)  tables  tile without its SOI and without APP0 and APP14

Decoding is exact (slow DCT, smooth chroma) and strict: libjpeg-turbo fills what is missing of a
damaged tile with grey and only warns, and such a tile must not pass as tissue.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from bagscope.errors import ReadError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SOI = b"\xff\xd8"
_EOI = b"\xff\xd9"
_APP0, _APP14 = 0xE0, 0xEE
_SOS = 0xDA
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_HARMLESS = "extraneous bytes before marker 0xd9"
"""Padding between the last coefficient and the end marker: every pixel was decoded before it."""


def stream_prefix(tables: bytes, *, is_rgb: bool) -> bytes:
    """Return what precedes each tile of one TIFF image: SOI, APP14 and the tables.

    Args:
        tables: the image's JPEGTables tag, empty where it has none.
        is_rgb: the components are RGB (TIFF photometric 2), else YCbCr (6).
    """
    transform = 0 if is_rgb else 1
    app14 = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, transform)
    body = b""
    if tables:
        body = without_colour_markers(tables)[len(_SOI) :].removesuffix(_EOI)
    return _SOI + app14 + body


def complete_stream(prefix: bytes, stored: bytes) -> bytes:
    """Return a decodable JPEG from a stored tile.

    Raises:
        ReadError: the tile's bytes are not a JPEG.
    """
    if stored[:2] != _SOI:
        raise ReadError(f"stored tile does not start like a JPEG (first bytes {stored[:4].hex()})")
    if stored[2:4] in (b"\xff\xe0", b"\xff\xee"):
        stored = without_colour_markers(stored)
    # Some writers leave the end marker out. Adding it makes a complete scan decode without a
    # warning, while a scan that lacks data still warns.
    end = b"" if stored.endswith(_EOI) else _EOI
    return b"".join((prefix, stored[2:], end))


def without_colour_markers(stream: bytes) -> bytes:
    """Return a JPEG stream without its APP0 and APP14 segments, which state a colour space.

    Raises:
        ReadError: the stream's header is damaged.
    """
    kept = [_SOI]
    position = 2
    while position + 4 <= len(stream):
        if stream[position] != 0xFF:
            raise ReadError(f"damaged JPEG header at byte {position}")
        marker = stream[position + 1]
        if marker in _STANDALONE or marker == 0xFF:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == _SOS:
            break
        length = 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
        if marker not in (_APP0, _APP14):
            kept.append(stream[position : position + length])
        position += length
    kept.append(stream[position:])
    return b"".join(kept)


def cached_buffer(height_px: int, width_px: int, channels: int = 3) -> NDArray[np.uint8]:
    """Return an array (height_px, width_px, channels) to decode into and then read at once.

    libjpeg-turbo writes rows that start at a multiple of 32 bytes past the processor's cache,
    straight to memory. Half a step off, the pixels are still in the cache when they are copied or
    reduced, which is a fifth faster over all.
    """
    import numpy as np

    length = height_px * width_px * channels
    memory = np.empty(length + 64, np.uint8)
    start = (16 - memory.ctypes.data) % 32
    return memory[start : start + length].reshape(height_px, width_px, channels)


def decode_rgb(stream: bytes, out: NDArray[np.uint8], *, reduce: int = 1) -> None:
    """Decode a JPEG into `out` (H, W, 3) uint8 RGB, C-contiguous.

    Args:
        stream: a complete JPEG of `reduce` times the size of `out`.
        out: where the pixels go; with a fourth channel it is RGB and padding.
        reduce: 1, or 2, 4 or 8 to decode at that fraction of the size by a scaled DCT.

    Raises:
        ReadError: damaged, cut short, or of another size.
    """
    import simplejpeg

    height_px, width_px = out.shape[:2]
    colours = "RGBX" if out.shape[2] == 4 else "RGB"
    smallest = {"min_height": height_px, "min_width": width_px} if reduce > 1 else {}
    try:
        if reduce > 1:
            stored_height_px, stored_width_px = simplejpeg.decode_jpeg_header(stream)[:2]
            found = (stored_height_px, stored_width_px)
            _require_size(found, (height_px * reduce, width_px * reduce))
        try:
            image = simplejpeg.decode_jpeg(stream, colours, buffer=out, **smallest)
        except ValueError as error:
            if _HARMLESS not in str(error):
                raise
            image = simplejpeg.decode_jpeg(stream, colours, buffer=out, strict=False, **smallest)
    except ValueError as error:
        raise ReadError(f"stored tile does not decode ({error})") from error
    _require_size(image.shape[:2], (height_px, width_px))


def _require_size(found: tuple[int, int], due: tuple[int, int]) -> None:
    if found != due:
        raise ReadError(f"stored tile is {found[1]}×{found[0]} px where {due[1]}×{due[0]} are due")


def chroma_subsampling(stream: bytes) -> str:
    """Return a complete JPEG's chroma subsampling: "444", "422", "420", "440", "411" or "Gray".

    Raises:
        ReadError: the header is damaged.
    """
    import simplejpeg

    try:
        return str(simplejpeg.decode_jpeg_header(stream)[3])
    except ValueError as error:
        raise ReadError(f"stored tile's header does not decode ({error})") from error
