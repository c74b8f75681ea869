"""A heatmap as objects that QuPath opens: tiles with measurements, hot regions, the tissue.

Frames as in `bagscope.wsi.geojson`. QuPath reads `.geojson` and a `.zip` of it, but no `.gz`.
"""

from __future__ import annotations

import contextlib
import gzip
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import atomic_file
from bagscope.errors import ConfigError
from bagscope.heatmaps.choices import MAX_TILES, ScaleName
from bagscope.heatmaps.colours import ColourScale
from bagscope.heatmaps.raster import cell_count, cells_of
from bagscope.heatmaps.tile_places import TilePlaces
from bagscope.wsi.geojson import Frame, region_texts
from bagscope.wsi.outline import MaskFrame, Polygon, Region, polygons

if TYPE_CHECKING:
    from bagscope.artifacts import Json
    from bagscope.wsi.slide import Rgb

LEVELS: Mapping[ScaleName, tuple[float, ...]] = {
    "ratio": (2.0, 4.0),
    "percentile": (90.0, 99.0),
    "probability": (0.5, 0.9),
    "rollout": (2.0, 4.0),
    "contribution": (),
    "logit": (),
}
"""From which score on a region counts as hot, where nobody says."""

_MAX_CELLS = 1 << 26
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def tile_regions(
    places: TilePlaces, measurements: Mapping[str, NDArray[np.floating]], colours: NDArray[np.uint8]
) -> Iterator[Region]:
    """Yield each tile as an object of type `tile`, with its measurements and its colour (n, 3)."""
    corners = places.coords_l0.astype(np.float64)
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * places.extent_l0
    columns = {
        name: np.asarray(values, np.float64).tolist() for name, values in measurements.items()
    }
    for i, rgb in enumerate(colours.tolist()):
        yield Region(
            class_name="",
            polygons=(Polygon(exterior_l0=corners[i] + square),),
            object_type="tile",
            colour=(rgb[0], rgb[1], rgb[2]),
            measurements={name: _short(values[i]) for name, values in columns.items()},
        )


def hot_regions(
    places: TilePlaces,
    values: NDArray[np.floating],
    level: float,
    colours: ColourScale,
    *,
    measurements: Mapping[str, float] | None = None,
) -> list[Region]:
    """Return the areas with scores of at least `level`, one annotation per connected fragment.

    Neighbouring tiles are merged and holes are kept; every corner is a tile's corner. Where tiles
    overlap their mean counts. Each region has its own measurements and the given ones.
    """
    import cv2

    cells = cells_of(places, values)
    hot = np.nan_to_num(cells.values, nan=-np.inf) >= np.float32(level)
    unit = MaskFrame(shape=hot.shape, origin_x_l0=0, origin_y_l0=0, px_l0_x=1, px_l0_y=1)
    labels = cv2.connectedComponents(hot.view(np.uint8), connectivity=4, ltype=cv2.CV_32S)[1]
    area = np.outer(np.diff(cells.y_edges_l0), np.diff(cells.x_edges_l0)).ravel()
    flat: NDArray[np.int32] = labels.ravel().astype(np.int32)
    scores = np.nan_to_num(cells.values).ravel().astype(np.float64)
    areas_l0 = np.bincount(flat, area)
    means = np.bincount(flat, area * scores) / np.maximum(areas_l0, 1)
    highest = np.full(len(areas_l0), -np.inf)
    np.maximum.at(highest, flat, scores)
    centre = places.coords_l0 + places.extent_l0 / 2
    column = np.searchsorted(cells.x_edges_l0, centre[:, 0], "right") - 1
    row = np.searchsorted(cells.y_edges_l0, centre[:, 1], "right") - 1
    tiles = np.bincount(labels[row, column], minlength=len(areas_l0))
    named = f"{colours.scale} ≥ {level:g}"
    if colours.shows == "disagreement":
        named = f"disagreement on {named}"
    found = []
    for shape in polygons(hot, unit):
        corner = shape.exterior_l0[np.lexsort(shape.exterior_l0.T)[0]].astype(np.intp)
        label = labels[corner[1], corner[0]]
        measured = {
            **(measurements or {}),
            "tiles": float(tiles[label]),
            f"mean {colours.scale}": _short(means[label]),
            f"highest {colours.scale}": _short(highest[label]),
        }
        if places.mpp is not None:
            measured["area mm²"] = _short(areas_l0[label] * places.mpp[0] * places.mpp[1] / 1e6)
        found.append(
            Region(
                class_name=named,
                polygons=(_on_edges(shape, cells.x_edges_l0, cells.y_edges_l0),),
                colour=_rgb(colours, level),
                measurements=measured,
            )
        )
    return found


