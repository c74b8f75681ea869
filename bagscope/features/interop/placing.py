"""From a foreign bag to ours: level-0 corners in our order, tile sizes, values that are sound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import SchemaError, SlideError, SpacingError
from bagscope.features.interop.foreign import ForeignBag, SlideFacts
from bagscope.wsi.slide import Spacing

_BLOCK_ROWS = 4096
# The corner in question and the lattice's first one may each be rounded by half a pixel.
_LATTICE_TOLERANCE_PX = 1.0
_INT32_MAX = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedBag:
    """A bag in our terms, rows ordered by (y, x).

    Attributes:
        features: (N, D) float16 or float32.
        coords_l0: (N, 2) int32 top-left corners, None for a bag without places.
        grid: (N, 2) int32 (column, row), None where the corners lie on no lattice.
        extra: `coords_source` and `tile_labels`, as far as they exist, in the same row order.
        tile: attributes of a feature file, as far as they are known.
    """

    features: NDArray[np.floating[Any]]
    coords_l0: NDArray[np.int32] | None
    grid: NDArray[np.int32] | None
    extra: Mapping[str, NDArray[Any]]
    tile: Mapping[str, Any]


def place(path: Path, bag: ForeignBag, slide: SlideFacts | None) -> PlacedBag:
    """Convert a foreign bag.

    Raises:
        SchemaError: rows don't match, or a value is not finite.
        SlideError: two tiles in one place, or a tile outside of the slide.
        SpacingError: the pixel size is needed and not known.
    """
    _check_rows(path, bag)
    spacing = _spacing(bag, slide)
    features = sound_features(path, bag.features)
    extent_l0 = _extent_l0(bag, spacing)
    tile = _tile_attributes(bag, slide, spacing, extent_l0)
    extra: dict[str, NDArray[Any]] = {}
    if bag.tile_labels is not None:
        extra["tile_labels"] = _plain_numbers(bag.tile_labels)
    if bag.coords is None:
        return PlacedBag(features=features, coords_l0=None, grid=None, extra=extra, tile=tile)
    exact = _exact_corners_l0(path, bag, spacing, extent_l0)
    corners = np.rint(exact).astype(np.int32)
    _require_inside(path, corners, tile)
    order = np.lexsort((corners[:, 0], corners[:, 1]))
    _require_distinct(path, corners, order)
    extra["coords_source"] = _plain_numbers(bag.coords)
    grid = _grid(exact, tile)
    return PlacedBag(
        features=features[order],
        coords_l0=corners[order],
        grid=None if grid is None else grid[order],
        extra={name: values[order] for name, values in extra.items()},
        tile=tile,
    )


def sound_features(path: Path, values: NDArray[Any]) -> NDArray[np.floating[Any]]:
    """Return features as float16 or float32; float16 stays what it is.

    Raises:
        SchemaError: a value is not finite, or beyond float32; its row is named.
    """
    if values.dtype != np.float16:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
    for start in range(0, len(values), _BLOCK_ROWS):
        block = values[start : start + _BLOCK_ROWS]
        if not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise SchemaError(
                f"{path}: feature {column} of row {start + row} is {block[row, column]}, not a "
                "finite number; extract this slide again"
            )
    return values


def fits_float16(values: NDArray[np.floating[Any]]) -> bool:
    """Return whether float16 holds every value, if rounded."""
    with np.errstate(over="ignore"):
        return not values.size or bool(np.isfinite(np.abs(values).max().astype(np.float16)))


def _check_rows(path: Path, bag: ForeignBag) -> None:
    for name, values in (("coordinates", bag.coords), ("tile labels", bag.tile_labels)):
        if values is not None and len(values) != len(bag.features):
            raise SchemaError(
                f"{path}: {len(bag.features)} features beside {len(values)} {name}; they don't "
                "belong together, extract this slide again"
            )


def _spacing(bag: ForeignBag, slide: SlideFacts | None) -> Spacing | None:
    if slide is not None and slide.spacing is not None:
        return slide.spacing
    if bag.mpp_l0 is not None:
        return Spacing(mpp_x=bag.mpp_l0, mpp_y=bag.mpp_l0, source="imported")
    return None


def _extent_l0(bag: ForeignBag, spacing: Spacing | None) -> float | None:
    if bag.extent_l0 is not None or bag.tile_um is None or spacing is None:
        return bag.extent_l0
    return bag.tile_um / spacing.mpp


def _exact_corners_l0(
    path: Path, bag: ForeignBag, spacing: Spacing | None, extent_l0: float | None
) -> NDArray[np.float64]:
    """Return (N, 2) float64 top-left corners in level-0 pixels, in the rows' own order."""
    assert bag.coords is not None
    corners = np.asarray(bag.coords[:, :2], np.float64)
    if bag.frame == "corner_um":
        if spacing is None:
            raise SpacingError(_ask_for_mpp(path, "its coordinates are in micrometres"))
        corners = corners / spacing.mpp
    elif bag.frame == "centre_l0":
        if extent_l0 is None:
            raise SpacingError(
                _ask_for_mpp(path, "its coordinates are centres and the tile size is in µm")
            )
        corners = corners - extent_l0 / 2
    wrong = ~np.isfinite(corners).all(axis=1) | (np.abs(corners) > _INT32_MAX).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise SchemaError(
            f"{path}: coordinates of row {row} are {bag.coords[row, :2].tolist()}; extract again"
        )
    return corners


