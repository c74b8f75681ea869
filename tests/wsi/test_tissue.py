"""What is tissue, ink and fold, one trait at a time, and on the real slide."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from bagscope.wsi.overview import OVERVIEW_MPP
from bagscope.wsi.pen import MAX_PEN
from bagscope.wsi.tiling import TilingSpec
from bagscope.wsi.tissue import TissueMap, segment_tissue
from tests.wsi.real_slide import real_slide

WHITE = (242.0, 243.0, 240.0)
HE = (205.0, 130.0, 180.0)
# Colours of ink on white glass, as a scanner sees common markers.
INKS = {
    "red": (215.0, 45.0, 60.0),
    "green": (40.0, 140.0, 85.0),
    "blue": (40.0, 65.0, 165.0),
    "black": (38.0, 36.0, 40.0),
}
# Dense, strongly stained tissue that is not ink.
STAINS = {
    "eosin": (225.0, 75.0, 150.0),
    "haematoxylin": (85.0, 60.0, 145.0),
    "both": (120.0, 45.0, 110.0),
    "dab": (115.0, 65.0, 35.0),
    "dab over haematoxylin": (70.0, 45.0, 50.0),
}

Picture = NDArray[np.float64]
Mask = NDArray[np.bool_]


def scene(
    glass: tuple[float, float, float] = WHITE, tissue: tuple[float, float, float] = HE
) -> tuple[Picture, Mask]:
    """A round piece of grainy tissue on glass, 400 × 500 px of 8 µm."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:400, :500]
    inside = np.hypot(x - 250, y - 210) < 130
    picture = np.broadcast_to(np.array(glass), (400, 500, 3)).copy()
    density = np.log(np.array(glass) / np.array(tissue))
    grain = np.clip(1 + 0.3 * cv2.GaussianBlur(rng.normal(0, 2.5, (400, 500)), (0, 0), 0.9), 0.2, 3)
    picture[inside] = (np.array(glass) * np.exp(-density * grain[..., None]))[inside]
    return picture, inside


def seen(picture: Picture, *, quality: int = 80, mpp: float = OVERVIEW_MPP) -> TissueMap:
    """Segment a picture after a sensor's noise and JPEG."""
    noisy = picture + np.random.default_rng(1).normal(0, 1.2, picture.shape)
    blurred = cv2.GaussianBlur(noisy, (0, 0), 0.6)
    pixels = np.clip(np.rint(blurred), 0, 255).astype(np.uint8)
    _, stored = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(stored, cv2.IMREAD_COLOR)[..., ::-1]
    return segment_tissue(np.ascontiguousarray(decoded), mpp=mpp)


def overlap(found: Mask, truth: Mask) -> float:
    return np.count_nonzero(found & truth) / np.count_nonzero(found | truth)


# --- tissue ---------------------------------------------------------------------------------


@pytest.mark.parametrize("glass", [WHITE, (196.0, 192.0, 199.0), (160.0, 164.0, 158.0)])
@pytest.mark.parametrize("quality", [30, 85])
def test_tissue_is_outlined_on_bright_and_on_dim_glass(
    glass: tuple[float, float, float], quality: int
) -> None:
    dimmed = tuple(c * g / w for c, g, w in zip(HE, glass, WHITE, strict=True))
    picture, truth = scene(glass, dimmed)
    got = seen(picture, quality=quality)
    assert overlap(got.tissue, truth) > 0.95
    np.testing.assert_allclose(got.background, glass, atol=4)
    assert not got.pen.any()


def test_tissue_ten_levels_from_the_glass_is_outlined() -> None:
    faint = tuple(np.array(WHITE) - (4, 16, 7))
    picture, truth = scene(tissue=faint)
    assert overlap(seen(picture, quality=60).tissue, truth) > 0.9


def test_a_picture_full_of_tissue_is_all_tissue() -> None:
    rng = np.random.default_rng(3)
    picture = np.array(HE) + cv2.GaussianBlur(rng.normal(0, 60, (300, 300)), (0, 0), 1)[..., None]
    assert seen(picture).tissue.all()


@pytest.mark.parametrize("quality", [30, 60, 90])
def test_uneven_light_and_soft_shadows_are_not_tissue(quality: int) -> None:
    y, x = np.mgrid[-1:1:400j, -1:1:500j]
    light = 1 - 0.05 * x - 0.03 * y - 0.03 * (x * x + y * y)
    shadow = np.exp(-(((x - 0.4) / 0.35) ** 2) - ((y + 0.2) / 0.2) ** 2)
    picture = np.array((233.0, 238.0, 229.0)) * (light * (1 - 0.06 * shadow))[..., None]
    got = seen(picture, quality=quality)
    assert got.tissue.mean() < 0.01
    assert not got.pen.any()


@pytest.mark.parametrize("fill", [0, 128, 200, 255])
def test_padding_is_not_tissue(fill: int) -> None:
    picture, truth = scene()
    pixels = np.clip(np.rint(picture), 0, 255)
    pixels[:40] = pixels[-24:] = fill
    pixels[:, :60] = pixels[:, -30:] = fill
    got = seen(pixels)
    assert overlap(got.tissue, truth) > 0.95
    assert not got.tissue[:36].any() and not got.tissue[:, :56].any()
    np.testing.assert_allclose(got.background, WHITE, atol=4)


