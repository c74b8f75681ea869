"""Where tissue is on an overview: no weights, nothing to tune per slide.

Absorption is measured against the slide's own glass (`bagscope.wsi.glass`). Stain absorbs the
three channels unequally, shade and dust equally: a pixel is tissue where it is darker than glass
*and* its neighbourhood is tinted or very dark. The border then settles halfway between the local
tissue and the glass, so that blur and JPEG ringing around dense tissue don't widen it, while
tissue a few grey levels from the glass is still found.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from bagscope.wsi.folds import find_folds
from bagscope.wsi.glass import BLOCK_PX, Glass, estimate_glass
from bagscope.wsi.pen import find_pen

METHOD = "density-1"
OVERVIEW_MPP = 8.0
FINEST_MPP = 6.0
"""Finer overviews are averaged down to about `OVERVIEW_MPP` first."""

MIN_FRAGMENT_UM2 = 12_000.0
MIN_HOLE_UM2 = 10_000.0

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class TissueMap:
    """What covers each pixel of an overview.

    Attributes:
        tissue: (H, W) bool, tissue of any kind, folds included; no ink, no glass, no padding.
        pen: (H, W) bool, ink in red, green, blue or black, on glass or on tissue.
        fold: (H, W) bool, dark folds; a part of `tissue`.
        mpp: micrometres per pixel of the masks.
        background: RGB of empty glass.
    """

    tissue: Bools
    pen: Bools
    fold: Bools
    mpp: float
    background: tuple[int, int, int]


def segment_tissue(
    rgb: NDArray[np.uint8], *, mpp: float, readable: Bools | None = None
) -> TissueMap:
    """Find tissue, pen and folds on an overview.

    Args:
        rgb: (H, W, 3) uint8, at best about `OVERVIEW_MPP` per pixel; 4 to 16 work.
        mpp: its micrometres per pixel.
        readable: (H, W) bool; pixels where it is false are neither tissue nor pen.
    """
    height, width = rgb.shape[:2]
    unreadable = None if readable is None else ~readable
    work, ignore, work_mpp = rgb, unreadable, mpp
    if mpp < FINEST_MPP:
        factor = mpp / OVERVIEW_MPP
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        work = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        work_mpp = OVERVIEW_MPP
        if unreadable is not None:
            ignore = cv2.resize(unreadable.astype(np.uint8), size) > 0
    glass = estimate_glass(work, ignore)
    void = glass.padding if ignore is None else glass.padding | ignore
    tissue, pen, fold = _segment(work, glass, void, work_mpp)
    if work is not rgb:
        tissue, pen, fold = (_enlarged(mask, (width, height)) for mask in (tissue, pen, fold))
    if unreadable is not None:
        tissue, pen, fold = (mask & ~unreadable for mask in (tissue, pen, fold))
    red, green, blue = (round(float(channel)) for channel in glass.colour)
    return TissueMap(
        tissue=tissue & ~pen,
        pen=pen,
        fold=fold & tissue & ~pen,
        mpp=mpp,
        background=(red, green, blue),
    )


def _enlarged(mask: Bools, size: tuple[int, int]) -> Bools:
    soft = cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(soft > 127)


def _segment(
    rgb: NDArray[np.uint8], glass: Glass, void: Bools, mpp: float
) -> tuple[Bools, Bools, Bools]:
    """Return tissue (ink not yet taken out), pen and fold masks at the working resolution."""
    height, width = rgb.shape[:2]
    half_size = (max(1, (width + 1) // 2), max(1, (height + 1) // 2))
    absorbed = _absorption(cv2.resize(rgb, half_size, interpolation=cv2.INTER_AREA), glass)
    half_void = cv2.resize(void.astype(np.uint8), half_size, interpolation=cv2.INTER_NEAREST) > 0
    # The share of light lost to uneven illumination is no absorption.
    falloff = _falloff_at(glass, half_size, (width, height))
    absorbed -= falloff[..., None]
    absorbed[half_void] = 0

    pen = find_pen(absorbed, half_void, 2 * mpp)
    tinted, darkness = _tinted(absorbed, half_void, mpp)
    level = float(glass.colour.mean())
    dark_full = _grey_absorption(rgb, glass) - _falloff_at(glass, (width, height), (width, height))
    dark_full *= level
    cut = _threshold(darkness, tinted, half_void | pen)
    cut = cv2.resize(cut, (width, height), interpolation=cv2.INTER_LINEAR)
    near = cv2.resize(tinted.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    tissue = (dark_full > cut) & (near > 0) & ~void
    full_pen = _enlarged(pen, (width, height))
    tissue = _cleaned(tissue & ~full_pen, mpp) & ~full_pen
    tissue &= ~void
    half_tissue = (
        cv2.resize(tissue.astype(np.uint8), half_size, interpolation=cv2.INTER_NEAREST) > 0
    )
    fold_half = find_folds(absorbed, half_tissue & ~pen, 2 * mpp)
    return (
        tissue,
        full_pen & ~void,
        _enlarged(fold_half, (width, height)) & tissue,
    )


def _absorption(rgb: NDArray[np.uint8], glass: Glass) -> Floats:
    """Return ln(glass / pixel) per channel, (H, W, 3) float32."""
    values = np.maximum(np.arange(256, dtype=np.float32), 1)[:, None]
    table = np.log(glass.colour) - np.log(values)
    return np.asarray(cv2.LUT(rgb, table.reshape(1, 256, 3).astype(np.float32)))


def _grey_absorption(rgb: NDArray[np.uint8], glass: Glass) -> Floats:
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    level = float(glass.colour @ np.array([0.299, 0.587, 0.114], np.float32))
    table = np.log(level) - np.log(np.maximum(np.arange(256, dtype=np.float32), 1))
    dark: Floats = np.asarray(cv2.LUT(grey, table.reshape(1, 256).astype(np.float32)))
    return np.asarray(cv2.GaussianBlur(dark, (3, 3), 0))


def _falloff_at(glass: Glass, size: tuple[int, int], full: tuple[int, int]) -> Floats:
    blocks = glass.falloff
    scale = (size[0] / full[0], size[1] / full[1])
    covered = (
        round(blocks.shape[1] * BLOCK_PX * scale[0]),
        round(blocks.shape[0] * BLOCK_PX * scale[1]),
    )
    large = cv2.resize(blocks, covered, interpolation=cv2.INTER_LINEAR)
    return large[: size[1], : size[0]]


def _tinted(absorbed: Floats, void: Bools, mpp: float) -> tuple[Bools, Floats]:
    level = 230.0
    soft = cv2.GaussianBlur(absorbed, (0, 0), 1.5)
    red, green, blue = cv2.split(soft)
    tint = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    dark = (red + green + blue) * np.float32(1 / 3)
    tint *= level
    dark *= level
    clear = (np.abs(dark) < 4) & ~void
    if np.count_nonzero(clear) > 50:
        base = float(np.median(tint[clear]))
        spread = float(np.median(np.abs(tint[clear] - base))) * 1.5
    else:
        base, spread = 0.5, 0.5
    strong = max(1.5, base + 4 * spread)
    mask = ((tint > strong) & (dark > 2)) | (dark > 70)
    return mask & ~void, np.asarray(dark)


def _threshold(dark: Floats, tinted: Bools, away: Bools) -> Floats:
    """Return the darkness above which a pixel is tissue, from the tissue around it."""
    weight = (tinted & ~away).astype(np.float32)
    size = (max(1, dark.shape[1] // 4), max(1, dark.shape[0] // 4))
    total = cv2.boxFilter(cv2.resize(weight, size, interpolation=cv2.INTER_AREA), -1, (9, 9))
    amount = cv2.boxFilter(
        cv2.resize(weight * np.minimum(dark, 120), size, interpolation=cv2.INTER_AREA), -1, (9, 9)
    )
    mean = amount / np.maximum(total, 1e-3)
    cut = np.clip(0.4 * mean, 2.0, 22.0).astype(np.float32)
    return np.asarray(cv2.resize(cut, (dark.shape[1], dark.shape[0])))


def _cleaned(tissue: Bools, mpp: float) -> Bools:
    """Close cracks, fill small holes, drop specks."""
    mask = tissue.astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel, iterations=2)
    mask = _without_small(mask, MIN_FRAGMENT_UM2 / mpp**2)
    return _without_small(1 - mask, MIN_HOLE_UM2 / mpp**2) == 0


def _without_small(mask: NDArray[np.uint8], least_px: float) -> NDArray[np.uint8]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    keep = (stats[:, cv2.CC_STAT_AREA] >= least_px).astype(np.uint8)
    keep[0] = 0
    return keep[labels]
