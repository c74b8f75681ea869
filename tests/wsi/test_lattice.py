from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.wsi.geometry import plan_read
from bagscope.wsi.lattice import Lattice, coarser_lattice, lattice_for, spread_sample
from bagscope.wsi.outline import MaskFrame
from bagscope.wsi.slide import RectL0


def lattice(**changes: float) -> Lattice:
    values = {
        "origin_x_l0": 0.0,
        "origin_y_l0": 0.0,
        "step_l0": 10.0,
        "extent_l0": 10.0,
        "columns": 5,
        "rows": 4,
    }
    return Lattice(**{**values, **changes})  # type: ignore[arg-type]


@given(
    width=st.integers(1, 40_000),
    height=st.integers(1, 40_000),
    x=st.integers(0, 5000),
    mpp_l0=st.floats(0.2, 1.0),
    mpp=st.floats(0.2, 4.0),
    tile_px=st.integers(64, 1024),
    overlap=st.floats(0, 0.9),
)
def test_tiles_stay_inside_and_leave_out_less_than_one_step(
    width: int, height: int, x: int, mpp_l0: float, mpp: float, tile_px: int, overlap: float
) -> None:
    bounds = RectL0(x_l0=x, y_l0=7, width_l0=width, height_l0=height)
    plan = plan_read([1.0], mpp_l0, mpp=mpp, tile_px=tile_px, allow_upsampling=True)
    made = lattice_for(bounds, plan, overlap_px=int(overlap * tile_px))
    for origin, length, count in ((x, width, made.columns), (7, height, made.rows)):
        last_end = origin + (count - 1) * made.step_l0 + made.extent_l0
        if count:
            assert last_end <= origin + length + 0.5
        assert last_end + made.step_l0 > origin + length + 0.5 - 1e-6


@given(
    origin=st.floats(-20, 20),
    step=st.floats(0.7, 30),
    extent_share=st.floats(0.5, 2.0),
    px=st.floats(0.8, 8.0),
    seed=st.integers(0, 100),
)
def test_coverage_is_the_exact_area(
    origin: float, step: float, extent_share: float, px: float, seed: int
) -> None:
    """Compare with overlaps of intervals summed pixel by pixel."""
    mask = np.random.default_rng(seed).random((9, 13)) < 0.4
    frame = MaskFrame(shape=mask.shape, origin_x_l0=3.0, origin_y_l0=-2.0, px_l0_x=px, px_l0_y=px)
    made = lattice(
        origin_x_l0=origin, origin_y_l0=origin, step_l0=step, extent_l0=step * extent_share
    )
    got = made.coverage(mask, frame)
    assert got.shape == (4, 5)

    def overlap(start: float, end: float, first: float, count: int) -> np.ndarray:
        edges = first + np.arange(count + 1) * px
        return np.clip(np.minimum(end, edges[1:]) - np.maximum(start, edges[:-1]), 0, None)

    for row in range(4):
        for column in range(5):
            x, y = origin + column * step, origin + row * step
            size = step * extent_share
            inside = overlap(y, y + size, -2.0, 9) @ mask @ overlap(x, x + size, 3.0, 13)
            assert got[row, column] == pytest.approx(inside / size**2, abs=1e-5)


def test_grid_and_corners_are_ordered_by_y_then_x() -> None:
    made = lattice(step_l0=10.4, origin_x_l0=3.0)
    grid = made.grid()
    corners = made.corners_l0(grid)
    assert corners.dtype == np.int32
    order = np.lexsort((corners[:, 0], corners[:, 1]))
    assert (order == np.arange(20)).all()
    assert corners[4].tolist() == [round(3 + 4 * 10.4), 0]


def test_positions_do_not_drift() -> None:
    made = lattice(step_l0=512.0 / 0.9998, columns=400, rows=1)
    xs = made.corners_l0(made.grid())[:, 0]
    exact = np.arange(400) * (512.0 / 0.9998)
    assert np.abs(xs - exact).max() <= 0.5


@given(columns=st.integers(1, 60), rows=st.integers(1, 60), ratio=st.integers(2, 8))
def test_each_coarse_cell_holds_its_fine_cells(columns: int, rows: int, ratio: int) -> None:
    fine = lattice(columns=columns, rows=rows, step_l0=7.3, extent_l0=7.3)
    coarse = coarser_lattice(fine, ratio)
    grid = fine.grid()
    parents = grid // ratio
    assert (parents < [coarse.columns, coarse.rows]).all()
    fine_xy = grid * fine.step_l0
    coarse_xy = parents * coarse.step_l0
    assert (fine_xy >= coarse_xy - 1e-9).all()
    assert (fine_xy + fine.extent_l0 <= coarse_xy + coarse.extent_l0 + 1e-9).all()


def test_a_sample_is_spread_reproducible_and_without_repeats() -> None:
    grid = lattice(columns=64, rows=64).grid()
    chosen = spread_sample(grid, 256, seed=3)
    assert len(np.unique(chosen)) == 256
    assert (np.diff(chosen) > 0).all()
    assert (chosen == spread_sample(grid, 256, seed=3)).all()
    assert (chosen != spread_sample(grid, 256, seed=4)).any()
    # One tile from each 4 × 4 cell: the Morton curve fills such cells one after the other.
    cells = grid[chosen] // 4
    assert len(np.unique(cells, axis=0)) == 256


def test_a_sample_larger_than_the_whole_is_the_whole() -> None:
    grid = lattice().grid()
    assert spread_sample(grid, 999, seed=0).tolist() == list(range(20))


def test_200_000_places_are_measured_at_once() -> None:
    mask = np.ones((1000, 1000), np.bool_)
    frame = MaskFrame(shape=mask.shape, origin_x_l0=0, origin_y_l0=0, px_l0_x=5.0, px_l0_y=5.0)
    made = lattice(columns=500, rows=400)
    assert made.coverage(mask, frame).min() == pytest.approx(1)
