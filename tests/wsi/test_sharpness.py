"""Sharpness of real and drawn windows blurred by known amounts."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from bagscope.wsi.sharpness import MIN_SHARPNESS, sharpness
from bagscope.wsi.tiling import TilingSpec
from tests.wsi.real_slide import real_slide

WINDOW_PX = 64
NATIVE_MPP = 0.499

Windows = NDArray[np.uint8]


def windows_at_one_micrometre(
    light: NDArray[np.float32], mpp: float, sigma_um: float, *, paleness: float = 1.0
) -> Windows:
    """Blur a field, add a sensor's noise, store it as JPEG, and cut it up at 1 µm per pixel."""
    light = 243 * (np.maximum(light, 1) / 243) ** paleness
    if sigma_um:
        light = cv2.GaussianBlur(light, (0, 0), sigma_um / mpp)
    noisy = light + np.random.default_rng(0).normal(0, 2, light.shape)
    _, stored = cv2.imencode(".jpg", np.clip(noisy, 0, 255).astype(np.uint8), [1, 80])
    field = cv2.imdecode(stored, cv2.IMREAD_COLOR)
    field = cv2.resize(field, None, fx=mpp, fy=mpp, interpolation=cv2.INTER_AREA)
    rows, columns = field.shape[0] // WINDOW_PX, field.shape[1] // WINDOW_PX
    cut = field[: rows * WINDOW_PX, : columns * WINDOW_PX]
    cut = cut.reshape(rows, WINDOW_PX, columns, WINDOW_PX, 3).swapaxes(1, 2)
    return np.ascontiguousarray(cut.reshape(-1, WINDOW_PX, WINDOW_PX, 3), np.uint8)


@pytest.fixture(scope="module")
def real_field() -> NDArray[np.float32]:
    import openslide

    with openslide.OpenSlide(str(real_slide())) as slide:
        region = slide.read_region((300, 900), 0, (1200, 1800))
    return np.asarray(region.convert("RGB"), np.float32)


@pytest.fixture(scope="module")
def drawn_field() -> NDArray[np.float32]:
    """Round nuclei on streaky ground: what an independent eye would call tissue in focus."""
    rng = np.random.default_rng(5)
    field = np.full((1600, 1600, 3), (226, 170, 205), np.float32)
    field += cv2.GaussianBlur(rng.normal(0, 90, field.shape[:2]), (0, 0), 1.5)[..., None]
    for x, y in rng.integers(0, 1600, (2500, 2)):
        radius = int(rng.integers(5, 10))
        cv2.circle(field, (int(x), int(y)), radius, (110, 80, 150), -1, cv2.LINE_AA)
    return np.clip(field, 0, 255).astype(np.float32)


def tissue_scores(
    field: NDArray[np.float32], sigma_um: float, paleness: float = 1.0
) -> NDArray[np.float32]:
    sharp = windows_at_one_micrometre(field, NATIVE_MPP, 0)
    blurred = windows_at_one_micrometre(field, NATIVE_MPP, sigma_um, paleness=paleness)
    return sharpness(blurred[sharp.mean(axis=(1, 2, 3)) < 222], mpp=1.0)


@pytest.mark.parametrize("paleness", [1.0, 0.4, 0.15])
@pytest.mark.parametrize(
    "source", [pytest.param("real_field", marks=pytest.mark.slow), "drawn_field"]
)
def test_focus_and_blur_are_told_apart_in_dark_and_pale_tissue(
    source: str, paleness: float, request: pytest.FixtureRequest
) -> None:
    field = request.getfixturevalue(source)
    focused = tissue_scores(field, 0, paleness)
    assert len(focused) > 40
    assert np.mean(focused < MIN_SHARPNESS) < 0.02
    for sigma_um in (2.0, 3.0, 5.0, 8.0):
        blurred = tissue_scores(field, sigma_um, paleness)
        judged = blurred[~np.isnan(blurred)]
        # Very pale tissue that is very blurred shows nothing at all, which NaN says.
        assert len(judged) > 0.9 * len(blurred) or paleness * 10 < sigma_um
        assert not len(judged) or np.mean(judged >= MIN_SHARPNESS) < 0.02


def test_scores_fall_as_blur_grows(real_field: NDArray[np.float32]) -> None:
    medians = [np.nanmedian(tissue_scores(real_field, s)) for s in (0, 0.5, 1, 1.5, 2, 3, 4)]
    assert all(a > b + 0.01 for a, b in itertools.pairwise(medians))


def test_stain_strength_hardly_matters(real_field: NDArray[np.float32]) -> None:
    dark, pale = (np.median(tissue_scores(real_field, 0, p)) for p in (1.0, 0.25))
    assert pale == pytest.approx(dark, rel=0.3)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_empty_glass_is_not_judged(noise: float) -> None:
    rng = np.random.default_rng(1)
    glass = 240 + rng.normal(0, noise, (3, WINDOW_PX, WINDOW_PX, 3))
    scores = sharpness(np.clip(glass, 0, 255).astype(np.uint8), mpp=1.0)
    assert scores.shape == (3,)
    assert np.isnan(scores).all()


def test_scores_stay_within_zero_and_one() -> None:
    rng = np.random.default_rng(2)
    harsh = (rng.random((5, WINDOW_PX, WINDOW_PX, 3)) * 255).astype(np.uint8)
    scores = sharpness(harsh, mpp=1.0)
    assert scores.dtype == np.float32
    assert np.all((scores >= 0) & (scores <= 1))


def test_no_windows_have_no_scores() -> None:
    assert sharpness(np.zeros((0, 64, 64, 3), np.uint8), mpp=1.0).shape == (0,)


def test_tiling_uses_the_threshold_that_is_documented_here() -> None:
    assert TilingSpec().min_sharpness == MIN_SHARPNESS
