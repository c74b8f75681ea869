from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from numpy.typing import NDArray

from bagscope.wsi.synthetic import SyntheticSpec, SyntheticTruth, write_slide
from bagscope.wsi.synthetic.spec import TISSUE_GREY, TUMOR_GREY
from tests.wsi.synthetic.conftest import SMALL, level_rgb


def truth_mask(truth: SyntheticTruth) -> NDArray[np.uint8]:
    mask = cv2.imread(str(truth.mask), cv2.IMREAD_GRAYSCALE)
    assert mask is not None
    return np.asarray(mask, np.uint8)


def test_openslide_opens_it_as_aperio(small_truth: SyntheticTruth) -> None:
    with openslide.OpenSlide(small_truth.slide) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.25
        assert float(slide.properties["openslide.mpp-y"]) == 0.25
        assert float(slide.properties["openslide.objective-power"]) == 40
        assert slide.level_dimensions == ((2048, 1600), (512, 400))
        assert slide.level_downsamples == (1.0, 4.0)
        assert set(slide.associated_images) == {"thumbnail", "label", "macro"}


@pytest.mark.parametrize(
    ("width_px", "height_px", "tile_px", "downsamples"),
    [(1003, 771, 240, (1, 2, 6)), (513, 1100, 512, (1, 8)), (300, 300, 256, (1,))],
)
def test_coarser_levels_are_area_means_whatever_the_size(
    tmp_path: Path, width_px: int, height_px: int, tile_px: int, downsamples: tuple[int, ...]
) -> None:
    spec = SyntheticSpec(
        width_px=width_px,
        height_px=height_px,
        tile_px=tile_px,
        downsamples=downsamples,
        quality=98,
        subsampling="4:4:4",
    )
    truth = write_slide(tmp_path / "a.svs", spec)
    with openslide.OpenSlide(truth.slide) as slide:
        expected = tuple((width_px // d, height_px // d) for d in downsamples)
        assert slide.level_dimensions == expected
    fine = level_rgb(truth).astype(np.float32)
    for level, downsample in enumerate(downsamples):
        width, height = expected[level]
        cropped = fine[: height * downsample, : width * downsample]
        means = cropped.reshape(height, downsample, width, downsample, 3).mean(axis=(1, 3))
        assert np.abs(level_rgb(truth, level) - means).mean() < 1.5


def test_levels_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole multiple"):
        write_slide(tmp_path / "a.svs", replace(SMALL, downsamples=(1, 4, 6)))
    assert list(tmp_path.iterdir()) == []


def test_equal_specs_make_equal_bytes(small_truth: SyntheticTruth, tmp_path: Path) -> None:
    again = write_slide(tmp_path / "small.svs", SMALL, threads=2)
    for name in ("slide", "mask", "geojson"):
        one, two = getattr(small_truth, name), getattr(again, name)
        assert one.read_bytes() == two.read_bytes(), name
    other = write_slide(tmp_path / "other.svs", replace(SMALL, seed=5))
    assert other.slide.read_bytes() != again.slide.read_bytes()


def test_one_field_at_several_resolutions(tmp_path: Path, small_rgb: NDArray[np.int16]) -> None:
    """What lies at a place in micrometres is there at every mpp."""
    for mpp, width_px, height_px in ((0.5, 1024, 800), (0.23, 2226, 1739)):
        spec = replace(SMALL, mpp=mpp, width_px=width_px, height_px=height_px)
        other = level_rgb(write_slide(tmp_path / f"{mpp}.svs", spec)).astype(np.uint8)
        width, height = (round(n * mpp / 1.0) for n in (width_px, height_px))
        views = [
            cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float64)
            for image in (small_rgb.astype(np.uint8), other)
        ]
        correlation = np.corrcoef(views[0].ravel(), views[1].ravel())[0, 1]
        assert correlation > 0.97


def test_the_outlines_enclose_the_mask(small_truth: SyntheticTruth) -> None:
    mask = truth_mask(small_truth) == TUMOR_GREY
    collection = json.loads(small_truth.geojson.read_text(encoding="utf-8"))
    drawn = np.zeros((1600, 2048), np.uint8)
    for feature in collection["features"]:
        assert feature["properties"]["classification"]["name"] == "Tumor"
        rings = [np.rint(np.array(r)).astype(np.int32) for r in feature["geometry"]["coordinates"]]
        cv2.fillPoly(drawn, rings, 1)
    whole = np.kron(mask, np.ones((16, 16), np.bool_)).astype(bool)
    union = (whole | (drawn > 0)).sum()
    assert (whole & (drawn > 0)).sum() / union > 0.98


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3])
def test_the_planted_area_is_the_one_asked_for(tmp_path: Path, fraction: float) -> None:
    spec = replace(SMALL, seed=9, tumor_fraction=fraction, tissue_fraction=0.5)
    truth = write_slide(tmp_path / "a.svs", spec)
    mask = truth_mask(truth)
    tissue = (mask > 0).sum()
    assert tissue / mask.size == pytest.approx(0.5, rel=0.15)
    assert (mask == TUMOR_GREY).sum() / tissue == pytest.approx(fraction, rel=0.15)
    assert truth.tumor_fraction == pytest.approx(fraction, rel=0.15)
    assert truth.tissue_area_um2 == pytest.approx(tissue * (16 * 0.25) ** 2)


