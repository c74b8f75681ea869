"""Where a slide's tiles lie, as far as their score file knows.

Frames as in `bagscope.wsi.slide`. Bags that never were a slide get a lattice of their own: one tile
is then one pixel of "level 0".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import SchemaError, SlideError
from bagscope.wsi.outline import MaskFrame
from bagscope.wsi.slide import RectL0

if TYPE_CHECKING:
    from bagscope.wsi.slide import SlideInfo


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TilePlaces:
    """The footprints of a slide's tiles.

    Attributes:
        coords_l0: (n, 2) int32 top-left corners (x, y).
        extent_l0: edge of a footprint.
        step_l0: from one tile to the next.
        origin_l0: (x, y) of the lattice.
        area_l0: the scanned bounds; what the tiles cover where those are not known.
        size_l0: width and height of level 0, None where not known.
        mpp: micrometres per level-0 pixel along x and y, None where not known.
        is_slide: False for bags that never were one, whose places say nothing.
        notes: sentences about what had to be guessed.
    """

    coords_l0: NDArray[np.int32]
    extent_l0: float
    step_l0: float
    origin_l0: tuple[float, float]
    area_l0: RectL0
    size_l0: tuple[int, int] | None
    mpp: tuple[float, float] | None
    is_slide: bool = True
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.coords_l0)

    def frame(self, px_per_step: float, *, longest_px: int | None = None) -> MaskFrame:
        """Return a raster over the scanned area whose pixels are a part of the lattice's step.

        Its origin is the lattice's, so that with a whole `px_per_step` tiles end where pixels do.

        Args:
            px_per_step: pixels per lattice step; may be below 1.
            longest_px: makes pixels larger, where the longer edge would have more of them.
        """
        area = self.area_l0
        right = max(area.x_l0 + area.width_l0, float(self.coords_l0[:, 0].max()) + self.extent_l0)
        bottom = max(area.y_l0 + area.height_l0, float(self.coords_l0[:, 1].max()) + self.extent_l0)
        width_l0, height_l0 = right - self.origin_l0[0], bottom - self.origin_l0[1]
        px_l0 = self.step_l0 / px_per_step
        if longest_px is not None:
            px_l0 = max(px_l0, max(width_l0, height_l0) / longest_px)
        return MaskFrame(
            shape=(
                max(1, round(height_l0 / px_l0)),
                max(1, round(width_l0 / px_l0)),
            ),
            origin_x_l0=self.origin_l0[0],
            origin_y_l0=self.origin_l0[1],
            px_l0_x=px_l0,
            px_l0_y=px_l0,
        )


def places_of(
    coords_l0: NDArray[np.int32] | None,
    grid: NDArray[np.int32] | None,
    tile: Mapping[str, Any],
    count: int,
) -> TilePlaces:
    """Return where tiles lie.

    Args:
        coords_l0: (n, 2), None for bags that never were a slide.
        grid: (n, 2) (column, row), None where there is none.
        tile: attributes of the feature file, as far as they are known.
        count: of tiles.

    Raises:
        SchemaError: places for another number of tiles.
    """
    for name, array in (("coords", coords_l0), ("grid", grid)):
        if array is not None and len(array) != count:
            raise SchemaError(f"{count} scores, but {name} of {len(array)} tiles; predict again")
    if coords_l0 is None:
        return _lattice_alone(grid, count)
    notes: tuple[str, ...] = ()
    extent_l0 = _number(tile, "extent_l0") or _number(tile, "tile_px_l0")
    step_l0 = _number(tile, "step_l0")
    if extent_l0 is None:
        step_l0 = extent_l0 = step_l0 or _smallest_step(coords_l0, single=1.0)
        notes = (f"the tiles' size is not stated; taken for {extent_l0:g} level-0 pixels",)
    step_l0 = step_l0 or min(extent_l0, _smallest_step(coords_l0, single=extent_l0))
    left, top = (float(edge) for edge in coords_l0.min(axis=0))
    right, bottom = (float(edge) + extent_l0 for edge in coords_l0.max(axis=0))
    origin = tile.get("origin_l0")
    bounds = tile.get("bounds_l0")
    area = RectL0(
        x_l0=int(left),
        y_l0=int(top),
        width_l0=math.ceil(right - left),
        height_l0=math.ceil(bottom - top),
    )
    if bounds is not None:
        x, y, width, height = (int(value) for value in bounds)
        area = RectL0(x_l0=x, y_l0=y, width_l0=width, height_l0=height)
    size = (_number(tile, "width_l0"), _number(tile, "height_l0"))
    mpp = (_number(tile, "mpp_x_l0"), _number(tile, "mpp_y_l0"))
    return TilePlaces(
        coords_l0=coords_l0,
        extent_l0=extent_l0,
        step_l0=step_l0,
        origin_l0=(float(origin[0]), float(origin[1])) if origin is not None else (left, top),
        area_l0=area,
        size_l0=None if size[0] is None or size[1] is None else (int(size[0]), int(size[1])),
        mpp=None if mpp[0] is None or mpp[1] is None else (mpp[0], mpp[1]),
        notes=notes,
    )


def require_same_slide(places: TilePlaces, info: SlideInfo, slide_id: str) -> None:
    """Refuse a slide that the tiles were not cut from.

    Raises:
        SlideError: its size or bounds are not those that the tiles state, or tiles lie outside.
    """
    stated, found = places.size_l0, (info.width_l0, info.height_l0)
    if stated is not None and stated != found:
        raise SlideError(
            f"{slide_id}: the slide has {found[0]}×{found[1]} pixels, its tiles were cut from one "
            f"of {stated[0]}×{stated[1]}; correct its path in the cohort, or extract it anew"
        )
    corner, last = places.coords_l0.min(axis=0), places.coords_l0.max(axis=0)
    if (corner < 0).any() or (last >= found).any():
        raise SlideError(
            f"{slide_id}: tiles lie at x={corner[0]}…{last[0]}, y={corner[1]}…{last[1]}, outside "
            f"the slide of {found[0]}×{found[1]} pixels; these are the features of another slide"
        )


def _lattice_alone(grid: NDArray[np.int32] | None, count: int) -> TilePlaces:
    if grid is None:
        columns = math.ceil(math.sqrt(count))
        coords = np.stack([np.arange(count) % columns, np.arange(count) // columns], axis=1)
        note = "never was a slide: its tiles are drawn in their order, row by row"
    else:
        coords = np.asarray(grid)
        note = "has no coordinates: its tiles are drawn on their lattice"
    columns, rows = (int(last) + 1 for last in coords.max(axis=0))
    return TilePlaces(
        coords_l0=coords.astype(np.int32),
        extent_l0=1.0,
        step_l0=1.0,
        origin_l0=(0.0, 0.0),
        area_l0=RectL0(x_l0=0, y_l0=0, width_l0=columns, height_l0=rows),
        size_l0=None,
        mpp=None,
        is_slide=False,
        notes=(note,),
    )


def _smallest_step(coords_l0: NDArray[np.int32], *, single: float) -> float:
    """Return the smallest distance between two columns or rows; `single` where there is but one."""
    steps = [np.diff(np.unique(axis)) for axis in coords_l0.T]
    return float(min((int(step.min()) for step in steps if len(step)), default=single))


def _number(tile: Mapping[str, Any], name: str) -> float | None:
    value = tile.get(name)
    known = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return float(value) if known and value is not None else None
