"""The lattice that tiles stand on, and how much of each tile a mask covers: vectorised arithmetic.

Frames as in `bagscope.wsi.slide`; `_mask` is a position in pixels of an overview mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bagscope.wsi.geometry import ReadPlan, lattice_count, lattice_positions_l0
from bagscope.wsi.outline import MaskFrame
from bagscope.wsi.slide import RectL0


@dataclass(frozen=True, kw_only=True, slots=True)
class Lattice:
    """Every place where a tile could stand: `columns` × `rows` of edge `extent_l0`."""

    origin_x_l0: float
    origin_y_l0: float
    step_l0: float
    extent_l0: float
    columns: int
    rows: int

    def grid(self) -> NDArray[np.int32]:
        """Return (column, row) of every place, ordered by (row, column): (columns*rows, 2)."""
        row, column = np.mgrid[0 : self.rows, 0 : self.columns]
        grid: NDArray[np.int32] = np.stack([column.ravel(), row.ravel()], axis=1).astype(np.int32)
        return grid

    def corners_l0(self, grid: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the level-0 (x, y) of the top-left corners of the tiles at `grid`: (N, 2)."""
        xs = lattice_positions_l0(self.origin_x_l0, self.step_l0, self.columns)
        ys = lattice_positions_l0(self.origin_y_l0, self.step_l0, self.rows)
        return np.stack([xs[grid[:, 0]], ys[grid[:, 1]]], axis=1)

    def coverage(self, mask: NDArray[np.bool_], frame: MaskFrame) -> NDArray[np.float32]:
        """Return the share of each place's area that a mask covers: (rows, columns) in [0, 1].

        Exact for footprints that cut mask pixels: the integral of the mask is interpolated
        linearly between pixel edges, which is what integrating a piecewise constant gives. What
        lies outside the mask counts as not covered.
        """
        import cv2

        integral = cv2.integral(mask.view(np.uint8), sdepth=cv2.CV_32S).astype(np.float64)
        x_lines = (self.origin_x_l0 - frame.origin_x_l0) / frame.px_l0_x + np.stack(
            [np.arange(self.columns), np.arange(self.columns) + self.extent_l0 / self.step_l0]
        ) * (self.step_l0 / frame.px_l0_x)
        y_lines = (self.origin_y_l0 - frame.origin_y_l0) / frame.px_l0_y + np.stack(
            [np.arange(self.rows), np.arange(self.rows) + self.extent_l0 / self.step_l0]
        ) * (self.step_l0 / frame.px_l0_y)
        along_y = _interpolate(integral, y_lines[1]) - _interpolate(integral, y_lines[0])
        transposed = np.ascontiguousarray(along_y.T)
        sums = _interpolate(transposed, x_lines[1]) - _interpolate(transposed, x_lines[0])
        tile_area_mask = self.extent_l0**2 / (frame.px_l0_x * frame.px_l0_y)
        share: NDArray[np.float32] = np.clip(sums.T / tile_area_mask, 0, 1).astype(np.float32)
        return share


def lattice_for(bounds_l0: RectL0, plan: ReadPlan, *, overlap_px: int) -> Lattice:
    """Return the lattice of all tiles inside the scanned area, from its top-left corner on."""
    step_l0 = plan.extent_l0 * (plan.tile_px - overlap_px) / plan.tile_px
    return Lattice(
        origin_x_l0=float(bounds_l0.x_l0),
        origin_y_l0=float(bounds_l0.y_l0),
        step_l0=step_l0,
        extent_l0=plan.extent_l0,
        columns=lattice_count(bounds_l0.width_l0, plan.extent_l0, step_l0),
        rows=lattice_count(bounds_l0.height_l0, plan.extent_l0, step_l0),
    )


def coarser_lattice(fine: Lattice, ratio: int) -> Lattice:
    """Return the lattice of tiles `ratio` times as wide whose cells hold whole fine cells.

    Tiles of its last column and row may reach past the scanned area, by less than one tile, so
    that every fine tile has a parent; what lies beyond reads as background.
    """
    return Lattice(
        origin_x_l0=fine.origin_x_l0,
        origin_y_l0=fine.origin_y_l0,
        step_l0=fine.step_l0 * ratio,
        extent_l0=fine.extent_l0 * ratio,
        columns=-(-fine.columns // ratio),
        rows=-(-fine.rows // ratio),
    )


def spread_sample(grid: NDArray[np.int32], count: int, seed: int) -> NDArray[np.intp]:
    """Choose `count` of the tiles at `grid`, spread evenly over them, reproducibly by `seed`.

    The tiles are laid along a Morton curve, which keeps neighbours together, and cut into `count`
    runs of equal length; one tile is drawn from each run.

    Returns:
        Ascending indices into `grid`: (min(count, N),).
    """
    if count >= len(grid):
        return np.arange(len(grid))
    along_curve = np.argsort(_morton(grid), kind="stable")
    edges = np.linspace(0, len(grid), count + 1)
    first, last = np.ceil(edges[:-1]).astype(np.intp), np.ceil(edges[1:]).astype(np.intp)
    draws = np.random.default_rng(seed).random(count)
    chosen = first + np.floor(draws * (last - first)).astype(np.intp)
    return np.sort(along_curve[chosen])


def _interpolate(table: NDArray[np.float64], lines: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows of `table` at fractional positions `lines`, clamped to its ends."""
    lines = np.clip(lines, 0, len(table) - 1)
    below = np.minimum(lines.astype(np.intp), max(len(table) - 2, 0))
    weight = (lines - below)[:, None]
    above = np.minimum(below + 1, len(table) - 1)
    values: NDArray[np.float64] = table[below] * (1 - weight) + table[above] * weight
    return values


def _morton(grid: NDArray[np.int32]) -> NDArray[np.uint64]:
    code = np.zeros(len(grid), np.uint64)
    for axis in (0, 1):
        value = grid[:, axis].astype(np.uint64)
        for bit in range(24):
            code |= ((value >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + axis)
    return code
