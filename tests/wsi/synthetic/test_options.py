"""Each option of a synthetic slide has its effect, and no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pytest
from numpy.typing import NDArray

from bagscope.wsi.synthetic import SyntheticSpec, write_slide
from bagscope.wsi.synthetic.jpeg_tiles import Subsampling
from bagscope.wsi.synthetic.spec import PenColour
from tests.wsi.synthetic.conftest import SMALL, level_rgb

PLAIN = replace(SMALL, tumor_fraction=0.0)


def written(tmp_path: Path, **options: Any) -> NDArray[np.int16]:
    return level_rgb(write_slide(tmp_path / "a.svs", replace(PLAIN, **options)))


def changed(image: NDArray[np.int16], plain: NDArray[np.int16]) -> NDArray[np.bool_]:
    soft = cv2.GaussianBlur(np.abs(image - plain).max(axis=2).astype(np.float32), (0, 0), 6)
    return np.asarray(soft > 12)


@pytest.mark.parametrize(
    ("colour", "brightest"), [("red", 0), ("green", 1), ("blue", 2), ("black", None)]
)
def test_pen_colours_what_it_covers(
    tmp_path: Path, plain_rgb: NDArray[np.int16], colour: PenColour, brightest: int | None
) -> None:
    image = written(tmp_path, pen=(colour,))
    covered = changed(image, plain_rgb)
    assert 0.02 < covered.mean() < 0.6
    mean = image[covered].mean(axis=0)
    assert mean.max() < plain_rgb[covered].mean(axis=0).max()
    if brightest is None:
        assert mean.max() < 110
    else:
        assert np.argmax(mean) == brightest
        assert mean[brightest] - np.delete(mean, brightest).max() > 10
    untouched = cv2.dilate(covered.astype(np.uint8), np.ones((65, 65))) == 0
    assert np.abs(image - plain_rgb)[untouched].mean() < 0.5


def test_blur_takes_the_detail(tmp_path: Path, plain_rgb: NDArray[np.int16]) -> None:
    image = written(tmp_path, blur=1)
    covered = cv2.erode(changed(image, plain_rgb).astype(np.uint8), np.ones((41, 41))) > 0
    assert covered.sum() > 20_000

    def detail(rgb: NDArray[np.int16]) -> float:
        return float(cv2.Laplacian(rgb[..., 1].astype(np.float32), cv2.CV_32F)[covered].std())

    assert detail(image) < 0.6 * detail(plain_rgb)
    assert image[covered].mean() == pytest.approx(plain_rgb[covered].mean(), abs=6)


def test_folds_lie_double(tmp_path: Path, plain_rgb: NDArray[np.int16]) -> None:
    image = written(tmp_path, folds=2)
    covered = changed(image, plain_rgb)
    assert 0.002 < covered.mean() < 0.3
    # Twice the tissue absorbs about twice.
    light = [np.log(np.clip(a[covered].mean(axis=0)[1], 1, None) / 243) for a in (image, plain_rgb)]
    assert 1.5 < light[0] / light[1] < 4


def test_bubbles_have_dark_rims(tmp_path: Path, plain_rgb: NDArray[np.int16]) -> None:
    image = written(tmp_path, bubbles=1)
    darker = cv2.GaussianBlur((plain_rgb - image).mean(axis=2).astype(np.float32), (0, 0), 3) > 60
    assert darker.sum() > 2000
    points = np.argwhere(darker)[:, ::-1].astype(np.float32)
    (x, y), radius = cv2.minEnclosingCircle(points)
    distances = np.hypot(points[:, 0] - x, points[:, 1] - y)
    assert np.median(np.abs(distances - np.median(distances))) < 0.2 * radius


def test_backgrounds(tmp_path: Path, plain_rgb: NDArray[np.int16]) -> None:
    corner = np.s_[:64, :64]
    assert plain_rgb[corner].mean() > 235
    grey = written(tmp_path, background="grey")
    assert 180 < grey[corner].mean() < 210
    black = written(tmp_path, background="black", tissue_fraction=0.1, mpp=1.0)
    assert (black.max(axis=2) < 12).mean() > 0.1
    assert (black.min(axis=2) > 225).mean() > 0.05  # glass around the tissue


def test_sites_differ_in_stain_alone(tmp_path: Path, plain_rgb: NDArray[np.int16]) -> None:
    other = written(tmp_path, site=1)
    third = written(tmp_path, site=7)
    tissue = plain_rgb.min(axis=2) < 200
    for image in (other, third):
        shift = np.abs(image[tissue].mean(axis=0) - plain_rgb[tissue].mean(axis=0))
        assert shift.max() > 5
        pair = np.corrcoef(image[..., 1].ravel(), plain_rgb[..., 1].ravel())
        assert pair[0, 1] > 0.95


def test_dab_is_brown_on_blue(tmp_path: Path, plain_rgb: NDArray[np.int16]) -> None:
    image = written(tmp_path, stain="dab")

    def brown(rgb: NDArray[np.int16]) -> float:
        red, green, blue = (rgb[..., c] for c in range(3))
        return float(((red > green + 10) & (green > blue + 5) & (red < 150)).mean())

    assert brown(image) > 0.002
    assert brown(plain_rgb) < brown(image) / 20


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0", "rgb"])
def test_chroma_subsampling_changes_storage_only(
    tmp_path: Path, plain_rgb: NDArray[np.int16], subsampling: Subsampling
) -> None:
    image = written(tmp_path, subsampling=subsampling)
    assert np.abs(image - plain_rgb).mean() < 3


def test_no_pixel_size_where_none_is_to_be_stated(tmp_path: Path) -> None:
    truth = write_slide(tmp_path / "a.svs", replace(PLAIN, state_mpp=False, label_and_macro=False))
    with openslide.OpenSlide(truth.slide) as slide:
        keys = {key.lower() for key in slide.properties}
        assert not any(
            "mpp" in key or "resolution" in key for key in keys - {"tiff.resolutionunit"}
        )
        assert "MPP" not in slide.properties["tiff.ImageDescription"]
        assert set(slide.associated_images) == {"thumbnail"}


def test_planted_faults_lie_in_tissue(tmp_path: Path, plain_rgb: NDArray[np.int16]) -> None:
    truth = write_slide(tmp_path / "a.svs", replace(PLAIN, missing_tiles=1, corrupt_tiles=1))
    failed = transparent = 0
    for y in range(0, 1600, 256):
        for x in range(0, 2048, 256):
            with openslide.OpenSlide(truth.slide) as slide:
                try:
                    region = np.asarray(slide.read_region((x, y), 0, (256, 256)))
                except openslide.OpenSlideError:
                    failed += 1
                    continue
            if not region[: min(256, 1600 - y), :, 3].any():
                transparent += 1
                assert (plain_rgb[y : y + 256, x : x + 256].min(axis=2) < 220).any()
    assert (failed, transparent) == (1, 1)


def test_a_truncated_slide_does_not_open(tmp_path: Path) -> None:
    truth = write_slide(tmp_path / "a.svs", replace(PLAIN, truncated=0.5))
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(truth.slide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width_px": 100}, "too small"),
        ({"mpp": 3.0}, "mpp is 3.0"),
        ({"tumor_fraction": 0.9}, "tumor_fraction is 0.9"),
        ({"tissue_fraction": 0.0}, "tissue_fraction is 0.0"),
        ({"variety": 0.5}, "variety is 0.5"),
        ({"truncated": 1.0}, "truncated is 1.0"),
    ],
)
def test_impossible_slides_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticSpec(**options)


def test_slides_differ_more_in_their_tissue_where_variety_asks_for_it() -> None:
    from bagscope.wsi.synthetic.layout import plan_layout

    def glands(variety: float) -> np.ndarray:
        shares = []
        for seed in range(12):
            spec = SyntheticSpec(width_px=2000, height_px=2000, mpp=1.0, seed=seed, variety=variety)
            fields = plan_layout(spec).fields
            shares.append((fields.gland[fields.depth_um > 0] > 0).mean())
        return np.array(shares)

    usual, various = glands(1.0), glands(2.5)
    assert usual.min() > 0.29 and usual.max() < 0.61
    assert various.std() > 2 * usual.std()
    assert various.min() > 0.05 and various.max() < 0.85
