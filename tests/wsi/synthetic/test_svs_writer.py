from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from bagscope.wsi.synthetic.jpeg_tiles import Subsampling, TileEncoder, split_stream
from bagscope.wsi.synthetic.svs_writer import SvsHeader, SvsWriter
from tests.builders import build_svs, field_rgb


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "rgb"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_openslide_reads_what_was_written(
    tmp_path: Path, subsampling: Subsampling, bigtiff: bool
) -> None:
    path = tmp_path / "a.svs"
    levels = build_svs(
        path, width_px=1199, height_px=803, subsampling=subsampling, bigtiff=bigtiff, quality=95
    )
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        assert float(slide.properties["openslide.objective-power"]) == 20
        assert slide.level_dimensions == tuple((a.shape[1], a.shape[0]) for a in levels)
        assert slide.level_downsamples[1] == pytest.approx((1199 / 300 + 803 / 201) / 2)
        for index, expected in enumerate(levels):
            read = slide.read_region((0, 0), index, slide.level_dimensions[index])
            pixels = np.asarray(read.convert("RGB"), dtype=np.int16)
            assert np.abs(pixels - expected).mean() < 2
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff == bigtiff
        assert np.abs(tiff.series[0].asarray().astype(np.int16) - levels[0]).mean() < 2


def test_an_rgb_slide_is_told_apart_by_the_directory_alone(tmp_path: Path) -> None:
    build_svs(tmp_path / "a.svs", subsampling="rgb")
    with tifffile.TiffFile(tmp_path / "a.svs") as tiff:
        page = tiff.pages[0]
        assert page.photometric == tifffile.PHOTOMETRIC.RGB
        tiff.filehandle.seek(page.dataoffsets[0])
        stream = tiff.filehandle.read(page.databytecounts[0])
    assert b"Adobe" not in stream
    assert b"JFIF" not in stream


def test_associated_images_are_found_by_name(tmp_path: Path) -> None:
    build_svs(tmp_path / "a.svs", associated=("thumbnail", "label", "macro"))
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert set(slide.associated_images) == {"thumbnail", "label", "macro"}
        assert np.abs(np.asarray(slide.associated_images["label"])[..., 1].astype(int)).max() < 4
        assert slide.level_count == 2


def test_what_is_not_stated_stays_unstated(tmp_path: Path) -> None:
    build_svs(tmp_path / "a.svs", mpp=None, objective=None, description={"ScanScope ID": "S7"})
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert not [key for key in slide.properties if "mpp" in key.lower()]
        assert "openslide.objective-power" not in slide.properties
        assert slide.properties["aperio.ScanScope ID"] == "S7"


def test_an_abbreviated_stream_with_its_tables_is_the_whole_jpeg() -> None:
    import simplejpeg

    image = field_rgb(64, 48)
    whole = simplejpeg.encode_jpeg(image, quality=70, colorspace="RGB", colorsubsampling="422")
    tables, frame = split_stream(whole)
    rebuilt = tables[:-2] + frame[2:]
    assert (simplejpeg.decode_jpeg(rebuilt) == simplejpeg.decode_jpeg(whole)).all()
    encoder = TileEncoder(quality=70, subsampling="4:2:2")
    assert encoder.tables == tables
    assert [encoder.encode(image) for _ in range(2)] == [frame, frame]


def test_unwritable_layouts_are_refused(tmp_path: Path) -> None:
    header = SvsHeader(mpp=0.5, objective=20)
    with pytest.raises(ValueError, match="multiple of 16"):
        SvsWriter(
            tmp_path / "a", [(9, 9)], tile_px=100, header=header, quality=80, subsampling="4:4:4"
        )
    with pytest.raises(ValueError, match="leave out the empty"):
        SvsWriter(
            tmp_path / "a", [(9, 0)], tile_px=16, header=header, quality=80, subsampling="4:4:4"
        )
    with (
        pytest.raises(ValueError, match="level 0 got 0 of 1"),
        SvsWriter(
            tmp_path / "a", [(9, 9)], tile_px=16, header=header, quality=80, subsampling="4:4:4"
        ),
    ):
        pass
