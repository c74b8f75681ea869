"""The fast path against OpenSlide: the same facts, the same pixels, and honest about damage."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading

import cv2
import numpy as np
import openslide
import pytest
from PIL import Image

from bagscope.errors import ReadError
from bagscope.wsi.geometry import ReadPlan, plan_read
from bagscope.wsi.jpegtiff_backend import JpegTiffSlide
from bagscope.wsi.opening import open_slide, stored_faults_l0
from tests.builders import build_svs, field_rgb
from tests.wsi.real_slide import real_slide
from tests.wsi.tiff_builders import build_tiff, move_tile_beyond_end, overwrite, stored_span

LAYOUTS = [
    ("generic", "444", "<", False),
    ("generic", "422", ">", True),
    ("generic", "420", "<", False),
    ("generic", "rgb", ">", True),
    ("aperio", "420", "<", False),
    ("aperio", "rgb", "<", False),
    ("philips", "422", ">", True),
]


def reference(slide, level, x_lv, y_lv, width, height, background=(255, 255, 255)):
    """Read through openslide-python at a position that falls on a level pixel."""
    downsample = slide.level_downsamples[level]
    location = round(x_lv * downsample), round(y_lv * downsample)
    image = slide.read_region(location, level, (width, height))
    ground = Image.new("RGBA", image.size, (*background, 255))
    return np.asarray(Image.alpha_composite(ground, image).convert("RGB"))


def compare_everywhere(path, seed=0, positions=25):
    rng = np.random.default_rng(seed)
    with JpegTiffSlide(path) as slide, openslide.OpenSlide(path) as other:
        for level, stored in enumerate(slide.info.levels):
            assert stored.downsample == round(stored.downsample), "offsets would be interpolated"
            for _ in range(positions):
                width, height = rng.integers(1, min(400, stored.width_px + 50), 2).tolist()
                x = int(rng.integers(-60, stored.width_px + 20))
                y = int(rng.integers(-60, stored.height_px + 20))
                expected = reference(other, level, x, y, width, height)
                assert np.array_equal(slide.read_level(level, x, y, width, height), expected)


@pytest.mark.parametrize(("vendor", "chroma", "byte_order", "bigtiff"), LAYOUTS)
def test_pixels_equal_openslides_at_any_position(tmp_path, vendor, chroma, byte_order, bigtiff):
    path = tmp_path / "slide.tif"
    build_tiff(
        path,
        sizes_px=((708, 500), (177, 125)),
        tile_px=(128, 64),
        vendor=vendor,
        chroma=chroma,
        byte_order=byte_order,
        bigtiff=bigtiff,
    )
    compare_everywhere(path)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "rgb"])
def test_aperio_files_with_shared_tables_read_exactly(tmp_path, subsampling):
    path = tmp_path / "slide.svs"
    build_svs(path, subsampling=subsampling, bigtiff=subsampling == "rgb")
    compare_everywhere(path)
    with open_slide(path) as slide:
        whole = slide.read_level(0, 0, 0, 1024, 768).astype(int)
    assert np.abs(whole - field_rgb(1024, 768)).mean() < 4, "colours are not the field's"


def test_the_real_slide_reads_exactly():
    compare_everywhere(real_slide(), positions=60)


@pytest.mark.parametrize(("vendor", "chroma", "byte_order", "bigtiff"), LAYOUTS[::3])
def test_facts_equal_openslides(tmp_path, vendor, chroma, byte_order, bigtiff):
    path = tmp_path / "slide.tif"
    build_tiff(path, vendor=vendor, chroma=chroma, byte_order=byte_order, bigtiff=bigtiff)
    assert_same_facts(path)


def test_facts_of_the_real_slide_equal_openslides():
    assert_same_facts(real_slide())


def assert_same_facts(path):
    with open_slide(path) as fast, open_slide(path, backend="openslide") as slow:
        assert (fast.info.backend, slow.info.backend) == ("jpegtiff", "openslide")
        assert dataclasses.replace(fast.info, backend="openslide") == slow.info
        assert len(fast.info.levels) >= 1


# --- tiles ----------------------------------------------------------------------------------


def plan(tile_px, region_px, level=0, downsample=1.0):
    return ReadPlan(
        mpp=0.5,
        tile_px=tile_px,
        level=level,
        downsample=downsample,
        region_px=region_px,
        extent_l0=region_px * downsample,
        mpp_effective=0.5,
    )


def expected_tiles(path, corners, plan_, background=(255, 255, 255)):
    tiles = []
    with openslide.OpenSlide(path) as other:
        for x, y in corners.tolist():
            edge = plan_.region_px
            region = reference(other, plan_.level, x, y, edge, edge, background)
            if edge != plan_.tile_px:
                method = cv2.INTER_AREA if edge > plan_.tile_px else cv2.INTER_LINEAR
                region = cv2.resize(region, (plan_.tile_px,) * 2, interpolation=method)
            tiles.append(region)
    return np.stack(tiles)


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    path = tmp_path_factory.mktemp("svs") / "slide.svs"
    build_svs(path, width_px=2000, height_px=1500, downsamples=(1,), tile_px=128)
    return path


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("tile_px", "region_px"),
    [(128, 128), (100, 100), (256, 256), (64, 128), (128, 256), (60, 240), (100, 127), (96, 64)],
)
@pytest.mark.parametrize("step", [128, 97, 64])
def test_tiles_equal_openslides(svs, tile_px, region_px, step, threads):
    x, y = np.meshgrid(np.arange(-1, 14) * step * 2, np.arange(-1, 5) * step * 3)
    corners = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int32)
    with open_slide(svs) as slide:
        assert slide.info.backend == "jpegtiff"
        batch = slide.read_tiles(corners, plan(tile_px, region_px), threads=threads)
    assert batch.readable.all() and batch.problems == ()
    assert np.array_equal(batch.images, expected_tiles(svs, corners, plan(tile_px, region_px)))


def test_tiles_do_not_depend_on_order_or_on_their_batch(svs):
    rng = np.random.default_rng(1)
    corners = rng.integers(-50, 1500, (60, 2)).astype(np.int32)
    asked = plan(64, 128)
    with open_slide(svs) as slide:
        together = slide.read_tiles(corners, asked).images
        for threads in (1, 2):
            alone = [slide.read_tiles(c[None], asked, threads=threads).images[0] for c in corners]
            assert np.array_equal(together, np.stack(alone))
        shuffled = rng.permutation(len(corners))
        assert np.array_equal(slide.read_tiles(corners[shuffled], asked).images, together[shuffled])


def test_a_batch_that_goes_on_in_raster_order_decodes_no_tile_twice(svs, monkeypatch):
    x, y = np.meshgrid(np.arange(14) * 128 + 50, np.arange(10) * 128 + 70)
    corners = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int32)
    decoded = []
    with JpegTiffSlide(svs) as slide:
        inner = slide._stored_tile
        monkeypatch.setattr(
            slide,
            "_stored_tile",
            lambda level, number, out, **more: (
                decoded.append(number) or inner(level, number, out, **more)
            ),
        )
        for start in range(0, len(corners), 33):
            slide.read_tiles(corners[start : start + 33], plan(128, 128), threads=2)
    assert len(decoded) == len(set(decoded)) == 15 * 11


def test_what_is_kept_between_batches_is_bounded(svs, monkeypatch):
    monkeypatch.setattr("bagscope.wsi.tile_assembly.KEEP_BYTES", 5 * 128 * 128 * 3)
    corners = np.array([[50 + 128 * i, 70] for i in range(14)], np.int32)
    with JpegTiffSlide(svs) as slide:
        slide.read_tiles(corners, plan(128, 128))
        (store,) = slide._stores.values()
        assert len(store.tiles) + len(store.idle) <= 5
        again = slide.read_tiles(corners, plan(128, 128)).images
    assert np.array_equal(again, expected_tiles(svs, corners, plan(128, 128)))


def test_several_readers_of_one_slide_do_not_disturb_each_other(svs):
    rng = np.random.default_rng(2)
    jobs = [rng.integers(0, 1300, (40, 2)).astype(np.int32) for _ in range(6)]
    asked = plan(100, 100)
    results = [None] * len(jobs)
    with open_slide(svs) as slide:

        def read(i):
            results[i] = slide.read_tiles(jobs[i], asked, threads=2).images

        readers = [threading.Thread(target=read, args=(i,)) for i in range(len(jobs))]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    for corners, images in zip(jobs, results, strict=True):
        assert np.array_equal(images, expected_tiles(svs, corners, asked))


def test_the_given_array_is_filled_in_place(svs):
    corners = np.array([[0, 0], [300, 200]], np.int32)
    out = np.zeros((2, 100, 100, 3), np.uint8)
    with open_slide(svs) as slide:
        batch = slide.read_tiles(corners, plan(100, 100), out=out)
        assert batch.images is out and out.any()
        with pytest.raises(ValueError, match="C-contiguous"):
            slide.read_tiles(corners, plan(100, 100), out=out[:, ::2, ::2])
        assert slide.read_tiles(corners[:0], plan(100, 100)).images.shape == (0, 100, 100, 3)


def test_coarse_levels_are_read_at_their_own_pixels(tmp_path):
    path = tmp_path / "slide.svs"
    build_svs(path, width_px=2048, height_px=1024, downsamples=(1, 4), tile_px=128)
    corners = np.array([[0, 0], [400, 256], [1999, 1001]], np.int32)
    asked = plan_read([1.0, 4.0], 0.5, mpp=2.0, tile_px=64)
    with open_slide(path) as slide, openslide.OpenSlide(path) as other:
        tiles = slide.read_tiles(corners, asked).images
        for tile, (x, y) in zip(tiles, corners.tolist(), strict=True):
            expected = reference(other, 1, round(x / 4), round(y / 4), 64, 64)
            assert np.array_equal(tile, expected)


@pytest.mark.parametrize("mpp_l0", [0.5, 0.25, 0.23])
def test_scans_of_one_field_give_alike_tiles(tmp_path, mpp_l0):
    """A 20×, a 40× and a 0.23-µm scan, with a fractional pyramid, show the same 64 µm squares."""
    size = round(512 / mpp_l0)
    path = tmp_path / "scan.svs"
    build_svs(
        path,
        image=field_rgb(size, size, mpp=mpp_l0),
        mpp=mpp_l0,
        objective=None,
        quality=95,
        subsampling="4:4:4",
        level_sizes_px=[(size, size), (size // 4, size // 4 - 1)],
    )
    with open_slide(path) as slide:
        downsamples = [level.downsample for level in slide.info.levels]
        asked = plan_read(downsamples, slide.info.spacing.mpp, mpp=0.5, tile_px=128)
        corners = np.rint(np.array([[64, 64], [128, 192], [320, 256]]) / mpp_l0).astype(np.int32)
        tiles = slide.read_tiles(corners, asked).images.astype(float)
    field = field_rgb(1024, 1024, mpp=0.5).astype(float)
    for tile, (x, y) in zip(tiles, [(128, 128), (256, 384), (640, 512)], strict=True):
        expected = field[y : y + 128, x : x + 128]
        smooth = [cv2.GaussianBlur(image, (0, 0), 2) for image in (tile, expected)]
        assert np.abs(smooth[0] - smooth[1]).mean() < 3


# --- DCT-scaled decoding --------------------------------------------------------------------


def psnr_db(a, b):
    mean_square = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * np.log10(255**2 / max(mean_square, 1e-9))


@pytest.mark.parametrize("chroma", ["444", "420", "rgb"])
@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_dct_scaling_stays_close_to_the_area_mean(tmp_path, chroma, factor):
    path = tmp_path / "slide.tif"
    build_tiff(path, sizes_px=((1024, 1024),), tile_px=(256, 256), chroma=chroma)
    corners = np.array([[0, 0], [512, 256], [16, 48]], np.int32)
    asked = plan(256 // factor, 256)
    with open_slide(path, mpp=0.5) as slide:
        area = slide.read_tiles(corners, asked).images
        dct = slide.read_tiles(corners, asked, downscale="dct").images
    assert psnr_db(area, dct) >= 40
    assert not np.array_equal(area, dct), "DCT scaling was not used"


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_dct_scaling_stays_close_on_every_tile_of_the_real_slide(factor):
    x, y = np.meshgrid(np.arange(9) * 240, np.arange(12) * 240)
    corners = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int32)
    with open_slide(real_slide()) as slide:
        area = slide.read_tiles(corners, plan(240 // factor, 240)).images
        dct = slide.read_tiles(corners, plan(240 // factor, 240), downscale="dct").images
    assert min(psnr_db(a, b) for a, b in zip(area, dct, strict=True)) >= 40
    assert not np.array_equal(area, dct)


def test_dct_scaling_is_not_used_where_it_would_be_worse(tmp_path):
    path = tmp_path / "slide.tif"
    build_tiff(path, sizes_px=((1024, 1024),), tile_px=(256, 256), chroma="422")
    corners = np.array([[0, 0], [512, 256]], np.int32)
    with open_slide(path, mpp=0.5) as slide:
        for asked in (plan(128, 256), plan(100, 300)):
            area = slide.read_tiles(corners, asked).images
            assert np.array_equal(slide.read_tiles(corners, asked, downscale="dct").images, area)


def test_dct_scaling_of_a_tile_does_not_depend_on_its_batch(tmp_path):
    path = tmp_path / "slide.tif"
    build_tiff(path, sizes_px=((1000, 1000),), tile_px=(256, 256), chroma="420")
    corners = np.array([[0, 0], [255, 3], [257, 256], [800, 900]], np.int32)
    with open_slide(path, mpp=0.5) as slide:
        together = slide.read_tiles(corners, plan(64, 128), downscale="dct").images
        for corner, tile in zip(corners, together, strict=True):
            alone = slide.read_tiles(corner[None], plan(64, 128), downscale="dct").images[0]
            assert np.array_equal(alone, tile)


# --- missing and damaged --------------------------------------------------------------------


@pytest.mark.parametrize("vendor", ["generic", "aperio", "philips"])
def test_missing_tiles_show_what_openslide_shows(tmp_path, vendor):
    path = tmp_path / "slide.tif"
    sizes = ((1024, 1024), (256, 256), (64, 64))
    missing = {0: [0, 1, 16, 17, 100], 1: [5]}
    build_tiff(path, sizes_px=sizes, tile_px=(64, 64), vendor=vendor, missing=missing)
    with JpegTiffSlide(path) as slide, openslide.OpenSlide(path) as other:
        for level, (width, height) in enumerate(sizes):
            expected = reference(other, level, 0, 0, width, height)
            found = slide.read_level(level, 0, 0, width, height)
            # Half-transparent pixels, where Aperio tiles are redrawn, may round differently.
            assert np.abs(found.astype(int) - expected).max() <= 1
        corners = np.array([[0, 0], [32, 32], [200, 400]], np.int32)
        batch = slide.read_tiles(corners, plan(64, 64))
    assert batch.readable.all()
    assert (batch.images[0] == 255).all()
    assert not (batch.images[2] == 255).all()


def damaged_slide(tmp_path, kind):
    path = tmp_path / f"{kind}.tif"
    build_tiff(path, sizes_px=((512, 512), (64, 64)), tile_px=(128, 128))
    offset, length = stored_span(path, 0, 5)
    if kind == "beyond":
        move_tile_beyond_end(path, 0, 5)
    elif kind == "zeroed":
        overwrite(path, offset, bytes(length))
    elif kind == "second half zeroed":
        overwrite(path, offset + length // 2, bytes(length - length // 2))
    else:
        overwrite(path, offset + length - length // 4, b"\xff\xd9" + bytes(length // 4 - 2))
    return path


@pytest.mark.parametrize("kind", ["beyond", "zeroed", "second half zeroed", "cut short"])
@pytest.mark.parametrize(("tile_px", "region_px"), [(128, 128), (96, 96), (64, 128), (50, 101)])
@pytest.mark.parametrize("threads", [1, 2])
def test_damaged_tiles_are_marked_and_the_others_stay(tmp_path, kind, tile_px, region_px, threads):
    path = damaged_slide(tmp_path, kind)
    corners = np.array([[128, 128], [256, 128], [140, 140], [380, 380]], np.int32)
    whole = tmp_path / "whole.tif"
    build_tiff(whole, sizes_px=((512, 512),), tile_px=(128, 128))
    with open_slide(path, mpp=0.5) as slide:
        batch = slide.read_tiles(corners, plan(tile_px, region_px), threads=threads)
        assert batch.readable.tolist() == [False, True, False, True]
        assert (batch.images[~batch.readable] == 255).all()
        assert "x=128, y=128" in batch.problems[0]
        expected = expected_tiles(whole, corners, plan(tile_px, region_px))
        assert np.array_equal(batch.images[[1, 3]], expected[[1, 3]])
        with pytest.raises(ReadError, match="stored tile"):
            slide.read_level(0, 128, 128, 10, 10)
        assert slide.read_level(0, 300, 300, 10, 10).any(), "the slide stays usable"


@pytest.mark.parametrize("kind", ["beyond", "zeroed", "second half zeroed", "cut short"])
def test_openslide_refuses_the_same_tiles(tmp_path, kind):
    path = damaged_slide(tmp_path, kind)
    corners = np.array([[128, 128], [256, 128], [140, 140], [380, 380]], np.int32)
    with (
        open_slide(path, mpp=0.5) as fast,
        open_slide(path, mpp=0.5, backend="openslide") as slow,
    ):
        ours, theirs = (s.read_tiles(corners, plan(96, 96), threads=2) for s in (fast, slow))
    assert ours.readable.tolist() == theirs.readable.tolist()
    assert np.array_equal(ours.images, theirs.images)


def test_problems_are_counted_once_per_cause(tmp_path):
    path = damaged_slide(tmp_path, "beyond")
    corners = np.array([[130, 130], [131, 131], [132, 132]], np.int32)
    with open_slide(path, mpp=0.5) as slide:
        (problem,) = slide.read_tiles(corners, plan(32, 32)).problems
    assert "x=130, y=130" in problem and "and 2 more" in problem and "cut short" in problem


def test_tiles_beyond_the_end_of_the_file_are_known_without_decoding(tmp_path):
    with open_slide(damaged_slide(tmp_path, "beyond"), mpp=0.5) as slide:
        (fault,) = stored_faults_l0(slide)
    assert (fault.x_l0, fault.y_l0, fault.width_l0, fault.height_l0) == (128, 128, 128, 128)


def test_a_whole_file_has_no_faults(svs):
    with open_slide(svs) as slide:
        assert stored_faults_l0(slide) == []
    with open_slide(svs, backend="openslide") as slide:
        assert stored_faults_l0(slide) == []


def test_a_missing_end_marker_and_padding_are_harmless(tmp_path):
    path, whole = tmp_path / "bare.tif", tmp_path / "whole.tif"

    def strip(_level, number, stream):
        return stream[:-2] if number % 2 else stream[:-2] + bytes(60) + stream[-2:]

    build_tiff(path, edit=strip)
    build_tiff(whole)
    with open_slide(path, mpp=0.5) as slide, open_slide(whole, mpp=0.5) as other:
        assert np.array_equal(
            slide.read_level(0, 0, 0, 700, 500), other.read_level(0, 0, 0, 700, 500)
        )


# --- associated images, closing, forking ----------------------------------------------------


def test_label_and_macro_are_refused_and_the_thumbnail_is_not(tmp_path):
    path = tmp_path / "slide.svs"
    build_svs(path, associated=("thumbnail", "label", "macro"))
    with open_slide(path) as slide:
        assert {"label", "macro", "thumbnail"} <= set(slide.info.associated)
        for name in ("label", "macro", "Label"):
            with pytest.raises(ReadError, match="never read"):
                slide.read_associated(name)
        assert slide.read_associated("thumbnail").shape[2] == 3
        with pytest.raises(ReadError, match="no associated image 'map'"):
            slide.read_associated("map")


def test_reading_after_closing_is_an_error_and_closing_twice_is_not(svs):
    slide = open_slide(svs)
    slide.close()
    slide.close()
    with pytest.raises(ReadError, match="closed"):
        slide.read_level(0, 0, 0, 10, 10)
    assert not slide.read_tiles(np.zeros((1, 2), np.int32), plan(64, 64)).readable[0]


def _read_in_child(slide, queue):
    level = slide.read_level(1, 0, 0, 64, 64)
    tiles = slide.read_tiles(np.array([[10, 10], [300, 300]], np.int32), plan(64, 64), threads=2)
    queue.put((level, tiles.images, slide.read_associated("thumbnail").shape))


@pytest.mark.parametrize("backend", ["jpegtiff", "openslide"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_slide_that_came_through_a_fork_still_reads(tmp_path, backend):
    path = tmp_path / "slide.svs"
    build_svs(path, associated=("thumbnail",))
    context = multiprocessing.get_context("fork")
    with open_slide(path, backend=backend) as slide:
        expected = slide.read_level(1, 0, 0, 64, 64)
        queue = context.Queue()
        child = context.Process(target=_read_in_child, args=(slide, queue))
        child.start()
        level, tiles, shape = queue.get(timeout=30)
        child.join(timeout=30)
        assert child.exitcode == 0
        assert np.array_equal(level, expected)
        assert tiles.shape == (2, 64, 64, 3) and shape[2] == 3
        assert np.array_equal(slide.read_level(1, 0, 0, 64, 64), expected)


def test_a_level_that_is_not_there_is_a_callers_error(svs):
    with open_slide(svs) as slide:
        with pytest.raises(ValueError, match="level 3"):
            slide.read_level(3, 0, 0, 10, 10)
        with pytest.raises(ValueError, match="no pixel"):
            slide.read_level(0, 0, 0, 0, 10)
