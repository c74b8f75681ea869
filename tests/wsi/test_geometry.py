"""Read plans and lattices: the arithmetic that every pixel's place hangs on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.errors import SpacingError
from bagscope.wsi.geometry import (
    LEVEL_TOLERANCE,
    choose_level,
    corner_lv,
    lattice_count,
    lattice_positions_l0,
    plan_read,
)
from bagscope.wsi.reading import corners_lv

PYRAMIDS = ((1.0,), (1.0, 3.9998, 16.003), (1.0, 2.0, 4.0, 8.0), (1.0, 4.00028, 32.1))


@given(
    mpp_l0=st.floats(0.08, 2),
    factor=st.floats(1, 40),
    tile_px=st.integers(16, 2048),
    downsamples=st.sampled_from(PYRAMIDS),
)
def test_plan_delivers_the_wanted_mpp_within_rounding(mpp_l0, factor, tile_px, downsamples):
    plan = plan_read(downsamples, mpp_l0, mpp=mpp_l0 * factor, tile_px=tile_px)
    half_pixel_of_level = 0.5 * plan.downsample * mpp_l0 / tile_px
    assert abs(plan.mpp_effective - plan.mpp) <= half_pixel_of_level * (1 + 1e-9)
    assert plan.extent_l0 == pytest.approx(tile_px * factor)


@given(target=st.floats(1, 100), downsamples=st.sampled_from(PYRAMIDS))
def test_chosen_level_is_the_coarsest_that_is_fine_enough(target, downsamples):
    level = choose_level(downsamples, target)
    limit = target * (1 + LEVEL_TOLERANCE)
    assert downsamples[level] <= limit
    assert all(d <= downsamples[level] or d > limit for d in downsamples)


@pytest.mark.parametrize("reverse", [False, True])
def test_level_choice_does_not_depend_on_their_order(reverse):
    downsamples = [1.0, 4.0, 16.0]
    if reverse:
        downsamples.reverse()
    assert downsamples[choose_level(downsamples, 5.0)] == 4.0


def test_coarser_scan_than_asked_is_refused_unless_upsampling_is_allowed():
    with pytest.raises(SpacingError, match="--allow-upsampling"):
        plan_read([1.0], 0.5, mpp=0.25, tile_px=256)
    plan = plan_read([1.0], 0.5, mpp=0.25, tile_px=256, allow_upsampling=True)
    assert (plan.level, plan.region_px) == (0, 128)


@pytest.mark.parametrize(
    ("mpp_l0", "downsamples"),
    [
        (0.5, (1.0, 4.0)),
        (0.25, (1.0, 3.9998, 15.99)),
        (0.23, (1.0, 4.0001)),
        (0.2528, (1.0, 2.0, 4.0)),
    ],
)
def test_scans_of_one_field_give_the_same_footprint(mpp_l0, downsamples):
    plan = plan_read(downsamples, mpp_l0, mpp=0.5, tile_px=256)
    assert plan.extent_l0 * mpp_l0 == pytest.approx(128.0)
    read_um = plan.region_px * plan.downsample * mpp_l0
    assert read_um == pytest.approx(128.0, abs=0.5 * plan.downsample * mpp_l0 + 1e-9)


@given(origin=st.floats(-1e5, 1e5), step=st.floats(10, 5000), count=st.integers(1, 1000))
def test_lattice_positions_never_drift(origin, step, count):
    positions = lattice_positions_l0(origin, step, count)
    exact = origin + step * np.arange(count)
    assert positions.dtype == np.int32
    assert np.abs(positions - exact).max() <= 0.5 + 1e-6


def test_rounding_a_sum_of_rounded_steps_would_drift():
    step, count = 509.4, 400
    positions = lattice_positions_l0(0, step, count)
    assert positions[-1] == round(399 * step)
    assert abs(round(step) * 399 - 399 * step) > 100


@given(length=st.floats(1, 1e5), extent=st.floats(1, 5000), step=st.floats(1, 5000))
def test_all_tiles_fit_and_one_more_would_not(length, extent, step):
    count = lattice_count(length, extent, step)
    if count:
        assert (count - 1) * step + extent <= length + 0.5 + 1e-6
    assert count * step + extent > length + 0.5 - 1e-6


@given(position=st.integers(0, 2_000_000), downsample=st.floats(1, 64))
def test_a_level_pixel_leads_back_to_its_position_within_half_a_pixel(position, downsample):
    pixel = corner_lv(position, downsample)
    assert abs(pixel * downsample - position) <= 0.5 * downsample * (1 + 1e-9)


@given(
    positions=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1),
    downsamples=st.sampled_from(PYRAMIDS),
)
def test_corners_are_rounded_all_at_once_as_one_by_one(positions, downsamples):
    plan = plan_read(downsamples, 0.25, mpp=0.25 * downsamples[-1], tile_px=64)
    together = corners_lv(np.array(positions, np.int32), plan)
    assert together.tolist() == [[corner_lv(v, plan.downsample) for v in p] for p in positions]
