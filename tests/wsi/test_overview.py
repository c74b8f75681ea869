from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from bagscope.wsi.opening import open_slide
from bagscope.wsi.overview import read_overview
from tests.builders import build_svs
from tests.stained import stained_field


def spoil(path: Path, page: int, tile: int) -> None:
    """Overwrite the compressed bytes of one stored tile with zeros."""
    with tifffile.TiffFile(path) as file:
        offset = file.pages[page].dataoffsets[tile]
        length = file.pages[page].databytecounts[tile]
    content = bytearray(path.read_bytes())
    content[offset : offset + length] = bytes(length)
    path.write_bytes(content)


@pytest.mark.parametrize("downsamples", [(1,), (1, 4), (1, 3.9998, 15.99)])
@pytest.mark.parametrize("mpp", [4.0, 7.3, 8.0])
def test_an_overview_is_the_area_mean_of_the_slide(
    tmp_path: Path, downsamples: tuple[float, ...], mpp: float
) -> None:
    image = stained_field(0.5)
    build_svs(
        tmp_path / "a.svs", mpp=0.5, image=image, downsamples=downsamples,
        subsampling="4:4:4", quality=98,
    )  # fmt: skip
    with open_slide(tmp_path / "a.svs") as slide:
        got = read_overview(slide, 0.5, mpp=mpp)
    factor = mpp / 0.5
    height, width = (int(np.ceil(side / factor)) for side in image.shape[:2])
    whole = (int(np.ceil(width * factor)), int(np.ceil(height * factor)))
    padded = np.full((whole[1], whole[0], 3), 255, np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    expected = cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA)
    assert got.rgb.shape == (height, width, 3)
    inner = np.s_[: height - 1, : width - 1]
    difference = np.abs(got.rgb[inner].astype(int) - expected[inner])
    assert difference.mean() < 2.0
    assert got.readable.all()
    assert got.frame.px_l0_x == factor


def test_a_corrupt_tile_of_a_coarse_level_is_read_from_a_finer_one(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    build_svs(path, mpp=0.5, image=stained_field(0.5), downsamples=(1, 4))
    with open_slide(path) as slide:
        sound = read_overview(slide, 0.5)
    spoil(path, page=1, tile=0)
    with open_slide(path) as slide:
        got = read_overview(slide, 0.5)
    assert got.readable.all()
    assert got.problems
    assert np.abs(got.rgb.astype(int) - sound.rgb).mean() < 3


def test_a_corrupt_tile_of_the_only_level_costs_its_own_area(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    build_svs(path, mpp=0.5, image=stained_field(0.5), downsamples=(1,))
    spoil(path, page=0, tile=14)
    with open_slide(path) as slide:
        across = -(-slide.info.width_l0 // 256)
        got = read_overview(slide, 0.5)
    row, column = divmod(14, across)
    bad = np.argwhere(~got.readable)
    first, last = bad.min(axis=0), bad.max(axis=0) + 1
    # 256 level-0 pixels are 16 of the overview's; the parts tried again are a little coarser.
    assert 16 * 16 <= len(bad) <= 48 * 48
    assert (first <= (16 * row, 16 * column)).all()
    assert (last >= (16 * row + 16, 16 * column + 16)).all()


def test_a_slide_coarser_than_the_overview_is_shown_as_it_is(tmp_path: Path) -> None:
    build_svs(tmp_path / "a.svs", mpp=12.0, width_px=300, height_px=200, downsamples=(1,))
    with open_slide(tmp_path / "a.svs") as slide:
        got = read_overview(slide, 12.0)
        expected = slide.read_level(0, 0, 0, 300, 200)
    assert got.mpp == 12.0
    np.testing.assert_array_equal(got.rgb, expected)
