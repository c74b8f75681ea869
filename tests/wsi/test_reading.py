"""Reading without a backend: regions, thumbnails, compositing, and threads."""

from __future__ import annotations

import threading

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bagscope.errors import ReadError, SpacingError
from bagscope.wsi import reading
from bagscope.wsi.opening import open_slide
from bagscope.wsi.reading import (
    Crew,
    composite,
    cut_out,
    halve_into,
    read_region_mpp,
    refuse_private,
    resize_into,
    thumbnail,
)
from tests.builders import build_svs, field_rgb


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "slide.svs"
    build_svs(path, width_px=2000, height_px=1500, mpp=0.25, downsamples=(1, 4), quality=95)
    return path


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "flat.svs"
    build_svs(path, width_px=2000, height_px=1500, mpp=0.25, downsamples=(1,), quality=95)
    return path


def test_a_region_at_the_scans_own_resolution_is_not_resampled(svs):
    with open_slide(svs) as slide:
        found = read_region_mpp(slide, x_l0=101, y_l0=53, width_px=300, height_px=200, mpp=0.25)
        assert np.array_equal(found, slide.read_level(0, 101, 53, 300, 200))
        coarse = read_region_mpp(slide, x_l0=400, y_l0=800, width_px=100, height_px=50, mpp=1.0)
        assert np.array_equal(coarse, slide.read_level(1, 100, 200, 100, 50))


def test_a_coarser_region_is_the_area_mean(flat):
    with open_slide(flat) as slide:
        found = read_region_mpp(slide, x_l0=100, y_l0=60, width_px=80, height_px=50, mpp=2.0)
        blocks = slide.read_level(0, 100, 60, 640, 400).reshape(50, 8, 80, 8, 3).astype(float)
    assert np.abs(found - blocks.mean(axis=(1, 3))).max() <= 0.5 + 1e-6


def test_a_finer_region_is_interpolated(svs):
    with open_slide(svs) as slide:
        found = read_region_mpp(slide, x_l0=0, y_l0=0, width_px=200, height_px=100, mpp=0.125)
        native = slide.read_level(0, 0, 0, 100, 50)
    expected = cv2.resize(native, (200, 100), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("mpp", [2.0, 2.3, 0.9])
def test_strips_give_what_one_piece_gives(flat, monkeypatch, mpp):
    def read(slide):
        return read_region_mpp(slide, x_l0=30, y_l0=10, width_px=150, height_px=120, mpp=mpp)

    with open_slide(flat) as slide:
        at_once = read(slide).astype(int)
        largest = 0
        inner = slide.read_level

        def watched(level, x, y, width, height):
            nonlocal largest
            largest = max(largest, width * height * 3)
            return inner(level, x, y, width, height)

        monkeypatch.setattr(slide, "read_level", watched)
        monkeypatch.setattr(reading, "_MAX_REGION_BYTES", 200_000)
        in_strips = read(slide).astype(int)
    assert largest <= 200_000
    # Reducing in two steps blurs by a part of a pixel where the whole is no whole number.
    assert np.abs(at_once - in_strips).mean() < (0.5 if mpp == 2.0 else 4)


def test_a_region_needs_a_pixel_size(tmp_path):
    path = tmp_path / "bare.svs"
    build_svs(path, width_px=300, height_px=300, mpp=None, objective=None)
    with open_slide(path) as slide, pytest.raises(SpacingError, match=r"bare\.svs: no pixel size"):
        read_region_mpp(slide, x_l0=0, y_l0=0, width_px=10, height_px=10, mpp=1)


@pytest.mark.parametrize("longest_px", [50, 200, 499, 3000])
def test_a_thumbnail_shows_the_whole_slide(svs, longest_px):
    with open_slide(svs) as slide:
        found = thumbnail(slide, longest_px=longest_px)
    expected_width = min(2000, longest_px)
    assert found.shape == (round(1500 * expected_width / 2000), expected_width, 3)
    field = field_rgb(2000, 1500, mpp=0.25)
    size = (found.shape[1], found.shape[0])
    expected = cv2.resize(field, size, interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(int) - expected).mean() < 4


# --- pixels ---------------------------------------------------------------------------------


@given(
    rgba=hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(4))),
    background=st.tuples(*[st.integers(0, 255)] * 3),
)
def test_compositing_equals_the_formula(rgba, background):
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + np.array(background) * (1 - alpha)
    found = composite(rgba, background)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found - expected).max() <= 0.5 + 1e-6


def test_transparent_black_becomes_the_background():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    found = composite(rgba, (200, 210, 220))
    assert found[0, 0].tolist() == [10, 20, 30]
    assert found[1, 1].tolist() == [200, 210, 220]


def test_a_region_of_the_final_size_is_copied_unchanged():
    region = np.random.default_rng(0).integers(0, 255, (31, 31, 3), dtype=np.uint8)
    out = np.empty_like(region)
    resize_into(region, out)
    assert np.array_equal(out, region)


@given(hnp.arrays(np.uint8, (16, 24, 4)))
def test_halving_with_padding_equals_halving_without(region):
    plain, padded = np.empty((8, 12, 3), np.uint8), np.zeros((10, 20, 3), np.uint8)
    resize_into(np.ascontiguousarray(region[..., :3]), plain)
    halve_into(region, padded[1:9, 3:15])
    assert np.array_equal(padded[1:9, 3:15], plain)
    assert padded[0].max() == 0 and padded[:, :3].max() == 0


@given(
    x=st.integers(-40, 40),
    y=st.integers(-40, 40),
    width=st.integers(1, 60),
    height=st.integers(1, 60),
)
def test_cutting_out_equals_cropping_a_padded_picture(x, y, width, height):
    picture = np.arange(20 * 30 * 3, dtype=np.uint16).reshape(20, 30, 3).astype(np.uint8)
    padded = np.full((220, 230, 3), 9, np.uint8)
    padded[100:120, 100:130] = picture

    def read(x0, y0, x1, y1):
        assert 0 <= x0 < x1 <= 30 and 0 <= y0 < y1 <= 20
        return picture[y0:y1, x0:x1]

    found = cut_out((30, 20), (x, y, width, height), (9, 9, 9), read)
    assert np.array_equal(found, padded[y + 100 : y + 100 + height, x + 100 : x + 100 + width])


# --- threads and privacy --------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_a_crew_does_every_item_once_and_list_after_list(threads):
    done: list[int] = []
    lock = threading.Lock()

    def work(item):
        with lock:
            done.append(item)

    with Crew(threads) as crew:
        crew.run(range(50), work)
        assert sorted(done) == list(range(50))
        crew.run(range(50, 60), work)
        crew.run([], work)
    assert sorted(done) == list(range(60))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_crew_reaches_the_caller(threads):
    def work(item):
        if item == 7:
            raise KeyError(item)

    with Crew(threads) as crew, pytest.raises(KeyError):
        crew.run(range(50), work)


@pytest.mark.parametrize("name", ["label", "macro", "MACRO"])
def test_what_may_name_the_patient_is_refused_even_where_it_exists(name):
    with pytest.raises(ReadError, match="never read"):
        refuse_private(name, ["label", "macro", "MACRO"], "a.svs")
