"""What the fast path accepts, and what it leaves to OpenSlide."""

from __future__ import annotations

import numpy as np
import openslide
import pytest
import tifffile

from bagscope.wsi.opening import open_slide
from bagscope.wsi.slide import Level
from bagscope.wsi.stored_tiles import NotStoredAsTiles, stored_levels
from tests.builders import field_rgb
from tests.wsi.real_slide import real_slide
from tests.wsi.tiff_builders import build_tiff


def levels_of(path):
    with openslide.OpenSlide(path) as slide:
        return [
            Level(width_px=width, height_px=height, downsample=downsample)
            for (width, height), downsample in zip(
                slide.level_dimensions, slide.level_downsamples, strict=True
            )
        ]


def test_tables_equal_tifffiles(tmp_path):
    path = tmp_path / "x.tif"
    build_tiff(path, tile_px=(128, 64))
    with tifffile.TiffFile(path) as file:
        for level, page in zip(
            stored_levels(path, "generic-tiff", levels_of(path)), file.pages, strict=True
        ):
            assert (level.tile_width_px, level.tile_height_px) == (128, 64)
            assert level.offsets.tolist() == list(page.dataoffsets)
            assert level.byte_counts.tolist() == list(page.databytecounts)
            assert level.across * level.down == len(page.dataoffsets)


def test_the_real_slide_is_known():
    path = real_slide()
    (level,) = stored_levels(path, "aperio", levels_of(path))
    assert (level.across, level.down, level.tile_width_px) == (10, 13, 240)


@pytest.mark.parametrize(
    "vendor", ["leica", "hamamatsu", "ventana", "trestle", "zeiss", "dicom", "mirax", "argos"]
)
def test_other_vendors_are_left_to_openslide(tmp_path, vendor):
    path = tmp_path / "x.tif"
    build_tiff(path)
    with pytest.raises(NotStoredAsTiles, match=vendor):
        stored_levels(path, vendor, levels_of(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": "zlib"}, "TIFF tag 259 is 8"),
        ({"compression": "jpeg2000"}, "TIFF tag 259"),
        ({"compression": "jpeg", "photometric": "minisblack", "grey": True}, "TIFF tag 277 is 1"),
        ({"compression": "jpeg", "planarconfig": "separate"}, "TIFF tag 284 is 2"),
    ],
)
def test_other_codecs_and_layouts_are_left_to_openslide(tmp_path, options, words):
    path = tmp_path / "x.tif"
    image = field_rgb(200, 200)
    options = dict(options)
    if options.pop("grey", False):
        image = image[..., 0]
    elif options.get("planarconfig"):
        image = np.moveaxis(image, -1, 0)
    options.setdefault("photometric", "rgb")
    tifffile.imwrite(path, image, tile=(64, 64), metadata=None, **options)
    level = Level(width_px=200, height_px=200, downsample=1.0)
    with pytest.raises(NotStoredAsTiles, match=words):
        stored_levels(path, "generic-tiff", [level])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([(700, 500)], "2 tiled directories for 1 levels"),
        ([(701, 500), (175, 125)], "for a level of 701×500"),
        ([(700, 500), (175, 124)], "for a level of 175×124"),
    ],
)
def test_levels_that_do_not_match_are_left_to_openslide(tmp_path, sizes, words):
    path = tmp_path / "x.tif"
    build_tiff(path)
    levels = [Level(width_px=w, height_px=h, downsample=1.0) for w, h in sizes]
    with pytest.raises(NotStoredAsTiles, match=words):
        stored_levels(path, "generic-tiff", levels)


def test_two_levels_of_one_width_are_left_to_openslide(tmp_path):
    path = tmp_path / "x.tif"
    build_tiff(path, sizes_px=((300, 200), (300, 100)))
    levels = [Level(width_px=300, height_px=h, downsample=1.0) for h in (200, 100)]
    with pytest.raises(NotStoredAsTiles, match="same width"):
        stored_levels(path, "generic-tiff", levels)


def test_damaged_directories_are_left_to_openslide(tmp_path):
    path = tmp_path / "x.tif"
    path.write_bytes(b"II*\0" + bytes([200, 0, 0, 0]) + bytes(100))
    with pytest.raises(NotStoredAsTiles, match="cut short or damaged"):
        stored_levels(path, "aperio", [])


def test_padded_levels_of_philips_are_clipped(tmp_path):
    """Philips states whole stored tiles as the image's size; OpenSlide knows the true one."""
    path = tmp_path / "x.tif"
    build_tiff(path, sizes_px=((1024, 512), (256, 128), (128, 128)), vendor="philips")
    third = stored_levels(path, "philips", levels_of(path))[2]
    assert (third.width_lv, third.height_lv) == (128, 64)
    assert (third.across, third.down) == (1, 1)
    with open_slide(path) as fast, open_slide(path, backend="openslide") as slow:
        assert fast.info.backend == "jpegtiff"
        a, b = (slide.read_level(2, 0, 0, 150, 150) for slide in (fast, slow))
    assert np.array_equal(a, b)
    assert (a[64:] == 255).all()
