from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from bagscope.errors import SchemaError
from bagscope.heatmaps.raster import cells_of, raster, strips
from bagscope.heatmaps.tile_places import TilePlaces, places_of
from bagscope.wsi.outline import MaskFrame
from tests.heatmaps.made import made_places


def by_the_pixel(
    places: TilePlaces, values: NDArray[np.floating], frame: MaskFrame
) -> NDArray[np.float64]:
    """Return the mean of the tiles that each pixel's centre lies in, one pixel after another."""
    found = np.full(frame.shape, np.nan)
    for row in range(frame.shape[0]):
        for column in range(frame.shape[1]):
            x = frame.origin_x_l0 + (column + 0.5) * frame.px_l0_x
            y = frame.origin_y_l0 + (row + 0.5) * frame.px_l0_y
            left, top = places.coords_l0.T
            inside = (left <= x) & (x < left + places.extent_l0)
            inside &= (top <= y) & (y < top + places.extent_l0)
            if inside.any():
                found[row, column] = np.asarray(values)[inside].mean()
    return found


def frame_of(shape: tuple[int, int], px_l0: float, origin: float = 0.0) -> MaskFrame:
    return MaskFrame(
        shape=shape, origin_x_l0=origin, origin_y_l0=origin, px_l0_x=px_l0, px_l0_y=px_l0
    )


@pytest.mark.parametrize(
    ("extent_l0", "step_l0", "px_l0"), [(64, 64, 7.3), (64, 32, 5.1), (64, 40, 9.0), (30, 64, 6.7)]
)
def test_every_pixel_has_the_mean_of_the_tiles_over_it(
    extent_l0: float, step_l0: float, px_l0: float
) -> None:
    rng = np.random.default_rng(0)
    keep = rng.random(20) < 0.7
    places = made_places(extent_l0=extent_l0, step_l0=step_l0, keep=keep)
    values = rng.normal(size=keep.sum())
    frame = frame_of((48, 60), px_l0, origin=-11.0)
    expected = by_the_pixel(places, values, frame)
    np.testing.assert_allclose(raster(places, values, frame), expected, rtol=1e-6)


def test_tiles_need_no_lattice() -> None:
    rng = np.random.default_rng(1)
    coords = rng.integers(0, 300, (25, 2)).astype(np.int32)
    places = places_of(coords, None, {"extent_l0": 40.0, "step_l0": 40.0}, 25)
    values = rng.normal(size=25)
    frame = frame_of((40, 41), 8.3)
    # Ends within a pixel of another tile's beginning are taken as one; centres here are not there.
    expected = by_the_pixel(places, values, frame)
    found = raster(places, values, frame)
    assert np.isclose(found, expected, rtol=1e-5, equal_nan=True).mean() > 0.99


def test_uniform_scores_are_exactly_one_however_tiles_overlap() -> None:
    places = made_places(step_l0=21.3, extent_l0=64)
    found = raster(places, np.ones(len(places)), places.frame(3))
    assert (found[~np.isnan(found)] == 1.0).all()
    assert not np.isnan(found[:12, :15]).any()


def test_one_pixel_per_step_is_the_lattice_itself() -> None:
    keep = np.ones(20, bool)
    keep[[3, 7]] = False
    places = made_places(keep=keep)
    values = np.arange(18.0)
    expected = np.full(20, np.nan)
    expected[keep] = values
    np.testing.assert_array_equal(raster(places, values, places.frame(1)), expected.reshape(4, 5))


@pytest.mark.parametrize("step_l0", [511.87, 447.3])
def test_rounded_corners_leave_no_hairlines(step_l0: float) -> None:
    places = made_places(40, 30, extent_l0=step_l0)
    values = np.arange(1200.0)
    # A pixel of one level-0 pixel meets every edge.
    frame = frame_of((1, round(40 * step_l0) - 2), 1.0)
    line = raster(places, values, frame)[0]
    assert not np.isnan(line).any()
    assert set(line) == set(range(40))
    assert cells_of(places, values).values.shape == (30, 40)


def test_tiles_end_where_pixels_do() -> None:
    places = made_places(7, 5, extent_l0=511.87, origin_l0=(1000.0, 2000.0))
    values = np.arange(35.0)
    found = raster(places, values, places.frame(16))
    assert found.shape == (80, 112)
    blocks = found.reshape(5, 16, 7, 16)
    np.testing.assert_array_equal(blocks, np.broadcast_to(values.reshape(5, 1, 7, 1), blocks.shape))


def test_strips_are_the_raster_cut() -> None:
    rng = np.random.default_rng(2)
    keep = rng.random(900) < 0.2
    places = made_places(30, 30, extent_l0=63.7, step_l0=31.9, keep=keep)
    values = rng.normal(size=keep.sum())
    frame = places.frame(3.3)
    whole = raster(places, values, frame)
    for multiple in (1, 16):
        cut = list(strips(places, values, frame, strip_px=700, multiple=multiple))
        assert len(cut) > 4
        assert all(len(strip) % multiple == 0 for strip in cut[:-1])
        np.testing.assert_array_equal(np.concatenate(cut), whole)


def test_memory_does_not_grow_with_the_raster() -> None:
    # 200,000 tiles of a slide of 100,000 × 100,000 pixels, and 400 million pixels of scores.
    places = made_places(448, 448, extent_l0=223.2)
    values = np.random.default_rng(3).random(len(places))
    frame = places.frame(45)
    assert min(frame.shape) > 20_000
    tracemalloc.start()
    drawn = strips(places, values, frame)
    assert all(next(drawn).any() for _ in range(12))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def test_a_single_tile_and_bags_that_never_were_a_slide() -> None:
    one = places_of(np.array([[700, 300]], np.int32), None, {"tile_px_l0": 256}, 1)
    assert raster(one, np.array([2.5]), one.frame(1)).tolist() == [[2.5]]
    bag = places_of(None, None, {}, 7)
    drawn = raster(bag, np.arange(7.0), bag.frame(1))
    np.testing.assert_array_equal(drawn, [[0, 1, 2], [3, 4, 5], [6, np.nan, np.nan]])
    assert not bag.is_slide
    assert "never was a slide" in bag.notes[0]
    with pytest.raises(SchemaError, match="5 scores, but coords of 1"):
        places_of(np.array([[0, 0]], np.int32), None, {}, 5)
