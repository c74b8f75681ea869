"""Encode tiles as abbreviated JPEG streams, the way Aperio scanners store them.

All tiles of a level share their quantisation and Huffman tables, which stand once in the TIFF tag
JPEGTables; a tile's own stream holds its frame, its scan and nothing else. An `rgb` stream carries
no marker that says so: only the directory's photometric tag tells a decoder not to convert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0", "rgb"]
"""How chroma is stored; "rgb" stores the three colours themselves, unconverted."""

SUBSAMPLING_FACTORS: dict[Subsampling, tuple[int, int]] = {
    "4:4:4": (1, 1),
    "4:2:2": (2, 1),
    "4:2:0": (2, 2),
    "rgb": (1, 1),
}
"""Horizontal and vertical chroma factors, as the TIFF tag YCbCrSubSampling states them."""

_SOI = b"\xff\xd8"
_EOI = b"\xff\xd9"
_SOF0, _DHT, _SOS, _DQT, _APP0, _APP15, _COM = 0xC0, 0xC4, 0xDA, 0xDB, 0xE0, 0xEF, 0xFE


class TileEncoder:
    """Encode RGB tiles of one level; every stream fits the one `tables` block.

    Args:
        quality: libjpeg quality, 1 to 100.
        subsampling: chroma storage.
    """

    def __init__(self, *, quality: int, subsampling: Subsampling) -> None:
        import numpy as np

        self._quality = quality
        self._subsampling = subsampling
        self._headers: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        self.tables, _ = split_stream(self._encode(np.zeros((16, 16, 3), np.uint8)))

    def encode(self, tile: NDArray[np.uint8]) -> bytes:
        """Return the abbreviated stream of one tile, (height, width, 3) uint8 RGB."""
        stream = self._encode(tile)
        shape = (tile.shape[0], tile.shape[1])
        known = self._headers.get(shape)
        if known is not None and stream.startswith(known[0]):
            return known[1] + stream[len(known[0]) :]
        _, abbreviated = split_stream(stream)
        scan = _segments(stream)[-1][1]
        self._headers[shape] = (stream[:scan], abbreviated[: len(abbreviated) - len(stream) + scan])
        return abbreviated

    def _encode(self, tile: NDArray[np.uint8]) -> bytes:
        import numpy as np

        if self._subsampling == "rgb":
            import imagecodecs

            return _renumber_components(
                bytes(
                    imagecodecs.jpeg8_encode(
                        np.ascontiguousarray(tile),
                        level=self._quality,
                        colorspace="rgb",
                        outcolorspace="rgb",
                        subsampling="444",
                    )
                )
            )
        import simplejpeg

        encoded: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(tile),
            quality=self._quality,
            colorspace="RGB",
            colorsubsampling=self._subsampling.replace(":", ""),
        )
        return encoded


def split_stream(stream: bytes) -> tuple[bytes, bytes]:
    """Split a whole JPEG into (tables-only stream, abbreviated stream without tables or APPn)."""
    tables, frame = [_SOI], [_SOI]
    for marker, start, stop in _segments(stream):
        if marker in (_DQT, _DHT):
            tables.append(stream[start:stop])
        elif marker == _SOS:
            frame.append(stream[start:])
        elif not _APP0 <= marker <= _APP15 and marker != _COM:
            frame.append(stream[start:stop])
    return b"".join([*tables, _EOI]), b"".join(frame)


def _segments(stream: bytes) -> list[tuple[int, int, int]]:
    """List (marker, first byte, byte after the last) of each segment up to the scan's header."""
    found = []
    position = 2
    while True:
        marker = stream[position + 1]
        length = int.from_bytes(stream[position + 2 : position + 4], "big")
        found.append((marker, position, position + 2 + length))
        if marker == _SOS:
            return found
        position += 2 + length


def _renumber_components(stream: bytes) -> bytes:
    """Name the colours of an RGB stream 0, 1, 2, as scanners do, in place of the letters R, G, B.

    The letters would tell a decoder that the stream is RGB; real slides leave that to the TIFF.
    """
    patched = bytearray(stream)
    for marker, start, _ in _segments(stream):
        if marker == _SOF0:
            for i in range(3):
                patched[start + 10 + 3 * i] = i
        elif marker == _SOS:
            for i in range(3):
                patched[start + 5 + 2 * i] = i
    return bytes(patched)
