"""Laws of the parts that a synthetic slide is drawn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from bagscope.wsi.synthetic import write_slide
from bagscope.wsi.synthetic.layout import FIELD_STEP_UM, sample
from bagscope.wsi.synthetic.noise import cell_mosaic, smooth_noise
from bagscope.wsi.synthetic.painter import SlidePainter
from bagscope.wsi.synthetic.render import Window, interpolated
from bagscope.wsi.synthetic.spec import SyntheticSpec
from bagscope.wsi.synthetic.stain import site_palette

FIELD = smooth_noise(np.random.default_rng(0), 40, 50, 3, 3)


def test_what_a_window_shows_does_not_depend_on_its_cut() -> None:
    painter = SlidePainter(SyntheticSpec(width_px=1024, height_px=1024, seed=2, tumor_fraction=0.3))
    whole = painter.paint(Window(x_l0=256, y_l0=256, width_px=512, height_px=512)).astype(int)
    left = painter.paint(Window(x_l0=256, y_l0=256, width_px=199, height_px=512))
    right = painter.paint(Window(x_l0=455, y_l0=256, width_px=313, height_px=512))
    difference = np.abs(whole - np.hstack([left, right]).astype(int))
    assert (difference > 2).mean() < 1e-3


def test_blank_windows_are_equal_where_their_keys_are() -> None:
    spec = SyntheticSpec(width_px=4096, height_px=4096, tissue_fraction=0.1, background="black")
    painter = SlidePainter(spec)
    seen: dict[object, np.ndarray] = {}
    repeated = 0
    for y in range(0, 4096, 256):
        for x in range(0, 4096, 256):
            window = Window(x_l0=x, y_l0=y, width_px=256, height_px=256)
            key = painter.blank_key(window)
            if key is not None:
                pixels = painter.paint(window)
                repeated += key in seen
                assert (seen.setdefault(key, pixels) == pixels).all()
    assert repeated > 20


@settings(max_examples=40)
@given(
    x=st.integers(0, 1000),
    y=st.integers(0, 900),
    mpp=st.sampled_from([0.23, 0.25, 0.5, 1.0, 4.0]),
)
def test_interpolation_agrees_with_scipy(x: int, y: int, mpp: float) -> None:
    window = Window(x_l0=x // round(1 + mpp), y_l0=y // round(1 + mpp), width_px=33, height_px=21)
    rows = (window.y_l0 + np.arange(21) + 0.5) * mpp / FIELD_STEP_UM
    columns = (window.x_l0 + np.arange(33) + 0.5) * mpp / FIELD_STEP_UM
    grid = np.meshgrid(np.clip(rows, 0, 39), np.clip(columns, 0, 49), indexing="ij")
    expected = map_coordinates(FIELD.astype(np.float64), grid, order=1, mode="nearest")
    found = interpolated(FIELD, window, mpp)
    assert found.shape == (21, 33)
    # Cubic against linear interpolation of a field that is smooth over three cells.
    assert np.abs(found - expected).max() < 0.15
    points = grid[1].ravel() * FIELD_STEP_UM, grid[0].ravel() * FIELD_STEP_UM
    inside = (grid[1].ravel() < 48.9) & (grid[0].ravel() < 38.9)
    sampled = sample(FIELD, points[0].astype(np.float32), points[1].astype(np.float32))
    assert np.abs(sampled - expected.ravel())[inside].max(initial=0) < 1e-3


def test_noise_and_mosaics_repeat_without_a_seam() -> None:
    rng = np.random.default_rng(1)
    noise = smooth_noise(rng, 64, 96, 4, 2)
    assert noise.std() == pytest.approx(1, abs=1e-3)
    nearest, gap = cell_mosaic(rng, 128, 6)
    for field in (noise, nearest, gap):
        for axis in (0, 1):
            steps = np.abs(np.diff(field, axis=axis))
            seam = np.abs(np.take(field, 0, axis=axis) - np.take(field, -1, axis=axis))
            assert seam.max() <= steps.max() * 1.2 + 1e-6


def test_mosaic_distances_by_brute_force() -> None:
    nearest, gap = cell_mosaic(np.random.default_rng(3), 60, 4)
    assert (gap >= 0).all()
    offsets = (np.random.default_rng(3).random((4, 4, 2), dtype=np.float32) - 0.5) * 0.9 + 0.5
    seeds = (offsets + np.stack(np.meshgrid(range(4), range(4), indexing="ij"), -1)) * 15
    flat = seeds.reshape(-1, 2)
    y, x = np.mgrid[0:60, 0:60] + 0.5
    delta = np.abs(np.stack([y, x], -1)[:, :, None] - flat)
    delta = np.minimum(delta, 60 - delta)
    distances = np.sort(np.hypot(delta[..., 0], delta[..., 1]), axis=2)
    assert np.abs(nearest - distances[..., 0]).max() < 1e-3


def test_stains_obey_beer_and_lambert() -> None:
    palette = site_palette(0, "he", "white")
    table = palette.table.reshape(256, 256, 3).astype(np.float64)
    glass = np.array(palette.glass, np.float64)
    single, double = table[40, 30] / glass, table[80, 60] / glass
    assert double == pytest.approx(single**2, abs=0.02)
    assert (np.diff(table[:, 0], axis=0) <= 0).all()
    assert table[120, 40, 2] > table[120, 40, 1]  # nuclei are blue to purple
    assert table[0, 60, 0] > table[0, 60, 2] > table[0, 60, 1]  # eosin is pink


def test_nothing_of_this_machine_gets_into_a_slide(tmp_path: Path) -> None:
    spec = SyntheticSpec(width_px=256, height_px=256, downsamples=(1,))
    truth = write_slide(tmp_path / "a.svs", spec)
    for path in (truth.slide, truth.mask, truth.geojson):
        assert str(tmp_path).encode() not in path.read_bytes()
