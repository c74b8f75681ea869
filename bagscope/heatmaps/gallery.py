"""The gallery of a heatmap: the tiles with the highest and the lowest scores, cut from the slide.

Each tile is read where the model's tile was and at the resolution that the model saw, so that its
picture is what the model had before it. A tile that can't be read is said to be so, and has no
picture.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import portable_name_problem
from bagscope.errors import SlideError, first_line
from bagscope.heatmaps.choices import GalleryOptions
from bagscope.heatmaps.tile_places import TilePlaces
from bagscope.wsi.geometry import ReadPlan, plan_read
from bagscope.wsi.opening import BackendName, open_slide
from bagscope.wsi.overlay import encode_jpeg

if TYPE_CHECKING:
    from bagscope.heatmaps.colours import ColourScale
    from bagscope.wsi.slide import Slide

Side = Literal["top", "bottom"]
SIDES: tuple[Side, ...] = get_args(Side)
Picture = NDArray[np.uint8]
Rows = NDArray[np.intp]

CSV_NAME = "gallery.csv"
UNSTATED_TILE_PX = 256
"""The edge of a picture, where features do not say what the model saw."""

_JPEG_QUALITY = 90
_FRAME_PX = 2
_FRAME_RGB = (0, 0, 0)
_NOTHING_RGB = (160, 160, 160)


class Cut(NamedTuple):
    """Tiles cut from a slide.

    Attributes:
        images: (px, px, 3) uint8 RGB each; None where the tile could not be read.
        problems: one sentence per cause.
    """

    images: list[Picture | None]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GalleryPart:
    """The scores that one gallery shows.

    Attributes:
        of: whose scores they are: a class, or empty.
        values: (n,) of each tile.
        colours: their scale.
    """

    of: str
    values: NDArray[np.floating[Any]]
    colours: ColourScale


# --- which tiles ----------------------------------------------------------------------------


def pick_tiles(
    values: NDArray[np.floating[Any]],
    coords_l0: NDArray[np.int32],
    count: int,
    side: Side,
    *,
    min_distance_l0: float = 0.0,
    barred: Sequence[int] | Rows = (),
) -> Rows:
    """Return the rows of the highest or lowest scores, the most extreme first.

    Equal scores come in the tiles' order. A tile nearer than `min_distance_l0` to one that was
    picked before it is passed over.

    Args:
        values: (n,); NaN is never picked.
        coords_l0: (n, 2) top-left corners (x, y).
        count: of tiles, at most.
        side: "top" for the highest.
        min_distance_l0: between corners.
        barred: rows that are not to be picked.
    """
    numbers = np.asarray(values, np.float64)
    order = np.argsort(-numbers if side == "top" else numbers, kind="stable")
    free = ~np.isnan(numbers)
    free[np.asarray(barred, np.intp)] = False
    corners = coords_l0.astype(np.float64)
    picked: list[int] = []
    while len(picked) < count:
        left = order[free[order]]
        if not len(left):
            break
        row = int(left[0])
        picked.append(row)
        apart = np.hypot(*(corners - corners[row]).T)
        free &= apart >= min_distance_l0
        free[row] = False
    return np.array(picked, np.intp)


def pick_sides(
    values: NDArray[np.floating[Any]],
    places: TilePlaces,
    count: int,
    *,
    min_distance_l0: float = 0.0,
) -> dict[Side, Rows]:
    """Return the rows of both sides: each is picked from its own half of the tiles.

    Where tiles must lie apart, a small slide would else show as its lowest what is higher than what
    it shows as its highest.
    """
    numbers = np.asarray(values, np.float64)
    order = np.argsort(-numbers, kind="stable")[: np.count_nonzero(~np.isnan(numbers))]
    higher, lower = np.split(order, [math.ceil(len(order) / 2)])

    def picked(side: Side, others: Rows) -> Rows:
        coords = places.coords_l0
        return pick_tiles(
            numbers, coords, count, side, min_distance_l0=min_distance_l0, barred=others
        )

    return {"top": picked("top", lower), "bottom": picked("bottom", higher)}


# --- their pixels ---------------------------------------------------------------------------


def open_as_tiled(
    path: Path, tile: Mapping[str, Any], *, mpp: float | None = None, scene: int | None = None
) -> tuple[Slide, tuple[str, ...]]:
    """Open a slide with the backend that its tiles were read with.

    Where that one does not open it here another does, and a sentence says so.

    Args:
        path: of the slide.
        tile: attributes of the feature file.
        mpp: pixel size stated in the cohort table.
        scene: image of a file that holds several.

    Raises:
        SlideError: nothing here opens it.
    """
    stated = tile.get("backend")
    if stated not in get_args(BackendName):
        return open_slide(path, mpp=mpp, scene=scene), ()
    try:
        return open_slide(path, mpp=mpp, scene=scene, backend=stated), ()
    except SlideError as error:
        opened = open_slide(path, mpp=mpp, scene=scene)
        return opened, (
            f"tiles were read with backend {stated}, which does not open the slide here "
            f"({first_line(error)}); their pictures are read with {opened.info.backend} and may "
            "differ a little",
        )


def cutting_plan(slide: Slide, places: TilePlaces, tile_px: float | None) -> ReadPlan:
    """Return how a footprint is read at the resolution that the model saw; needs no pixel size.

    Args:
        slide: an open slide.
        places: of the tiles.
        tile_px: edge of the model's tiles; a picture of `UNSTATED_TILE_PX` where it is not known.
    """
    edge_px = int(tile_px) if tile_px else UNSTATED_TILE_PX
    # Only the ratio counts: level-0 pixels per pixel of the picture.
    return plan_read(
        [level.downsample for level in slide.info.levels],
        1.0,
        mpp=places.extent_l0 / edge_px,
        tile_px=edge_px,
        allow_upsampling=True,
    )


def cut_tiles(
    slide: Slide,
    places: TilePlaces,
    indices: Sequence[int] | Rows,
    plan: ReadPlan,
    *,
    context: float = 0.0,
    threads: int = 1,
) -> Cut:
    """Cut tiles from their slide.

    Args:
        slide: an open slide, the one that the tiles are of.
        places: of all tiles.
        indices: which of them.
        plan: how a tile is read (`cutting_plan`).
        context: tile edges of surroundings on every side; the tile itself is then in a frame,
            drawn just outside it. Surroundings that can't be read, or are none, are grey.
        threads: for reading.
    """
    corners = places.coords_l0[np.asarray(indices, np.intp)]
    batch = slide.read_tiles(corners, plan, threads=threads)
    images: list[Picture | None] = [
        image if readable else None
        for image, readable in zip(batch.images, batch.readable.tolist(), strict=True)
    ]
    if context <= 0:
        return Cut(images, batch.problems)
    margin_px = max(_FRAME_PX + 1, round(context * plan.tile_px))
    margin_lv = max(1, round(margin_px * plan.region_px / plan.tile_px))
    wide = replace(
        plan,
        tile_px=plan.tile_px + 2 * margin_px,
        region_px=plan.region_px + 2 * margin_lv,
    )
    there = np.flatnonzero(batch.readable)
    corners_lv = np.rint(corners[there] / plan.downsample) - margin_lv
    shifted = np.rint(corners_lv * plan.downsample).astype(np.int32)
    around = slide.read_tiles(shifted, wide, threads=threads)
    level = slide.info.levels[plan.level]
    centres_lv = (np.arange(wide.tile_px) + 0.5) * wide.region_px / wide.tile_px
    for place, corner, picture, readable in zip(
        there.tolist(), corners_lv, around.images, around.readable, strict=True
    ):
        x_lv, y_lv = corner[:, None] + centres_lv
        outside_x = (x_lv < 0) | (x_lv > level.width_px)
        outside_y = (y_lv < 0) | (y_lv > level.height_px)
        picture[outside_y[:, None] | outside_x | ~readable] = _NOTHING_RGB
        images[place] = _framed(picture, batch.images[place], margin_px)
    return Cut(images, (*batch.problems, *around.problems))


def _framed(picture: Picture, tile: Picture, margin_px: int) -> Picture:
    """Lay a tile into the middle of its surroundings, in a frame that hides none of it."""
    outer = np.s_[margin_px - _FRAME_PX : margin_px + len(tile) + _FRAME_PX]
    inner = np.s_[margin_px : margin_px + len(tile)]
    picture[outer, outer] = _FRAME_RGB
    picture[inner, inner] = tile
    return picture


# --- files ----------------------------------------------------------------------------------


def write_gallery(
    folder: Path,
    slide: Slide,
    places: TilePlaces,
    parts: Sequence[GalleryPart],
    *,
    slide_id: str,
    tile_px: float | None,
    options: GalleryOptions,
    source: str = "",
    warning: str = "",
) -> tuple[str, ...]:
    """Write a gallery into a folder that is made: a JPEG per tile, a table, a picture per part.

    Args:
        folder: to make.
        slide: an open slide, the one that the tiles are of.
        places: of the tiles.
        parts: of each class, or one alone.
        slide_id: as in the cohort.
        tile_px: edge of the model's tiles, None where it is not known.
        options: which tiles, and how.
        source: where the scores come from, for the picture.
        warning: why the heatmap is not to be believed; empty where it can be.

    Returns:
        Sentences for the user.
    """
    from bagscope.heatmaps.gallery_sheet import Shown, draw_sheet, locate

    plan = cutting_plan(slide, places, tile_px)
    notes = [] if tile_px else [f"the model's tile size is not stated; cut at {plan.tile_px} px"]
    folder.mkdir(parents=True, exist_ok=True)
    locator = locate(slide, places)
    rows: list[list[object]] = []
    names = _file_names(parts)
    for part, name in zip(parts, names, strict=True):
        picked = pick_sides(
            part.values, places, options.count, min_distance_l0=options.apart * places.extent_l0
        )
        shown = []
        for side in SIDES:
            cut = cut_tiles(slide, places, picked[side], plan, context=options.context)
            notes += [f"gallery: {problem}" for problem in cut.problems]
            for rank, (row, image) in enumerate(
                zip(picked[side].tolist(), cut.images, strict=True), 1
            ):
                file = "" if image is None else f"{side}_{rank:02d}{name}.jpg"
                value, (x_l0, y_l0) = float(part.values[row]), places.coords_l0[row].tolist()
                if image is not None:
                    (folder / file).write_bytes(encode_jpeg(image, quality=_JPEG_QUALITY))
                rows.append([side, rank, part.of, row, f"{value:.9g}", x_l0, y_l0, file])
                shown.append(Shown(side=side, rank=rank, row=row, value=value, image=image))
        sheet = draw_sheet(
            shown,
            part,
            places,
            locator,
            slide_id=slide_id,
            options=options,
            source=source,
            warning=warning,
        )
        (folder / f"gallery{name}.png").write_bytes(sheet)
    (folder / CSV_NAME).write_text(_table(rows), encoding="utf-8")
    return tuple(dict.fromkeys(notes))


def _table(rows: Sequence[Sequence[object]]) -> str:
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["side", "rank", "class", "tile", "value", "x_l0", "y_l0", "file"])
    writer.writerows(rows)
    return content.getvalue()


def _file_names(parts: Sequence[GalleryPart]) -> list[str]:
    """Return what each part's files are called by: its class, or its number where that is none."""
    folded = [part.of.casefold() for part in parts]
    return [
        ""
        if not part.of
        else f"_{place}"
        if portable_name_problem(part.of) or folded.count(part.of.casefold()) > 1
        else f"_{part.of}"
        for place, part in enumerate(parts)
    ]