def test_tissue_cut_out_on_black_keeps_its_outline() -> None:
    picture, truth = scene()
    beyond = cv2.dilate(truth.astype(np.uint8), np.ones((41, 41), np.uint8)) == 0
    picture[beyond] = 0
    got = seen(picture)
    assert overlap(got.tissue, truth) > 0.93
    assert not got.pen.any()


def test_finer_and_coarser_overviews_show_the_same_tissue() -> None:
    picture, truth = scene()
    for mpp in (4.0, 16.0):
        scale = OVERVIEW_MPP / mpp
        way = cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA
        scaled = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=way)
        size = (scaled.shape[1], scaled.shape[0])
        wanted = cv2.resize(truth.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        got = seen(scaled, mpp=mpp)
        assert got.tissue.shape == wanted.shape
        assert got.mpp == mpp
        assert overlap(got.tissue, wanted) > 0.94


# --- ink --------------------------------------------------------------------------------------


def stroke(points: list[tuple[int, int]], wide_px: int) -> NDArray[np.float64]:
    drawn = np.zeros((400, 500), np.uint8)
    cv2.polylines(drawn, [np.array(points, np.int32)], False, 1, wide_px)
    return cv2.GaussianBlur(drawn.astype(np.float64), (0, 0), 1.0)


def inked(picture: Picture, where: NDArray[np.float64], colour: tuple[float, ...]) -> Picture:
    density = np.log(np.array(WHITE) / np.array(colour))
    return np.asarray(picture * np.exp(-where[..., None] * density))


@pytest.mark.parametrize("name", INKS)
def test_ink_is_found_on_glass_and_where_it_runs_across_tissue(name: str) -> None:
    picture, truth = scene()
    where = stroke([(20, 30), (140, 120), (260, 200), (420, 260)], 24)
    got = seen(inked(picture, where, INKS[name]))
    ink = where > 0.5
    assert overlap(got.pen, ink) > 0.75
    assert np.count_nonzero(got.pen & ink & truth) > 0.8 * np.count_nonzero(ink & truth)
    assert not (got.pen & got.tissue).any()
    assert overlap(got.tissue, truth & ~ink) > 0.9


@pytest.mark.parametrize("name", STAINS)
def test_strong_stain_is_not_ink(name: str) -> None:
    picture, truth = scene(tissue=STAINS[name])
    got = seen(picture)
    assert got.pen.mean() < 0.001
    assert overlap(got.tissue, truth) > 0.95


def test_the_documented_share_of_ink_is_what_tiling_leaves_out() -> None:
    assert TilingSpec().max_pen == MAX_PEN


# --- folds --------------------------------------------------------------------------------------


def test_a_doubled_band_is_a_fold_and_plain_tissue_is_none() -> None:
    picture, truth = scene()
    assert not seen(picture).fold.any()
    band = stroke([(170, 150), (240, 200), (300, 290)], 10)
    density = -np.log(picture / np.array(WHITE))
    folded = np.array(WHITE) * np.exp(-density * (1 + band[..., None]))
    got = seen(folded)
    assert overlap(got.fold, (band > 0.5) & truth) > 0.5
    assert not (got.fold & ~got.tissue).any()


# --- the real slide -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_overviews() -> Mapping[float, NDArray[np.uint8]]:
    import openslide

    with openslide.OpenSlide(str(real_slide())) as slide:
        region = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    return {
        mpp: np.ascontiguousarray(
            cv2.resize(region, None, fx=0.499 / mpp, fy=0.499 / mpp, interpolation=cv2.INTER_AREA)
        )
        for mpp in (4.0, 8.0, 16.0)
    }


def test_the_real_slide_looks_alike_at_every_resolution(
    real_overviews: Mapping[float, NDArray[np.uint8]],
) -> None:
    found = {mpp: segment_tissue(rgb, mpp=mpp) for mpp, rgb in real_overviews.items()}
    size = found[8.0].tissue.shape[::-1]
    for got in found.values():
        scaled = cv2.resize(got.tissue.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        assert overlap(scaled, found[8.0].tissue) > 0.93
        assert not got.pen.any()
        assert got.fold.mean() < 0.05


def test_the_real_slides_glass_is_out_and_its_dense_and_pale_tissue_in(
    real_overviews: Mapping[float, NDArray[np.uint8]],
) -> None:
    got = segment_tissue(real_overviews[8.0], mpp=8.0)
    # Places looked up by eye, in micrometres from the top left corner.
    for x_um, y_um in ((100, 100), (950, 150), (150, 1200), (1050, 900), (830, 860)):
        assert not got.tissue[int(y_um / 8), int(x_um / 8)], (x_um, y_um)
    for x_um, y_um in ((500, 600), (420, 1000), (600, 1350), (600, 700), (250, 510)):
        assert got.tissue[int(y_um / 8), int(x_um / 8)], (x_um, y_um)
