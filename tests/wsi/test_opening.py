"""Which backend opens what, and the one sentence that says why something does not open."""

from __future__ import annotations

import os
import subprocess
import sys

import imagecodecs
import numpy as np
import pytest
import tifffile

from bagscope.errors import ConfigError, ReadError, SlideError, SpacingError, UnsupportedSlide
from bagscope.wsi.opening import backends, open_slide
from tests.builders import build_svs, field_rgb
from tests.wsi.tiff_builders import build_tiff


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    path = tmp_path_factory.mktemp("opening") / "slide.svs"
    build_svs(path, width_px=600, height_px=500)
    return path


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


# --- which backend --------------------------------------------------------------------------


def test_tiled_jpeg_goes_the_fast_way_and_other_codecs_through_openslide(svs, tmp_path):
    with open_slide(svs) as slide:
        assert slide.info.backend == "jpegtiff"
    deflate = tmp_path / "deflate.tif"
    tifffile.imwrite(deflate, field_rgb(300, 300), tile=(128, 128), compression="zlib")
    with open_slide(deflate, mpp=0.5) as slide:
        assert (slide.info.backend, slide.info.format) == ("openslide", "generic-tiff")
        assert np.array_equal(slide.read_level(0, 0, 0, 300, 300), field_rgb(300, 300))


def test_one_odd_level_sends_the_whole_slide_through_openslide(tmp_path):
    path = tmp_path / "mixed.tif"
    image = field_rgb(256, 256)
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, tile=(128, 128), compression="jpeg", photometric="ycbcr", metadata=None)
        writer.write(image[::2, ::2], tile=(128, 128), subfiletype=1, metadata=None)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.info.backend == "openslide"
        assert len(slide.info.levels) == 2


def test_images_and_ome_find_their_backend(tmp_path):
    image = field_rgb(200, 100)
    png = written(tmp_path, "a.png", imagecodecs.png_encode(image))
    flat = tmp_path / "flat.tif"
    tifffile.imwrite(flat, image)
    ome = tmp_path / "a.ome.tif"
    tifffile.imwrite(ome, image, tile=(64, 64), metadata={"axes": "YXS"})
    for path, backend in ((png, "image"), (flat, "image"), (ome, "ome")):
        with open_slide(path, mpp=0.5) as slide:
            assert slide.info.backend == backend
            assert np.array_equal(slide.read_level(0, 0, 0, 200, 100), image)


def test_the_backend_can_be_chosen(svs, tmp_path):
    with open_slide(svs, backend="openslide") as slide:
        assert slide.info.backend == "openslide"
    with pytest.raises(ConfigError, match="no backend 'vips'; there are jpegtiff, openslide"):
        open_slide(svs, backend="vips")
    path = tmp_path / "deflate.tif"
    tifffile.imwrite(path, field_rgb(300, 300), tile=(128, 128), compression="zlib")
    with pytest.raises(UnsupportedSlide, match="not for backend jpegtiff: TIFF tag 259 is 8"):
        open_slide(path, backend="jpegtiff")


def test_overrides_and_estimates_reach_the_facts(svs, tmp_path):
    with open_slide(svs, mpp=0.3) as slide:
        assert (slide.info.spacing.mpp, slide.info.spacing.source) == (0.3, "override")
    bare = tmp_path / "bare.svs"
    build_svs(bare, width_px=300, height_px=300, mpp=None, objective=40)
    for backend in ("jpegtiff", "openslide"):
        with open_slide(bare, backend=backend) as slide:
            assert slide.info.spacing is None and "--mpp" in slide.info.spacing_problem
            assert slide.info.objective == 40
        with open_slide(bare, backend=backend, allow_estimated_mpp=True) as slide:
            assert slide.info.spacing.estimated and slide.info.spacing.mpp == 0.25


def test_a_scene_of_a_file_with_one_image_is_refused(svs):
    with pytest.raises(ConfigError, match="scene 2"):
        open_slide(svs, scene=2)


def test_backends_are_listed_best_first_with_versions():
    listed = backends()
    assert [backend.name for backend in listed] == ["jpegtiff", "openslide", "ome", "image"]
    assert all(backend.available and backend.version for backend in listed)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("mpp", [0, -1, 250])
def test_an_unbelievable_mpp_is_refused(svs, mpp):
    with pytest.raises(SpacingError, match="not a believable pixel size"):
        open_slide(svs, mpp=mpp)


def sentence_of(path, error=SlideError, **options):
    with pytest.raises(error) as caught:
        open_slide(path, **options)
    text = str(caught.value)
    assert path.name in text
    assert "\n" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize("suffix", ["svs", "tif", "ndpi", "mrxs", "dcm", "png", "zarr", ""])
def test_not_a_slide(tmp_path, suffix):
    path = written(tmp_path, f"text.{suffix}", b"this is a text file, not a slide " * 100)
    sentence_of(path, UnsupportedSlide)


def test_nothing_there_nothing_in_it_not_a_file(tmp_path):
    assert "does not exist" in sentence_of(tmp_path / "none.svs", UnsupportedSlide)
    assert "0 bytes" in sentence_of(written(tmp_path, "empty.svs", b""), UnsupportedSlide)
    (tmp_path / "folder").mkdir()
    assert "folder" in sentence_of(tmp_path / "folder", UnsupportedSlide)
    os.mkfifo(tmp_path / "pipe.svs")
    assert "not a regular file" in sentence_of(tmp_path / "pipe.svs", UnsupportedSlide)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(svs, tmp_path):
    path = written(tmp_path, "secret.svs", svs.read_bytes())
    path.chmod(0)
    assert "no permission" in sentence_of(path, ReadError)


def test_no_permission_is_one_sentence_whoever_runs_the_tests(svs, monkeypatch):
    def refuse(*_args, **_more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert "no permission" in sentence_of(svs, ReadError)


@pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.999])
def test_a_file_without_its_end(svs, tmp_path, part):
    content = svs.read_bytes()
    path = written(tmp_path, "cut.svs", content[: max(20, int(len(content) * part))])
    text = sentence_of(path)
    assert "cut short" in text or "damaged" in text


@pytest.mark.parametrize("level", [0, 1])
def test_a_file_whose_pixels_end_early(tmp_path, level):
    """Half of a pyramid is refused and not read as an image, wherever its directories lie."""
    path = tmp_path / "front.tif"
    build_tiff(path, sizes_px=((700, 500), (175, 125)))
    content = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        page = file.pages[level]
        cut = page.dataoffsets[len(page.dataoffsets) // 2] + 10
    path.write_bytes(content[:cut])
    assert "cut short" in sentence_of(path, ReadError)


def test_a_damaged_header_of_every_kind(svs, tmp_path):
    content = bytearray(svs.read_bytes())
    content[4:8] = b"\xff\xff\xff\x7f"
    assert "cut short" in sentence_of(written(tmp_path, "far.svs", bytes(content)), ReadError)
    for name, head in (("a.png", b"\x89PNG\r\n\x1a\n"), ("a.jpg", b"\xff\xd8\xff\xe0")):
        assert "damaged" in sentence_of(written(tmp_path, name, head + bytes(30)), ReadError)


# --- cold start -----------------------------------------------------------------------------


def test_opening_and_reading_an_svs_imports_no_other_image_library(svs):
    code = (
        "import sys\n"
        "from bagscope.wsi.opening import open_slide\n"
        f"slide = open_slide({str(svs)!r})\n"
        "slide.read_level(0, 0, 0, 300, 300)\n"
        "heavy = {'tifffile', 'zarr', 'scipy', 'torch', 'pandas', 'cv2', 'h5py', 'imagecodecs'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