def _ask_for_mpp(path: Path, why: str) -> str:
    return (
        f"{path}: {why}, and the level-0 pixel size is not in the file; give the slides with "
        "--slides TABLE, or pass --mpp"
    )


def _require_inside(path: Path, corners: NDArray[np.int32], tile: Mapping[str, Any]) -> None:
    limit = np.array([tile.get("width_l0", _INT32_MAX), tile.get("height_l0", _INT32_MAX)])
    outside = ((corners < 0) | (corners >= limit)).any(axis=1)
    if outside.any():
        row = int(outside.argmax())
        size = f"{tile['width_l0']} x {tile['height_l0']} px" if "width_l0" in tile else "from 0 on"
        raise SlideError(
            f"{path}: row {row} lies at {tuple(corners[row].tolist())}, outside of the slide "
            f"({size}); check that the slide and its pixel size are the right ones"
        )


def _require_distinct(path: Path, corners: NDArray[np.int32], order: NDArray[np.intp]) -> None:
    placed = corners[order]
    same = (placed[1:] == placed[:-1]).all(axis=1)
    if same.any():
        first = int(same.argmax())
        one, other = sorted((int(order[first]), int(order[first + 1])))
        raise SlideError(
            f"{path}: rows {one} and {other} lie in one place, "
            f"{tuple(placed[first].tolist())} in level-0 pixels; extract this slide again"
        )


def _grid(exact: NDArray[np.float64], tile: dict[str, Any]) -> NDArray[np.int32] | None:
    """Return (N, 2) int32 (column, row) where tiles lie on one lattice; state it in `tile`.

    Tools that start a lattice per tissue region, as CLAM does, have none over the slide.
    """
    extent_l0, tile_px = tile.get("extent_l0"), tile.get("tile_px")
    if not len(exact) or not extent_l0:
        return None
    overlap_px = tile.get("overlap_px", 0)
    step_l0 = extent_l0 * (1 - overlap_px / tile_px) if tile_px else extent_l0
    if step_l0 < 1:
        return None
    origin_l0 = exact.min(axis=0)
    cells: NDArray[np.float64] = np.rint((exact - origin_l0) / step_l0)
    if np.abs(origin_l0 + cells * step_l0 - exact).max() > _LATTICE_TOLERANCE_PX:
        return None
    tile |= {"origin_l0": origin_l0, "step_l0": step_l0}
    return cells.astype(np.int32)


def _tile_attributes(
    bag: ForeignBag, slide: SlideFacts | None, spacing: Spacing | None, extent_l0: float | None
) -> dict[str, Any]:
    known: dict[str, Any] = {
        "width_l0": bag.width_l0,
        "height_l0": bag.height_l0,
        "tile_px": bag.tile_px,
        "extent_l0": extent_l0,
        "tile_px_l0": None if extent_l0 is None else round(extent_l0),
        "mpp": bag.mpp,
        "overlap_px": bag.overlap_px,
    }
    if spacing is not None:
        known |= {
            "mpp_x_l0": spacing.mpp_x,
            "mpp_y_l0": spacing.mpp_y,
            "mpp_source": spacing.source,
            "mpp_estimated": spacing.estimated,
        }
        if extent_l0 is not None and bag.tile_px:
            effective = extent_l0 * spacing.mpp / bag.tile_px
            known |= {"mpp_effective": effective, "mpp": bag.mpp or effective}
    if slide is not None and slide.width_l0 is not None:
        known |= {"width_l0": slide.width_l0, "height_l0": slide.height_l0}
        if slide.bounds_l0 is not None:
            bounds = slide.bounds_l0
            known["bounds_l0"] = np.array(
                [bounds.x_l0, bounds.y_l0, bounds.width_l0, bounds.height_l0], np.int64
            )
    return {name: value for name, value in known.items() if value is not None}


def _plain_numbers(values: NDArray[Any]) -> NDArray[Any]:
    """Return whole numbers as int64, others as float64."""
    return values.astype(np.int64 if values.dtype.kind in "iub" else np.float64)
