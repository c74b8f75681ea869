from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from ome_types import from_tiff

from bagscope.heatmaps.colours import ColourScale, shared_scale
from bagscope.heatmaps.ome_tiff import write_ome_tiff
from bagscope.heatmaps.raster import pyramid, raster
from bagscope.wsi.opening import open_slide
from tests.heatmaps.made import made_places


@pytest.fixture
def colours() -> ColourScale:
    return shared_scale("ratio", "log_weight", [(0.25, 4.0)])


def lattice() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    keep = rng.random(60 * 40) < 0.6
    places = made_places(60, 40, extent_l0=447.9, origin_l0=(1200.0, 3400.0), keep=keep, mpp=0.25)
    return places, rng.uniform(0.2, 5, keep.sum())


@pytest.mark.parametrize("content", ["score", "colour"])
def test_every_level_is_drawn_from_the_tiles(
    tmp_path: Path, colours: ColourScale, content: Any
) -> None:
    places, values = lattice()
    path = tmp_path / f"{content}.ome.tif"
    for name in (path, tmp_path / "again.ome.tif"):
        write_ome_tiff(name, places, values, colours, content, slide_id="s<1>", of="tumor & co")
    assert path.read_bytes() == (tmp_path / "again.ome.tif").read_bytes()
    frames = pyramid(places)
    assert [frame.shape for frame in frames] == [(640, 960), (320, 480)]
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        assert tiff.is_bigtiff
        (series,) = tiff.series
        assert len(series.levels) == len(frames)
        for level, frame in zip(series.levels, frames, strict=True):
            expected = raster(places, values, frame)
            if content == "colour":
                expected = colours.rgb(expected)
            np.testing.assert_array_equal(level.asarray(), expected)


@pytest.mark.parametrize("content", ["score", "colour"])
@pytest.mark.parametrize("frame", ["qupath", "openslide"])
def test_ome_types_reads_what_it_is_and_where_it_lies(
    tmp_path: Path, colours: ColourScale, content: Any, frame: Any
) -> None:
    places, values = lattice()
    path = tmp_path / "map.ome.tif"
    write_ome_tiff(path, places, values, colours, content, slide_id="s<1>", of="a & b", frame=frame)
    image = from_tiff(path).images[0]
    assert image.name == "s<1> ratio of a & b"
    pixels = image.pixels
    assert (pixels.size_x, pixels.size_y) == (960, 640)
    assert pixels.type.value == ("float" if content == "score" else "uint8")
    assert pixels.physical_size_x == pytest.approx(447.9 / 16 * 0.25)
    assert pixels.physical_size_x_unit.value == "µm"
    expected = (0, 0) if frame == "qupath" else (300, 850)
    assert (pixels.planes[0].position_x, pixels.planes[0].position_y) == pytest.approx(expected)


def test_openslide_and_our_own_reader_open_the_colours(
    tmp_path: Path, colours: ColourScale
) -> None:
    places, values = lattice()
    path = tmp_path / "colour.ome.tif"
    write_ome_tiff(path, places, values, colours, "colour", slide_id="s")
    expected = colours.rgb(raster(places, values, pyramid(places)[0]))
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (960, 640)
        region = slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")
        np.testing.assert_array_equal(np.asarray(region), expected)
    with open_slide(path) as own:
        assert [level.width_px for level in own.info.levels] == [960, 480]
        assert own.info.spacing is not None
        assert own.info.spacing.mpp == pytest.approx(447.9 / 16 * 0.25)
        np.testing.assert_array_equal(own.read_level(0, 0, 0, 960, 640), expected)


def test_without_a_pixel_size_none_is_stated(tmp_path: Path, colours: ColourScale) -> None:
    places = made_places(3, 2, mpp=None)
    path = tmp_path / "map.ome.tif"
    write_ome_tiff(path, places, np.ones(6), colours, "score", slide_id="s")
    assert from_tiff(path).images[0].pixels.physical_size_x is None
    assert (tifffile.imread(path) == 1.0).all()


def test_memory_does_not_grow_with_the_slide(tmp_path: Path, colours: ColourScale) -> None:
    # 20 million pixels, which would be 78 MiB at once.
    places = made_places(64, 1200, extent_l0=223.2)
    values = np.random.default_rng(1).random(len(places))
    tracemalloc.start()
    write_ome_tiff(tmp_path / "long.ome.tif", places, values, colours, "score", slide_id="s")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20
