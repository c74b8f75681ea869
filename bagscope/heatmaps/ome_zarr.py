"""Heatmaps as OME-Zarr 0.5 (Zarr v3): the scores as floats, and as they are coloured.

For napari and other NGFF readers. Axes c, y, x; every level is drawn from the tiles. In NGFF a
translation is where a pixel's centre lies, with the centre of the slide's first pixel at 0; so a
viewer without interpolation lays the map on the slide to the pixel.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagscope.heatmaps.colours import ColourScale, lookup_table
from bagscope.heatmaps.ome_tiff import Content
from bagscope.heatmaps.raster import pyramid, strips
from bagscope.heatmaps.tile_places import TilePlaces
from bagscope.wsi.geojson import Frame
from bagscope.wsi.outline import MaskFrame

if TYPE_CHECKING:
    from bagscope.artifacts import Json

VERSION = "0.5"
CHUNK_PX = 512
_RGB_NAMES = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))


def write_ome_zarr(
    folder: Path,
    places: TilePlaces,
    values: NDArray[np.floating],
    colours: ColourScale,
    content: Content,
    *,
    slide_id: str,
    of: str = "",
    frame: Frame = "qupath",
) -> None:
    """Write a heatmap of the scanned area into a new folder, which the caller makes atomic.

    Args:
        folder: ends in `.ome.zarr`.
        places: of the tiles.
        values: (n,) on the scale of `colours`.
        colours: the cohort's.
        content: the scores (float32, one channel, NaN where no tile is), or their colours (8-bit
            red, green and blue).
        slide_id: for the image's name.
        of: whose scores they are: a class, or empty.
        frame: which origin the translation counts from.
    """
    import zarr

    levels = pyramid(places)
    is_rgb = content == "colour"
    name = f"{slide_id} {colours.scale}" + (f" of {of}" if of else "")
    group = zarr.create_group(folder, zarr_format=3)
    for number, level in enumerate(levels):
        height, width = level.shape
        array = group.create_array(
            str(number),
            shape=(3 if is_rgb else 1, height, width),
            chunks=(1, min(CHUNK_PX, height), min(CHUNK_PX, width)),
            dtype="uint8" if is_rgb else "float32",
            fill_value=255 if is_rgb else np.nan,
            dimension_names=("c", "y", "x"),
        )
        top = 0
        for strip in strips(places, values, level, multiple=CHUNK_PX):
            pixels: NDArray[Any] = np.moveaxis(colours.rgb(strip), 2, 0) if is_rgb else strip[None]
            array[:, top : top + len(strip), :] = pixels
            top += len(strip)
    group.attrs["ome"] = {
        "version": VERSION,
        "multiscales": [_multiscale(places, levels, name, frame)],
        "omero": _omero(colours, is_rgb, name),
    }


def _multiscale(
    places: TilePlaces, levels: list[MaskFrame], name: str, frame: Frame
) -> dict[str, Json]:
    # Without a pixel size the unit is the slide's own pixel, which has no name in the standard.
    unit = {} if places.mpp is None else {"unit": "micrometer"}
    mpp_x, mpp_y = places.mpp or (1.0, 1.0)
    area = places.area_l0
    left, top = (area.x_l0, area.y_l0) if frame == "qupath" else (0, 0)
    datasets = []
    for number, level in enumerate(levels):
        x_l0 = level.origin_x_l0 - left + (level.px_l0_x - 1) / 2
        y_l0 = level.origin_y_l0 - top + (level.px_l0_y - 1) / 2
        datasets.append(
            {
                "path": str(number),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0, level.px_l0_y * mpp_y, level.px_l0_x * mpp_x]},
                    {"type": "translation", "translation": [0.0, y_l0 * mpp_y, x_l0 * mpp_x]},
                ],
            }
        )
    return {
        "name": name,
        "axes": [
            {"name": "c", "type": "channel"},
            {"name": "y", "type": "space", **unit},
            {"name": "x", "type": "space", **unit},
        ],
        "datasets": datasets,
        "type": "each level drawn from the tiles, not resampled",
    }


def _omero(colours: ColourScale, is_rgb: bool, name: str) -> dict[str, Json]:
    """Return how viewers are to show the channels."""
    if is_rgb:
        shown = [(label, colour, 0.0, 255.0) for label, colour in _RGB_NAMES]
    else:
        brightest = "".join(f"{part:02X}" for part in lookup_table(colours.map_name)[-1].tolist())
        shown = [(colours.scale, brightest, colours.low, colours.high)]
    return {
        "name": name,
        "channels": [
            {
                "label": label,
                "color": colour,
                "active": True,
                "window": {"min": low, "max": high, "start": low, "end": high},
            }
            for label, colour, low, high in shown
        ],
    }