def test_the_mask_is_where_the_stain_is(tmp_path: Path) -> None:
    spec = replace(SMALL, width_px=4096, height_px=4096, mpp=0.5)
    truth = write_slide(tmp_path / "a.svs", spec)
    stained = (level_rgb(truth).min(axis=2) < 225).astype(np.uint8)
    coarse = cv2.resize(stained * 255, (256, 256), interpolation=cv2.INTER_AREA)
    # Clefts, lumens and fat belong to the tissue, though no stain shows there.
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    found = cv2.morphologyEx(coarse, cv2.MORPH_CLOSE, kernel) > 100
    tissue = truth_mask(truth) > 0
    assert (found & tissue).sum() / (found | tissue).sum() > 0.95
    far = cv2.dilate(tissue.astype(np.uint8), kernel, iterations=2) == 0
    assert not found[far].any()


def test_fragments_have_natural_outlines(small_truth: SyntheticTruth) -> None:
    tissue = (truth_mask(small_truth) >= TISSUE_GREY).astype(np.uint8)
    contours, _ = cv2.findContours(tissue, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = max(contours, key=cv2.contourArea)
    (_, _), (width, height), _ = cv2.minAreaRect(largest)
    assert cv2.contourArea(largest) < 0.85 * width * height
    assert not tissue[0].any()
    assert not tissue[-1].any()


@pytest.mark.parametrize("site", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_tumour_is_told_by_its_nuclei_and_not_by_its_tint(tmp_path: Path, site: int) -> None:
    spec = SyntheticSpec(
        width_px=6000, height_px=6000, seed=11 + site, site=site, tumor_fraction=0.3
    )
    truth = write_slide(tmp_path / "a.svs", spec, threads=2)
    mask, rgb = truth_mask(truth), level_rgb(truth)
    means: dict[int, list[NDArray[np.float64]]] = {TISSUE_GREY: [], TUMOR_GREY: []}
    spread: dict[int, list[float]] = {TISSUE_GREY: [], TUMOR_GREY: []}
    for y in range(0, 5488, 256):
        for x in range(0, 5488, 256):
            kinds = np.unique(mask[y // 16 : y // 16 + 32, x // 16 : x // 16 + 32])
            if len(kinds) == 1 and kinds[0]:
                tile = rgb[y : y + 512, x : x + 512]
                means[int(kinds[0])].append(tile.reshape(-1, 3).mean(axis=0))
                # Vesicular nuclei fill the middle of the red channel's range.
                spread[int(kinds[0])].append(
                    float(((tile[..., 0] > 110) & (tile[..., 0] < 175)).mean())
                )
    normal, tumor = np.array(means[TISSUE_GREY]), np.array(means[TUMOR_GREY])
    assert min(len(normal), len(tumor)) > 20
    assert np.abs(tumor.mean(axis=0) - normal.mean(axis=0)).max() < 2.5
    # Area under the ROC curve, by counting pairs.
    by_nuclei = np.mean(np.array(spread[TUMOR_GREY])[:, None] > np.array(spread[TISSUE_GREY]))
    by_tint = [np.mean(tumor[:, None, c] > normal[None, :, c]) for c in range(3)]
    assert by_nuclei > 0.98
    assert all(0.25 < auc < 0.75 for auc in by_tint)


# Not getrusage: its peak counts what the parent held when it forked.
_MEASURE = """
import re, sys
from pathlib import Path
from bagscope.wsi.synthetic import SyntheticSpec, write_slide
edge = int(sys.argv[2])
write_slide(Path(sys.argv[1]), SyntheticSpec(width_px=edge, height_px=edge, tumor_fraction=0.1))
sys.stdout.write(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_large_slide_takes_bounded_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "a.svs"), "50000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    assert int(done.stdout) / 1024 < 600
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert slide.level_dimensions == ((50000, 50000), (12500, 12500), (3125, 3125))
