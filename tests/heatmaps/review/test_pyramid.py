"""The pyramid of a slide, against OpenSlide's own Deep Zoom and against pixels averaged by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from openslide import ImageSlide
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from bagscope.errors import ReadError
from bagscope.heatmaps.review.pyramid import (
    OVERLAP_PX,
    TILE_PX,
    Picture,
    picture_tile,
    plan_picture,
    thumbnail_jpeg,
    unreadable_tile,
)
from bagscope.wsi.slide import Level, RectL0, SlideInfo

RNG = np.random.default_rng(0)


class ArraySlide:
    """A slide whose levels are arrays; what is red can't be read."""

    def __init__(self, *levels: NDArray[np.uint8], bounds: RectL0 | None = None) -> None:
        self.levels = levels
        height, width = levels[0].shape[:2]
        self.info = info_of(
            width,
            height,
            [width / level.shape[1] for level in levels],
            bounds or RectL0(x_l0=0, y_l0=0, width_l0=width, height_l0=height),
        )
        self.broken: NDArray[np.bool_] | None = None

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a rectangle; white beyond the level."""
        if self.broken is not None:
            scale = round(self.info.levels[level].downsample)
            hit = self.broken[y * scale : (y + height) * scale, x * scale : (x + width) * scale]
            if hit.any():
                raise ReadError("a stored tile is damaged")
        out = np.full((height, width, 3), 255, np.uint8)
        part = self.levels[level][y : y + height, x : x + width]
        out[: part.shape[0], : part.shape[1]] = part
        return out


def info_of(width: int, height: int, downsamples: list[float], bounds: RectL0) -> SlideInfo:
    return SlideInfo(
        path=Path("a.svs"),
        format="array",
        backend="array",
        width_l0=width,
        height_l0=height,
        levels=tuple(
            Level(width_px=round(width / d), height_px=round(height / d), downsample=d)
            for d in downsamples
        ),
        bounds_l0=bounds,
        spacing=None,
    )


def halved(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    height, width = (edge // factor for edge in image.shape[:2])
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.rint(blocks.astype(np.float64).mean(axis=(1, 3))).astype(np.uint8)


def smooth(width: int, height: int) -> NDArray[np.uint8]:
    """Return an image that JPEG keeps nearly as it is."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(x / 37 + y / 91), x * 255 / width, y * 255 / height]
    return np.stack(planes, axis=-1).astype(np.uint8)


