"""Tiles on lattices of chosen geometry, for tests of heatmaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bagscope.heatmaps.tile_places import TilePlaces, places_of


def made_places(
    columns: int = 5,
    rows: int = 4,
    *,
    extent_l0: float = 64.0,
    step_l0: float | None = None,
    origin_l0: tuple[float, float] = (0.0, 0.0),
    margin_l0: int = 0,
    mpp: float | None = 0.5,
    keep: NDArray[np.bool_] | None = None,
) -> TilePlaces:
    """Return tiles on a lattice, row by row; `margin_l0` is glass beyond the last of them."""
    step = extent_l0 if step_l0 is None else step_l0
    row, column = (axis.ravel() for axis in np.mgrid[0:rows, 0:columns])
    grid = np.stack([column, row], axis=1).astype(np.int32)
    coords = np.rint(np.array(origin_l0) + grid * step).astype(np.int32)
    if keep is not None:
        grid, coords = grid[keep], coords[keep]
    width = int(np.ceil(columns * step + extent_l0 - step)) + margin_l0
    height = int(np.ceil(rows * step + extent_l0 - step)) + margin_l0
    x, y = (int(origin_l0[0]), int(origin_l0[1]))
    tile = {
        "extent_l0": extent_l0,
        "step_l0": step,
        "origin_l0": list(origin_l0),
        "bounds_l0": [x, y, width, height],
        "width_l0": width + 2 * x,
        "height_l0": height + 2 * y,
    }
    if mpp is not None:
        tile |= {"mpp_x_l0": mpp, "mpp_y_l0": mpp}
    return places_of(coords, grid, tile, len(coords))
