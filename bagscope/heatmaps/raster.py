"""Scores of tiles as pixels: of any size, a strip at a time, nothing smoothed.

A pixel has the mean of the tiles that its centre lies in, and is NaN where there is none. The
tiles' edges cut level 0 into cells in which nothing changes; pixels look up their cell, so a raster
costs what writing it costs.

Frames: `_l0` as in `bagscope.wsi.slide`; rasters lie where their `MaskFrame` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bagscope.heatmaps.tile_places import TilePlaces
from bagscope.wsi.outline import MaskFrame

STRIP_PX = 4 << 20
"""Pixels of a strip: 16 MiB of scores."""
PX_PER_STEP = 16
"""Of the finest raster: a power of two, so that tiles end where pixels do on every coarser one."""

_LONGEST_PX = 20_000
_SMALLEST_PX = 512
"""A raster that is not larger needs no coarser one beside it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cells:
    """A map that is constant within each cell of a lattice of unequal columns and rows.

    Attributes:
        x_edges_l0: (columns + 1,) ascending.
        y_edges_l0: (rows + 1,).
        values: (rows, columns) float32, NaN where no tile is.
    """

    x_edges_l0: NDArray[np.float64]
    y_edges_l0: NDArray[np.float64]
    values: NDArray[np.float32]

    def at(self, x_l0: NDArray[np.float64], y_l0: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the values (len(y), len(x)) on a lattice of points; NaN outside."""
        columns, rows = _inside(self.x_edges_l0, x_l0), _inside(self.y_edges_l0, y_l0)
        # A row and a column of NaN stand for all that lies outside.
        padded = np.pad(self.values, ((0, 1), (0, 1)), constant_values=np.nan)
        # Columns first: then whole rows are copied, which is as fast as memory is.
        return np.take(np.take(padded, columns, axis=1), rows, axis=0)


def cells_of(places: TilePlaces, values: NDArray[np.floating]) -> Cells:
    """Return the cells that the tiles' edges make, each with the mean of the tiles over it."""
    return _cells(_boxes_l0(places), np.asarray(values, np.float64))


def cell_count(places: TilePlaces) -> int:
    """Return how many cells the tiles' edges make: few on a lattice, very many off it."""
    columns, rows = (len(np.unique(places.coords_l0[:, axis])) for axis in (0, 1))
    return (2 * columns - 1) * (2 * rows - 1)


def _boxes_l0(places: TilePlaces) -> NDArray[np.float64]:
    """Return the tiles' edges (4, n): left, right, top, bottom.

    Corners are whole pixels, so neighbours on a lattice with a fractional step overlap or gape by a
    part of a pixel; there a tile is made to end where its neighbour begins.
    """
    edges = []
    for starts in places.coords_l0.T.astype(np.float64):
        ends = starts + places.extent_l0
        known = np.unique(starts)
        after = np.minimum(np.searchsorted(known, ends), len(known) - 1)
        for nearest in (known[after], known[np.maximum(after - 1, 0)]):
            close = (np.abs(nearest - ends) < 1) & (nearest > starts)
            ends = np.where(close, nearest, ends)
        edges += [starts, ends]
    return np.stack(edges)


def _cells(boxes_l0: NDArray[np.float64], values: NDArray[np.float64]) -> Cells:
    left, right, top, bottom = boxes_l0
    x_edges, y_edges = np.unique([left, right]), np.unique([top, bottom])
    shape = (len(y_edges) - 1, len(x_edges) - 1)
    x_first, y_first = np.searchsorted(x_edges, left), np.searchsorted(y_edges, top)
    wide = np.searchsorted(x_edges, right) - x_first
    count = wide * (np.searchsorted(y_edges, bottom) - y_first)
    tile = np.repeat(np.arange(len(values)), count)
    within = np.arange(len(tile)) - np.repeat(np.cumsum(count) - count, count)
    down, across = np.divmod(within, wide[tile])
    flat = (y_first[tile] + down) * shape[1] + x_first[tile] + across
    size = shape[0] * shape[1]
    sums, covering = np.bincount(flat, values[tile], size), np.bincount(flat, minlength=size)
    means = np.full(size, np.nan, np.float32)
    np.divide(sums, covering, out=means, where=covering > 0, casting="unsafe")
    return Cells(x_edges_l0=x_edges, y_edges_l0=y_edges, values=means.reshape(shape))


def raster(
    places: TilePlaces, values: NDArray[np.floating], frame: MaskFrame
) -> NDArray[np.float32]:
    """Return a whole raster (H, W) at once, for those that are small (see `strips`)."""
    return np.concatenate(list(strips(places, values, frame)))


def strips(
    places: TilePlaces,
    values: NDArray[np.floating],
    frame: MaskFrame,
    *,
    strip_px: int = STRIP_PX,
    multiple: int = 1,
) -> Iterator[NDArray[np.float32]]:
    """Yield a raster (H, W) as strips of rows from the top; memory does not depend on its height.

    Args:
        places: of the tiles.
        values: (n,) of each tile.
        frame: of the raster.
        strip_px: about how many pixels a strip has.
        multiple: of which a strip's rows are a whole one, but for the last strip.
    """
    height, width = frame.shape
    rows = max(1, strip_px // width // multiple) * multiple
    x_l0 = frame.origin_x_l0 + (np.arange(width, dtype=np.float64) + 0.5) * frame.px_l0_x
    numbers = np.asarray(values, np.float64)
    boxes_l0 = _boxes_l0(places)
    for start in range(0, height, rows):
        row = np.arange(start, min(start + rows, height), dtype=np.float64)
        y_l0 = frame.origin_y_l0 + (row + 0.5) * frame.px_l0_y
        near = (boxes_l0[2] <= y_l0[-1]) & (boxes_l0[3] > y_l0[0])
        if near.any():
            yield _cells(boxes_l0[:, near], numbers[near]).at(x_l0, y_l0)
        else:
            yield np.full((len(y_l0), width), np.nan, np.float32)


def pyramid(places: TilePlaces, px_per_step: int | None = None) -> list[MaskFrame]:
    """Return the frames of an image pyramid, each half as fine as the one before it.

    Every level is drawn from the tiles, down to one pixel per tile: nothing is resampled.

    Args:
        places: of the tiles.
        px_per_step: of the finest level, a power of two; as fine as is of use if None.
    """
    if px_per_step is None:
        longest = max(places.frame(1).shape)
        px_per_step = PX_PER_STEP
        while px_per_step > 1 and px_per_step * longest > _LONGEST_PX:
            px_per_step //= 2
    frames = [places.frame(px_per_step)]
    while px_per_step > 1 and max(frames[-1].shape) > _SMALLEST_PX:
        px_per_step //= 2
        frames.append(places.frame(px_per_step))
    return frames


def _inside(edges: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the cell that each point lies in; the number of cells for one outside."""
    cell = np.searchsorted(edges, points, "right") - 1
    return np.where((cell < 0) | (cell >= len(edges) - 1), len(edges) - 1, cell)