def write_geojson(
    path: Path,
    places: TilePlaces,
    values: NDArray[np.floating],
    colours: ColourScale,
    *,
    slide_id: str,
    measurements: Mapping[str, NDArray[np.floating]],
    levels: Sequence[float] | None = None,
    max_tiles: int = MAX_TILES,
    tissue: Sequence[Region] = (),
    frame: Frame = "qupath",
    about: Mapping[str, Json] | None = None,
    facts: Mapping[str, float] | None = None,
) -> tuple[str, ...]:
    """Write a heatmap as a FeatureCollection, atomically, one object after another.

    Args:
        path: ends in `.geojson`, `.geojson.gz` or `.geojson.zip`.
        places: of the tiles.
        values: (n,) on the scale of `colours`.
        colours: the cohort's.
        slide_id: makes ids unique across slides.
        measurements: (n,) by name, written with each tile.
        levels: from which score on a region is hot; the scale's usual ones if None.
        max_tiles: with more tiles than this only regions are written.
        tissue: its outlines, in level-0 pixels.
        frame: where the file's (0, 0) lies.
        about: what the file's `bagscope` member says of the heatmap; QuPath drops it on saving.
        facts: measurements of every hot region, for QuPath.

    Returns:
        Sentences for the user.
    """
    if levels is None:
        levels = LEVELS[colours.scale] if colours.shows == "score" else ()
    notes = []
    if levels and cell_count(places) > _MAX_CELLS:
        notes.append("the tiles lie on no lattice: no regions are drawn of them")
        levels = ()
    hot = [
        region
        for level in levels
        for region in hot_regions(places, values, level, colours, measurements=facts)
    ]
    regions = [*tissue, *hot]
    shows_tiles = len(places) <= max_tiles
    if not shows_tiles and not regions:
        raise ConfigError(
            f"{slide_id}: {len(places):,} tiles are more than --max-tiles {max_tiles:,}, and there "
            "is no region to show; name levels with --levels, or raise --max-tiles"
        )

    def everything() -> Iterator[Region]:
        yield from regions
        if shows_tiles:
            yield from tile_regions(places, measurements, colours.rgb(values))

    texts = region_texts(
        everything(),
        bounds_l0=places.area_l0,
        slide_name=slide_id,
        frame=frame,
        class_names={region.class_name for region in regions},
        about=about,
    )
    with atomic_file(path) as temporary, _opened(temporary, path) as write:
        for text in texts:
            write(text.encode())
    if not shows_tiles:
        notes.append(
            f"{len(places):,} tiles: {path.name} has regions only "
            f"(--max-tiles {len(places)} for all)"
        )
    return tuple(notes)


@contextlib.contextmanager
def _opened(temporary: Path, path: Path) -> Iterator[Callable[[bytes], object]]:
    """Open a file as its final name says; the same content gives the same bytes."""
    with temporary.open("wb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as gzipped:
                yield gzipped.write
        elif path.suffix == ".zip":
            about = zipfile.ZipInfo(path.stem, date_time=_ZIP_DATE)
            about.compress_type = zipfile.ZIP_DEFLATED
            with zipfile.ZipFile(file, "w") as archive, archive.open(about, "w") as entry:
                yield entry.write
        else:
            yield file.write


def _on_edges(
    shape: Polygon, x_edges_l0: NDArray[np.float64], y_edges_l0: NDArray[np.float64]
) -> Polygon:
    """Carry a polygon of cell numbers to level 0."""
    rings = [
        np.stack(
            [x_edges_l0[ring[:, 0].astype(np.intp)], y_edges_l0[ring[:, 1].astype(np.intp)]], 1
        )
        for ring in shape.rings_l0
    ]
    return Polygon(exterior_l0=rings[0], holes_l0=tuple(rings[1:]))


def _rgb(colours: ColourScale, value: float) -> Rgb:
    red, green, blue = colours.rgb(np.array([value]))[0].tolist()
    return red, green, blue


def _short(value: float) -> float:
    """Return a number as it is worth writing: six digits."""
    return float(f"{value:.6g}")
