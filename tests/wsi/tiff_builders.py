"""Tiled JPEG TIFFs of every kind that the fast path has to tell apart, written with tifffile.

Each stored tile is encoded by itself, so that a test may leave one out, damage it, or drop its
end marker. Pixels change with the position, so that a shifted read shows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray

from tests.builders import field_rgb

FACTORS = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}
APERIO = "Aperio Image Library v1\r\n{w}x{h} [0,0 {w}x{h}] (256x256) JPEG/YCC Q=80|MPP = 0.5"


def build_tiff(
    path: Path,
    *,
    sizes_px: Sequence[tuple[int, int]] = ((700, 500), (175, 125)),
    tile_px: tuple[int, int] = (128, 128),
    chroma: str = "420",
    vendor: str = "generic",
    missing: Mapping[int, Sequence[int]] | None = None,
    edit: Callable[[int, int, bytes], bytes] | None = None,
    byte_order: str = "<",
    bigtiff: bool = False,
    resolution: tuple[float, str] | None = None,
) -> None:
    """Write a tiled JPEG TIFF.

    Args:
        path: the file to make.
        sizes_px: (width, height) of the levels.
        tile_px: (width, height) of the stored tiles.
        chroma: "444", "422", "420", or "rgb" for RGB components without an Adobe marker.
        vendor: "generic", "aperio" or "philips".
        missing: level → numbers of stored tiles to leave out.
        edit: given level, number and stream, returns the stream to store.
        byte_order: "<" or ">".
        bigtiff: as BigTIFF.
        resolution: pixels per unit, and the unit.
    """
    base = field_rgb(*sizes_px[0])
    software: str | None = "bagscope tests"
    description = None
    if vendor == "aperio":
        description = APERIO.format(w=sizes_px[0][0], h=sizes_px[0][1])
    elif vendor == "philips":
        software = "Philips DP v1.0"
        description = philips_xml([sizes_px[0][0] / width for width, _ in sizes_px])
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byte_order) as writer:
        for level, size in enumerate(sizes_px):
            image = cv2.resize(base, size, interpolation=cv2.INTER_AREA) if level else base
            streams = []
            for number, tile in enumerate(_tiles(image, tile_px)):
                stream = encode(tile, chroma)
                if edit is not None:
                    stream = edit(level, number, stream)
                if missing and number in missing.get(level, ()):
                    stream = b""
                streams.append(stream)
            writer.write(
                iter(streams),
                shape=image.shape,
                dtype=np.uint8,
                tile=(tile_px[1], tile_px[0]),
                photometric="rgb" if chroma == "rgb" else "ycbcr",
                compression="jpeg",
                compressionargs={"outcolorspace": "rgb"} if chroma == "rgb" else None,
                subsampling=None if chroma == "rgb" else FACTORS[chroma],
                description=description if level == 0 else None,
                subfiletype=1 if level else 0,
                software=software,
                metadata=None,
                resolution=(resolution[0], resolution[0]) if resolution else None,
                resolutionunit=resolution[1] if resolution else None,
            )


def encode(tile: NDArray[np.uint8], chroma: str) -> bytes:
    """Return one JPEG; of "rgb" nothing in the stream says that its components are RGB."""
    if chroma != "rgb":
        return bytes(simplejpeg.encode_jpeg(tile, 85, "RGB", chroma))
    stream: bytes = imagecodecs.jpeg8_encode(tile, 85, colorspace="RGB", outcolorspace="RGB")
    # SOI, then the Adobe marker that says so.
    assert stream[2:4] == b"\xff\xee"
    length = int.from_bytes(stream[4:6], "big")
    # Component names R, G and B would say so as well; TIFF writers number them.
    frame = stream.index(b"\xff\xc0", 4 + length)
    renamed = bytearray(stream)
    scan = stream.index(b"\xff\xda", frame)
    for i in range(3):
        renamed[frame + 10 + 3 * i] = i + 1
        renamed[scan + 5 + 2 * i] = i + 1
    return bytes(renamed[:2] + renamed[4 + length :])


def _tiles(image: NDArray[np.uint8], tile_px: tuple[int, int]) -> list[NDArray[np.uint8]]:
    width, height = tile_px
    below, right = -image.shape[0] % height, -image.shape[1] % width
    padded = np.pad(image, ((0, below), (0, right), (0, 0)), mode="edge")
    return [
        np.ascontiguousarray(padded[y : y + height, x : x + width])
        for y in range(0, padded.shape[0], height)
        for x in range(0, padded.shape[1], width)
    ]


def philips_xml(downsamples: Sequence[float]) -> str:
    """Return the image description by which OpenSlide knows a Philips TIFF."""
    levels = "".join(
        '<DataObject ObjectType="PixelDataRepresentation">'
        '<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030">'
        f"&quot;{0.00025 * round(d):.8f}&quot; &quot;{0.00025 * round(d):.8f}&quot;</Attribute>"
        "</DataObject>"
        for d in downsamples
    )
    return (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
        '<Attribute Name="DICOM_PIXEL_SPACING">&quot;0.00025&quot; &quot;0.00025&quot;</Attribute>'
        '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE">'
        f"<Array>{levels}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )


def stored_span(path: Path, page: int, number: int) -> tuple[int, int]:
    """Return (offset, byte count) of a stored tile."""
    with tifffile.TiffFile(path) as file:
        found = file.pages[page]
        return found.dataoffsets[number], found.databytecounts[number]


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Put bytes into a file in place."""
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(content)


def move_tile_beyond_end(path: Path, page: int, number: int) -> None:
    """Let a stored tile's offset point past the end of the file, as a cut-short copy has it."""
    with tifffile.TiffFile(path) as file:
        tag = file.pages[page].tags["TileOffsets"]
        code = {3: "H", 4: "I", 16: "Q"}[int(tag.dtype)]
        place = tag.valueoffset + struct.calcsize(code) * number
        order = file.byteorder
    overwrite(path, place, struct.pack(order + code, path.stat().st_size + 10))
