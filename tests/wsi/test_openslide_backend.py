"""OpenSlide as a backend: exact pixels where it can, composited, reopened after a fault."""

from __future__ import annotations

import threading

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.errors import ReadError
from bagscope.wsi.jpegtiff_backend import JpegTiffSlide
from bagscope.wsi.openslide_backend import OpenSlideSlide, describe, reachable_start
from bagscope.wsi.slide import WHITE
from tests.builders import build_svs
from tests.wsi.tiff_builders import build_tiff, overwrite, stored_span


class Stub:
    """What `describe` asks of an OpenSlide handle."""

    def __init__(self, **properties):
        self.properties = {
            key.replace("__", ".").replace("_", "-"): v for key, v in properties.items()
        }
        self.dimensions = (1000, 800)
        self.level_dimensions = ((1000, 800), (250, 200))
        self.level_downsamples = (1.0, 4.0)
        self.associated_images = {"thumbnail": None, "label": None}


def described(tmp_path, **properties):
    return describe(
        Stub(**properties),
        tmp_path / "slide.mrxs",
        backend="openslide",
        mpp=None,
        allow_estimated_mpp=False,
    )


def bounds(info):
    rect = info.bounds_l0
    return rect.x_l0, rect.y_l0, rect.width_l0, rect.height_l0


def bounds_properties(x, y, width, height):
    return {
        "openslide__bounds_x": str(x),
        "openslide__bounds_y": str(y),
        "openslide__bounds_width": str(width),
        "openslide__bounds_height": str(height),
    }


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ((100, 50, 300, 200), (100, 50, 300, 200)),
        ((-20, -30, 300, 200), (0, 0, 280, 170)),
        ((900, 700, 300, 200), (900, 700, 100, 100)),
        ((2000, 0, 10, 10), (0, 0, 1000, 800)),
        (("x", 0, 10, 10), (0, 0, 1000, 800)),
    ],
)
def test_bounds_are_clipped_to_level_0(tmp_path, stated, expected):
    assert bounds(described(tmp_path, **bounds_properties(*stated))) == expected


def test_without_bounds_the_whole_of_level_0_is_scanned(tmp_path):
    assert bounds(described(tmp_path)) == (0, 0, 1000, 800)


@pytest.mark.parametrize(
    ("stated", "expected"), [("F0E0D0", (240, 224, 208)), ("nonsense", WHITE), ("zzzzzz", WHITE)]
)
def test_the_background_is_the_slides(tmp_path, stated, expected):
    assert described(tmp_path, openslide__background_color=stated).background == expected
    assert described(tmp_path).background == WHITE


def test_a_colour_profile_is_recorded(tmp_path):
    assert described(tmp_path, openslide__icc_size="3144").properties["icc"] == "present"
    assert "icc" not in described(tmp_path).properties


# --- positions ------------------------------------------------------------------------------


@given(position=st.integers(-1000, 100_000), downsample=st.floats(1, 64))
def test_a_start_is_exact_or_the_nearest(position, downsample):
    start_l0, lead = reachable_start(position, downsample)
    off = abs(start_l0 / downsample - (position - lead))
    assert lead >= 0
    assert off <= 1 / 512 + 1e-9 or (lead == 0 and off <= 0.5 / downsample + 1e-9)


@given(position=st.integers(0, 100_000), downsample=st.sampled_from([1.0, 2.0, 4.0, 16.0, 32.0]))
def test_whole_downsamples_need_no_lead(position, downsample):
    assert reachable_start(position, downsample) == (position * downsample, 0)


@pytest.fixture(scope="module")
def fractional(tmp_path_factory):
    path = tmp_path_factory.mktemp("fractional") / "slide.svs"
    build_svs(path, width_px=2399, height_px=1801, level_sizes_px=[(2399, 1801), (600, 450)])
    return path


def test_fractional_levels_differ_by_interpolation_only(fractional):
    """OpenSlide can't be told a level pixel; where its position falls between two, it blends."""
    rng = np.random.default_rng(0)
    exact = 0
    with JpegTiffSlide(fractional) as fast, OpenSlideSlide(fractional) as slow:
        downsample = fast.info.levels[1].downsample
        assert downsample != round(downsample)
        positions = np.concatenate([rng.integers(0, 400, (40, 2)), rng.integers(0, 40, (40, 2))])
        for x, y in positions.tolist():
            a, b = (s.read_level(1, x, y, 40, 40).astype(int) for s in (fast, slow))
            reached = all(
                abs(start / downsample - (p - lead)) < 1 / 512
                for p in (x, y)
                for start, lead in [reachable_start(p, downsample)]
            )
            exact += reached
            assert np.abs(a - b).max() <= (0 if reached else 6)
    assert exact > 10


# --- faults ---------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    path = tmp_path / "damaged.tif"
    build_tiff(path, sizes_px=((512, 512), (64, 64)), tile_px=(128, 128))
    offset, length = stored_span(path, 0, 5)
    overwrite(path, offset, bytes(length))
    return path


def test_a_handle_that_failed_is_replaced(damaged):
    with openslide.OpenSlide(damaged) as bare:
        with pytest.raises(openslide.OpenSlideError):
            bare.read_region((128, 128), 0, (10, 10))
        with pytest.raises(openslide.OpenSlideError):
            bare.read_region((300, 300), 0, (10, 10))
    with OpenSlideSlide(damaged, mpp=0.5) as slide:
        for _ in range(3):
            with pytest.raises(ReadError) as caught:
                slide.read_level(0, 128, 128, 10, 10)
            assert str(damaged.parent) not in str(caught.value)
            assert slide.read_level(0, 300, 300, 10, 10).any()


def test_threads_do_not_suffer_from_each_others_faults(damaged):
    with OpenSlideSlide(damaged, mpp=0.5) as slide:
        expected = slide.read_level(0, 300, 300, 50, 50)
        wrong = []

        def read_sound():
            for _ in range(30):
                try:
                    if not np.array_equal(slide.read_level(0, 300, 300, 50, 50), expected):
                        wrong.append("pixels")
                except ReadError as error:
                    wrong.append(str(error))

        def read_damaged():
            for _ in range(30):
                try:
                    slide.read_level(0, 128, 128, 10, 10)
                    wrong.append("no error")
                except ReadError:
                    pass

        threads = [threading.Thread(target=t) for t in (read_sound, read_damaged) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_missing_tiles_are_background_and_never_black(tmp_path):
    path = tmp_path / "sparse.tif"
    build_tiff(path, missing={0: [0, 1]})
    with OpenSlideSlide(path, mpp=0.5) as slide:
        assert (slide.read_level(0, 0, 0, 200, 100) == 255).all()
        assert (slide.read_level(0, -100, -100, 50, 50) == 255).all()


def test_closing_twice_is_fine_and_reading_afterwards_is_not(fractional):
    slide = OpenSlideSlide(fractional)
    slide.close()
    slide.close()
    with pytest.raises(ReadError, match="after it was closed"):
        slide.read_level(0, 0, 0, 10, 10)
