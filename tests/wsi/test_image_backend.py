"""Plain images of every colour kind, against the pixels that were written."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from bagscope.errors import ReadError, UnsupportedSlide
from bagscope.wsi import image_backend
from bagscope.wsi.geometry import plan_read
from bagscope.wsi.image_backend import ImageSlide
from bagscope.wsi.opening import open_slide
from tests.builders import field_rgb

FIELD = field_rgb(120, 90)
GREY = FIELD[..., 0].copy()


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def whole(path, **options):
    with open_slide(path, mpp=0.5, **options) as slide:
        info = slide.info
        assert info.backend == "image"
        return slide.read_level(0, 0, 0, info.width_l0, info.height_l0)


def test_png_of_every_kind(tmp_path):
    alpha = np.zeros_like(GREY)
    alpha[:, 60:] = 255
    kinds = {
        "rgb": (FIELD, FIELD),
        "grey": (GREY, np.repeat(GREY[..., None], 3, 2)),
        "rgba": (np.dstack([FIELD, alpha]), np.where(alpha[..., None] == 0, 255, FIELD)),
    }
    for kind, (pixels, expected) in kinds.items():
        path = written(
            tmp_path, f"{kind}.png", imagecodecs.png_encode(np.ascontiguousarray(pixels))
        )
        assert np.array_equal(whole(path), expected), kind


def test_png_with_a_palette(tmp_path):
    picture = Image.fromarray(FIELD).quantize(16)
    picture.save(tmp_path / "palette.png")
    assert np.array_equal(whole(tmp_path / "palette.png"), np.asarray(picture.convert("RGB")))


def test_jpeg_decodes_exactly_and_its_density_is_ignored(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(FIELD).save(path, dpi=(25400, 25400), quality=90)
    assert np.array_equal(whole(path), np.asarray(Image.open(path)))
    with open_slide(path) as slide:
        assert slide.info.spacing is None
        assert "--mpp" in slide.info.spacing_problem


def test_png_density_is_ignored(tmp_path):
    Image.fromarray(FIELD).save(tmp_path / "a.png", dpi=(25400, 25400))
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.info.spacing is None


def test_flat_tiff_of_every_kind(tmp_path):
    palette = (np.arange(768, dtype=np.uint16).reshape(3, 256) * 80).astype(np.uint16)
    grey3 = np.repeat(GREY[..., None], 3, 2)
    kinds = {
        "rgb": ({"data": FIELD, "photometric": "rgb"}, FIELD),
        "planar": (
            {"data": np.moveaxis(FIELD, -1, 0), "photometric": "rgb", "planarconfig": "separate"},
            FIELD,
        ),
        "grey": ({"data": GREY, "photometric": "minisblack"}, grey3),
        "inverse": ({"data": GREY, "photometric": "miniswhite"}, 255 - grey3),
        "palette": (
            {"data": GREY, "photometric": "palette", "colormap": palette},
            (palette.T >> 8).astype(np.uint8)[GREY],
        ),
    }
    for kind, (options, expected) in kinds.items():
        path = tmp_path / f"{kind}.tif"
        tifffile.imwrite(path, options.pop("data"), **options)
        assert np.array_equal(whole(path), expected), kind


@pytest.mark.parametrize(("unit", "per_um"), [("CENTIMETER", 1e-4), ("INCH", 1 / 25400)])
def test_a_tiffs_resolution_with_a_unit_is_believed(tmp_path, unit, per_um):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, FIELD, resolution=(2 / per_um, 2 / per_um), resolutionunit=unit)
    with open_slide(path) as slide:
        assert slide.info.spacing.source == "tiff.XResolution"
        assert slide.info.spacing.mpp == pytest.approx(0.5)


def test_a_screen_resolution_is_not_believed(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, FIELD, resolution=(72, 72), resolutionunit="INCH")
    with open_slide(path) as slide:
        assert slide.info.spacing is None and "352.8" in slide.info.spacing_problem


def test_what_would_need_guessing_is_refused(tmp_path):
    cmyk = tmp_path / "cmyk.jpg"
    Image.fromarray(FIELD).convert("CMYK").save(cmyk)
    cmyk_tiff = tmp_path / "cmyk.tif"
    tifffile.imwrite(cmyk_tiff, np.dstack([FIELD, GREY]), photometric="separated")
    deep = tmp_path / "deep.tif"
    tifffile.imwrite(deep, FIELD.astype(np.uint16) * 257, photometric="rgb")
    png = written(tmp_path, "deep.png", imagecodecs.png_encode(FIELD.astype(np.uint16) * 257))
    for path, word in ((cmyk, "CMYK"), (cmyk_tiff, "CMYK"), (deep, "16-bit"), (png, "16-bit")):
        with pytest.raises(UnsupportedSlide, match=f"{path.name}: {word} pixels; convert it"):
            open_slide(path)


def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(image_backend, "MAX_PIXELS", 120 * 90 - 1)
    for name, content in (
        ("a.png", imagecodecs.png_encode(FIELD)),
        ("a.jpg", simplejpeg.encode_jpeg(FIELD)),
    ):
        with pytest.raises(UnsupportedSlide, match=r"120×90 px are too many.*pyramidal TIFF"):
            open_slide(written(tmp_path, name, content))
    tifffile.imwrite(tmp_path / "a.tif", FIELD)
    with pytest.raises(UnsupportedSlide, match="too many"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_a_cut_short_image_is_an_error_and_never_half_grey(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    path = tmp_path / name
    if name == "a.tif":
        tifffile.imwrite(path, noise, compression="zlib", rowsperstrip=20)
        with tifffile.TiffFile(path) as file:
            offset = file.pages.first.dataoffsets[5]
        content = bytearray(path.read_bytes())
        content[offset : offset + 300] = bytes(300)
    else:
        encode = imagecodecs.png_encode if name == "a.png" else simplejpeg.encode_jpeg
        full = encode(noise)
        content = full[: len(full) // 2]
    path.write_bytes(content)
    try:
        slide = open_slide(path, mpp=0.5)
    except ReadError:
        return
    with slide, pytest.raises(ReadError, match="does not decode"):
        slide.read_level(0, 0, 0, 10, 10)
    with open_slide(path, mpp=0.5) as slide:
        batch = slide.read_tiles(
            np.zeros((1, 2), np.int32), plan_read([1.0], 0.5, mpp=0.5, tile_px=8)
        )
        assert not batch.readable[0] and "does not decode" in batch.problems[0]


def test_tiles_beyond_the_edge_show_white(tmp_path):
    path = written(tmp_path, "a.png", imagecodecs.png_encode(FIELD))
    corners = np.array([[100, 80], [-10, -10], [500, 500]], np.int32)
    plan = plan_read([1.0], 0.5, mpp=0.5, tile_px=32)
    with open_slide(path, mpp=0.5) as slide:
        images = slide.read_tiles(corners, plan, threads=2).images
    assert np.array_equal(images[0, :10, :20], FIELD[80:, 100:])
    assert (images[0, 10:] == 255).all() and (images[2] == 255).all()
    assert np.array_equal(images[1, 10:, 10:], FIELD[:22, :22])


def test_a_colour_profile_is_recorded_and_not_applied(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("a.png", "a.jpg", "a.tif"):
        path = tmp_path / name
        Image.fromarray(FIELD).save(path, icc_profile=profile)
        plain = tmp_path / f"plain-{name}"
        Image.fromarray(FIELD).save(plain)
        with open_slide(path, mpp=0.5) as slide, open_slide(plain, mpp=0.5) as other:
            assert slide.info.properties["icc"] == "present"
            assert "icc" not in other.info.properties
            a, b = (s.read_level(0, 0, 0, 120, 90) for s in (slide, other))
            assert np.array_equal(a, b)


def test_closed_and_without_associated_images(tmp_path):
    path = written(tmp_path, "a.png", imagecodecs.png_encode(FIELD))
    slide = ImageSlide(path, mpp=0.5)
    with pytest.raises(ReadError, match="no associated image"):
        slide.read_associated("thumbnail")
    slide.close()
    slide.close()
    with pytest.raises(ReadError, match="closed"):
        slide.read_level(0, 0, 0, 5, 5)