def decoded(jpeg: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_levels_and_tiles_are_those_of_openslides_deep_zoom(width: int, height: int) -> None:
    picture = Picture(width=width, height=height, downsample=1, x_l0=0, y_l0=0)
    with ImageSlide(Image.new("RGB", (width, height))) as slide:
        other = DeepZoomGenerator(slide, tile_size=TILE_PX, overlap=OVERLAP_PX)
    levels = range(picture.last_level + 1)
    assert other.level_count == len(levels)
    assert other.level_tiles == tuple(picture.tile_counts(level) for level in levels)
    assert other.level_dimensions == tuple(picture.size_px(level) for level in levels)
    assert len(list(picture.tiles())) == other.tile_count
    assert all(picture.has(*tile) for tile in picture.tiles())
    columns, rows = picture.tile_counts(picture.last_level)
    for place in ((-1, 0, 0), (len(levels), 0, 0), (0, 1, 0), (picture.last_level, columns, 0)):
        assert not picture.has(*place)
    assert not picture.has(picture.last_level, 0, rows)


def test_pixels_are_those_of_the_slide_where_the_picture_says() -> None:
    image = smooth(2400, 1900)
    bounds = RectL0(x_l0=404, y_l0=208, width_l0=1600, height_l0=1400)
    slide = ArraySlide(image, halved(image, 4), bounds=bounds)
    picture = plan_picture(slide.info, 800)
    assert (picture.width, picture.height) == (800, 700)
    assert (picture.downsample, picture.x_l0, picture.y_l0) == (2.0, 404.0, 208.0)
    other = DeepZoomGenerator(
        ImageSlide(Image.fromarray(halved(image[208:1608, 404:2004], 2))), TILE_PX, OVERLAP_PX
    )
    for level, column, row in picture.tiles():
        jpeg, whole = picture_tile(slide, picture, level, column, row, quality=98)
        expected = np.asarray(other.get_tile(level, (column, row)))
        found = decoded(jpeg)
        assert whole
        assert found.shape[1::-1] == other.get_tile_dimensions(level, (column, row))
        if level >= picture.last_level - 1:  # coarser ones OpenSlide filters in its own way
            assert np.abs(found.astype(int) - expected).max() <= 6


def test_tiles_share_the_pixels_of_their_overlap() -> None:
    slide = ArraySlide(smooth(1500, 600))
    picture = plan_picture(slide.info)
    left, right = (
        decoded(picture_tile(slide, picture, picture.last_level, column, 0, quality=98)[0])
        for column in (0, 1)
    )
    assert left.shape[1] == TILE_PX + OVERLAP_PX
    both = np.abs(left[:, TILE_PX - 1 :].astype(int) - right[:, : 2 * OVERLAP_PX])
    assert both.max() <= 6


@given(
    width=st.integers(300, 300_000),
    ratio=st.floats(0.05, 1.0),
    max_px=st.integers(256, 40_000),
    steps=st.lists(st.sampled_from([2, 4]), max_size=6),
)
def test_no_picture_is_larger_than_asked_for(
    width: int, ratio: float, max_px: int, steps: list[int]
) -> None:
    height = max(1, round(width * ratio))
    downsamples = [1.0]
    for step in steps:
        downsamples.append(width / max(1, round(width / downsamples[-1] / step)))
    bounds = RectL0(x_l0=0, y_l0=0, width_l0=width, height_l0=height)
    picture = plan_picture(info_of(width, height, downsamples, bounds), max_px)
    assert 1 <= picture.height <= picture.width <= max_px
    # It covers the slide, and no more than a pixel beyond it.
    covered = picture.width * picture.downsample
    assert width - 0.01 <= covered < width + picture.downsample
    if width <= max_px:
        assert picture.downsample == 1


def test_a_picture_is_as_fine_as_allowed() -> None:
    bounds = RectL0(x_l0=0, y_l0=0, width_l0=100_000, height_l0=80_000)
    info = info_of(100_000, 80_000, [1.0, 4.0, 16.0, 64.0], bounds)
    assert plan_picture(info, 8192).downsample == 16
    assert plan_picture(info, 9000).downsample == 12  # three pixels of the second level
    assert plan_picture(info, 50_000).downsample == 2
    assert plan_picture(info).downsample == 1
    # Between its levels lies too much: the finest is read, whatever it costs.
    assert plan_picture(info_of(100_000, 80_000, [1.0, 64.0], bounds), 8192).downsample == 13


def test_what_can_not_be_read_is_striped_and_the_rest_is_there() -> None:
    image = smooth(600, 600)
    slide = ArraySlide(image)
    slide.broken = np.zeros((600, 600), np.bool_)
    slide.broken[:40, :40] = True
    picture = plan_picture(slide.info)
    jpeg, whole = picture_tile(slide, picture, picture.last_level, 0, 0, quality=98)
    found = decoded(jpeg)
    assert not whole
    assert np.abs(found[200:500, 200:500].astype(int) - image[200:500, 200:500]).max() <= 6
    stripes = decoded(unreadable_tile(picture, picture.last_level, 0, 0))
    assert np.abs(found[:100, :100].astype(int) - stripes[:100, :100]).mean() < 12
    assert found[:100, :100].std() > 30
    assert picture_tile(slide, picture, picture.last_level, 1, 1)[1]
    with pytest.raises(ReadError):
        thumbnail_jpeg(slide, picture)
    with pytest.raises(ValueError, match="no tile"):
        picture_tile(slide, picture, 99, 0, 0)


@pytest.mark.parametrize("shape", [(100, 80), (3000, 900), (700, 2000), (1, 1), (5000, 3)])
def test_a_thumbnail_is_small_and_in_proportion(shape: tuple[int, int]) -> None:
    width, height = shape
    picture_of = ArraySlide(smooth(width, height))
    picture = plan_picture(picture_of.info)
    small = decoded(thumbnail_jpeg(picture_of, picture))
    longest = max(small.shape[:2])
    assert min(max(width, height), 129) <= longest <= 160
    scale = max(width, height) / longest
    assert abs(small.shape[1] - width / scale) <= 1
    assert abs(small.shape[0] - height / scale) <= 1
