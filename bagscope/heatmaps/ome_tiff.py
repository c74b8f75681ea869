"""Heatmaps as pyramidal OME-TIFF: the scores as floats, and as they are coloured.

For QuPath, OMERO, ASAP and whatever reads TIFF. Lossless, tiled, written strip by strip; NaN where
no tile is, white in the colours. PhysicalSize is a pixel's, Position where the image's corner lies
on the slide.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from numpy.typing import NDArray

from bagscope import __version__
from bagscope.artifacts import atomic_file
from bagscope.heatmaps.colours import EMPTY_RGB, ColourScale
from bagscope.heatmaps.raster import pyramid, strips
from bagscope.heatmaps.tile_places import TilePlaces
from bagscope.wsi.geojson import Frame
from bagscope.wsi.outline import MaskFrame

Content = Literal["score", "colour"]

BLOCK_PX = 256
_NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def write_ome_tiff(
    path: Path,
    places: TilePlaces,
    values: NDArray[np.floating],
    colours: ColourScale,
    content: Content,
    *,
    slide_id: str,
    of: str = "",
    frame: Frame = "qupath",
) -> None:
    """Write a heatmap of the scanned area, atomically; the same scores give the same bytes.

    Args:
        path: ends in `.ome.tif`.
        places: of the tiles.
        values: (n,) on the scale of `colours`.
        colours: the cohort's.
        content: the scores (float32), or their colours (8-bit RGB).
        slide_id: for the image's name.
        of: whose scores they are: a class, or empty.
        frame: which origin the position counts from.
    """
    import tifffile

    levels = pyramid(places)
    is_rgb = content == "colour"
    how: dict[str, Any] = {
        "dtype": np.uint8 if is_rgb else np.float32,
        "tile": (BLOCK_PX, BLOCK_PX),
        "compression": "zlib",
        "photometric": "rgb" if is_rgb else "minisblack",
        "metadata": None,
        "maxworkers": 1,
    }
    if is_rgb:
        how["planarconfig"] = "contig"
    about = _description(places, levels[0], colours, is_rgb, slide_id, of, frame)
    with atomic_file(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True) as tiff:
        for number, level in enumerate(levels):
            first = {"description": about.encode(), "subifds": len(levels) - 1}
            further = {"subfiletype": 1}
            tiff.write(
                blocks(places, values, level, colours if is_rgb else None),
                shape=(*level.shape, 3) if is_rgb else level.shape,
                software=False,
                **_resolution(places, level),
                **(further if number else first),
                **how,
            )


def blocks(
    places: TilePlaces,
    values: NDArray[np.floating],
    frame: MaskFrame,
    colours: ColourScale | None,
) -> Iterator[NDArray[Any]]:
    """Yield a raster's blocks row by row, all of one size: scores, or their colours where given."""
    width = frame.shape[1]
    empty: Any = np.nan if colours is None else EMPTY_RGB
    for strip in strips(places, values, frame, multiple=BLOCK_PX):
        pixels: NDArray[Any] = strip if colours is None else colours.rgb(strip)
        for top in range(0, len(strip), BLOCK_PX):
            for left in range(0, width, BLOCK_PX):
                part = pixels[top : top + BLOCK_PX, left : left + BLOCK_PX]
                block = np.empty((BLOCK_PX, BLOCK_PX, *pixels.shape[2:]), pixels.dtype)
                block[:] = empty
                block[: part.shape[0], : part.shape[1]] = part
                yield block


def _resolution(places: TilePlaces, frame: MaskFrame) -> dict[str, Any]:
    if places.mpp is None:
        return {}
    per_cm = [1e4 / (px * mpp) for px, mpp in zip(_px_l0(frame), places.mpp, strict=True)]
    return {"resolution": tuple(per_cm), "resolutionunit": "CENTIMETER"}


def _px_l0(frame: MaskFrame) -> tuple[float, float]:
    return frame.px_l0_x, frame.px_l0_y


def _description(
    places: TilePlaces,
    level: MaskFrame,
    colours: ColourScale,
    is_rgb: bool,
    slide_id: str,
    of: str,
    frame: Frame,
) -> str:
    """Return the OME-XML."""
    height, width = level.shape
    channels = 3 if is_rgb else 1
    size, position = "", ""
    if places.mpp is not None:
        area = places.area_l0
        shift = (area.x_l0, area.y_l0) if frame == "qupath" else (0, 0)
        origin = (level.origin_x_l0, level.origin_y_l0)
        for i, axis in enumerate("XY"):
            um = _px_l0(level)[i] * places.mpp[i]
            at = (origin[i] - shift[i]) * places.mpp[i]
            size += f' PhysicalSize{axis}="{um!r}" PhysicalSize{axis}Unit="µm"'
            position += f' Position{axis}="{at!r}" Position{axis}Unit="µm"'
    name = f"{slide_id} {colours.scale}" + (f" of {of}" if of else "")
    said = (
        f"{colours.title}; colours from {colours.low:g} to {colours.high:g} ({colours.map_name}); "
        f"position in the frame of {frame}"
    )
    pixels = (
        f'ID="Pixels:0" DimensionOrder="XYCZT" Type="{"uint8" if is_rgb else "float"}" '
        f'SizeX="{width}" SizeY="{height}" SizeC="{channels}" SizeZ="1" SizeT="1" '
        f'BigEndian="false" Interleaved="{"true" if is_rgb else "false"}"{size}'
    )
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{_NAMESPACE}" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        f'xsi:schemaLocation="{_NAMESPACE} {_NAMESPACE}/ome.xsd" Creator="bagscope {__version__}">'
        f'<Image ID="Image:0" Name={quoteattr(name)}><Description>{escape(said)}</Description>'
        f'<Pixels {pixels}><Channel ID="Channel:0:0" Name={quoteattr(colours.scale)} '
        f'SamplesPerPixel="{channels}"/><TiffData IFD="0" PlaneCount="1"/>'
        f'<Plane TheZ="0" TheT="0" TheC="0"{position}/></Pixels></Image></OME>'
    )
