from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.errors import SchemaError, SlideError
from bagscope.features.interop.foreign import ForeignBag, SlideFacts
from bagscope.features.interop.placing import fits_float16, place, sound_features
from bagscope.wsi.slide import Spacing

HERE = Path("a.h5")


def slide(mpp: float) -> SlideFacts:
    return SlideFacts(spacing=Spacing(mpp_x=mpp, mpp_y=mpp, source="test"))


def lattice(count: int, step: float) -> Any:
    return np.array([(x * step, y * step) for x in range(count) for y in range(count)])


@given(mpp=st.floats(0.1, 2.0), tile_um=st.integers(64, 1024))
def test_a_lattice_in_micrometres_stays_a_lattice(mpp: float, tile_um: int) -> None:
    coords = lattice(12, tile_um).astype(np.float32)
    bag = ForeignBag(
        features=np.zeros((144, 2), np.float16),
        coords=coords,
        frame="corner_um",
        tile_um=tile_um,
        tile_px=224,
    )
    placed = place(HERE, bag, slide(mpp))
    assert placed.coords_l0 is not None
    exact = lattice(12, tile_um / mpp)
    expected = exact[np.lexsort((exact[:, 0], exact[:, 1]))]
    # Half a pixel of rounding, and what float32 could not hold.
    assert np.abs(placed.coords_l0 - expected).max() <= 0.5 + expected.max() * 1e-6
    assert placed.grid is not None
    np.testing.assert_array_equal(placed.grid, [(x, y) for y in range(12) for x in range(12)])
    assert placed.tile["step_l0"] == pytest.approx(tile_um / mpp)
    assert placed.tile["extent_l0"] == pytest.approx(tile_um / mpp)
    assert placed.tile["mpp_effective"] == pytest.approx(tile_um / 224)


@given(mpp=st.floats(0.1, 2.0), tile_um=st.integers(64, 1024))
def test_whole_centres_give_corners_within_a_pixel(mpp: float, tile_um: int) -> None:
    extent_l0 = tile_um / mpp
    corners = lattice(6, extent_l0)
    centres = np.rint(corners + extent_l0 / 2).astype(np.int64)
    bag = ForeignBag(
        features=np.zeros((36, 2), np.float16), coords=centres, frame="centre_l0", tile_um=tile_um
    )
    # A centre that was rounded down may put the first corner half a pixel outside.
    moved = ForeignBag(
        features=bag.features, coords=centres + 5, frame="centre_l0", tile_um=tile_um
    )
    placed = place(HERE, moved, slide(mpp))
    assert placed.coords_l0 is not None
    expected = corners[np.lexsort((corners[:, 0], corners[:, 1]))] + 5
    assert np.abs(placed.coords_l0 - expected).max() <= 1.0


@given(data=st.data())
def test_each_row_keeps_its_own(data: st.DataObject) -> None:
    places = data.draw(
        st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), unique=True, max_size=30)
    )
    coords = np.array(places, np.int64).reshape(-1, 2)
    # Each vector spells its own place, so that a row that went astray shows.
    bag = ForeignBag(
        features=coords.astype(np.float16), coords=coords, tile_labels=coords[:, 0] * 100
    )
    placed = place(HERE, bag, None)
    assert placed.coords_l0 is not None
    np.testing.assert_array_equal(placed.features, placed.coords_l0)
    np.testing.assert_array_equal(placed.extra["coords_source"], placed.coords_l0)
    np.testing.assert_array_equal(placed.extra["tile_labels"], placed.coords_l0[:, 0] * 100)
    assert [tuple(p) for p in placed.coords_l0[:, ::-1].tolist()] == sorted(
        (y, x) for x, y in places
    )


def one(coords: Any, **known: Any) -> ForeignBag:
    values = np.asarray(coords)
    return ForeignBag(features=np.zeros((len(values), 2), np.float16), coords=values, **known)


def test_places_that_can_not_be() -> None:
    with pytest.raises(SlideError, match=r"row 1 lies at \(-3, 4\), outside of the slide"):
        place(HERE, one([[1, 2], [-3, 4]]), None)
    with pytest.raises(SlideError, match=r"row 0 lies at \(900, 2\).*\(800 x 600 px\)"):
        place(HERE, one([[900, 2]], width_l0=800, height_l0=600), None)
    with pytest.raises(SchemaError, match="coordinates of row 1"):
        place(HERE, one([[1.0, 2.0], [np.nan, 3.0]]), None)
    with pytest.raises(SchemaError, match="coordinates of row 0"):
        place(HERE, one([[2**40, 2]]), None)
    # Distinct in micrometres, and one place in pixels.
    with pytest.raises(SlideError, match="rows 0 and 2 lie in one place"):
        place(HERE, one([[10.0, 10.0], [90.0, 10.0], [10.1, 10.0]], frame="corner_um"), slide(1.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_first_row_that_is_not_finite_is_named(bad: float, dtype: Any) -> None:
    values = np.zeros((9000, 3), dtype)
    values[[8001, 8500], [2, 1]] = bad
    with pytest.raises(SchemaError, match="feature 2 of row 8001"):
        sound_features(HERE, values)


def test_beyond_float32_is_not_finite_either() -> None:
    with pytest.raises(SchemaError, match="feature 0 of row 1 is inf"):
        sound_features(HERE, np.array([[1.0], [1e300]]))


@given(st.floats(-1e6, 1e6, width=32))
def test_float16_fits_what_it_rounds_to_something_finite(value: float) -> None:
    with np.errstate(over="ignore"):
        rounded = np.float32(value).astype(np.float16)
    assert fits_float16(np.array([[0.0, value]], np.float32)) == bool(np.isfinite(rounded))


def test_a_lattice_is_found_with_overlap_and_holes_and_not_made_up() -> None:
    places = np.array([(3, 0), (1, 4), (0, 7), (5, 5)])
    known = {"extent_l0": 512.0, "tile_px": 256, "overlap_px": 64}
    bag = one(places * 384 + 1000, **known)
    placed = place(HERE, bag, None)
    assert placed.grid is not None
    np.testing.assert_array_equal(placed.grid, places[[0, 1, 3, 2]])
    assert placed.tile["origin_l0"].tolist() == [1000, 1000]
    assert placed.tile["step_l0"] == 384.0
    shifted = place(HERE, one(places * 384 + [[0, 0], [2, 0], [0, 0], [0, 0]], **known), None)
    assert shifted.grid is None
    assert "step_l0" not in shifted.tile
    assert place(HERE, one(places * 384), None).grid is None
