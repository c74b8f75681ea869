"""Where tissue is on an overview: no weights, nothing to tune per slide.

Absorption is measured against the slide's own glass (`bagscope.wsi.glass`). Stain absorbs the
three channels unequally, shade and dust equally: a pixel is tissue where it is darker than glass
*and* its neighbourhood is tinted or very dark. The border then settles halfway between the local
tissue and the glass, so that blur and JPEG ringing around dense tissue don't widen it, while
tissue a few grey levels from the glass is still found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from bagscope.wsi.edges import (
    FAINT_TISSUE,
    LEAST_CUT,
    SURE_TINT,
    edged_components,
    median_where,
    untinted_parts,
    without_soft,
)
from bagscope.wsi.folds import find_folds
from bagscope.wsi.glass import Glass, estimate_glass
from bagscope.wsi.overview import OVERVIEW_MPP
from bagscope.wsi.pen import find_pen

METHOD = "density-1"
FINEST_MPP, COARSEST_MPP = 6.0, 11.0
"""Overviews outside this range are brought to `OVERVIEW_MPP` first."""

MAX_ENLARGEMENT = 4.0
MIN_FRAGMENT_UM2 = 12_000.0
MIN_HOLE_UM2 = 10_000.0
MIN_FAINT_HOLE_UM2 = 20_000.0
MAX_GAP_UM2 = 200_000.0
"""Largest untinted gap amid tissue that counts as tissue though no edge of it is seen."""

CUT_SHARE = 0.5
"""Share of the local tissue's darkness at which its border is drawn."""

PLAIN_TINT_SHARE = 0.6
LEAST_CUT_SHARE = 0.1
MAX_LEAST_CUT = 8.0
"""Least darkness of tissue, relative to the typical on the slide, up to this many grey levels."""

LEAST_TINT = 2.0
MIN_TINT_SHARE = 0.25
"""Least difference of channels, in grey levels and relative to the darkness, that is stain."""

FAINT_CUT = 6.0
"""Borders of fainter tissue are drawn from a smoothed image: noise would fray them."""

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
    if not FINEST_MPP <= mpp <= COARSEST_MPP:
        factor = min(mpp / OVERVIEW_MPP, MAX_ENLARGEMENT)
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        scaling = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        work = np.asarray(cv2.resize(rgb, size, interpolation=scaling), np.uint8)
        work_mpp = mpp / factor
        if unreadable is not None:
            ignore = cv2.resize(unreadable.astype(np.uint8), size) > 0
    rows, columns = work.shape[:2]
    work = _to_whole_blocks(work)
    if ignore is not None:
        ignore = _to_whole_blocks(ignore.view(np.uint8)) > 0
    glass = estimate_glass(work, ignore)
    void = glass.padding if ignore is None else glass.padding | ignore
    masks = [mask[:rows, :columns] for mask in _segment(work, glass, void, work_mpp)]
    if (rows, columns) != (height, width):
        masks = [_enlarged(mask, (width, height)) for mask in masks]
    tissue, pen, fold = (np.ascontiguousarray(mask) for mask in masks)
    if unreadable is not None:
        tissue, pen, fold = (mask & ~unreadable for mask in (tissue, pen, fold))
    red, green, blue = (round(float(channel)) for channel in glass.colour)
    return TissueMap(
        tissue=tissue,
        pen=pen,
        fold=fold,
        mpp=mpp,
        background=(red, green, blue),
    )


def _halos(tissue: Bools, pen: Bools, *, faint: bool) -> Bools:
    """Return what was taken for tissue only because coarse chroma spreads the colour of ink.

    Beside ink, tissue is more than a rim, or, unless it is faint, goes on farther away.
    """
    bits = tissue.view(np.uint8)
    beside = cv2.dilate(pen.view(np.uint8), np.ones((31, 31), np.uint8)) > 0
    solid = cv2.morphologyEx(bits, cv2.MORPH_OPEN, np.ones((11, 11), np.uint8)) > 0
    if faint:
        return beside & ~solid
    doubtful = np.flatnonzero(tissue & beside & ~solid)
    count, labels = cv2.connectedComponents(bits, connectivity=4)
    owner = labels.ravel()[doubtful]
    area = np.bincount(labels.ravel(), minlength=count)
    beyond = area - np.bincount(owner, minlength=len(area))
    halos = np.zeros(tissue.shape, np.bool_)
    halos.ravel()[doubtful[(beyond < 0.3 * area)[owner]]] = True
    return halos


def _to_whole_blocks(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Repeat the last rows and columns up to a multiple of 8 pixels: every later scale is exact."""
    bottom, right = -image.shape[0] % 8, -image.shape[1] % 8
    if not (bottom or right):
        return np.ascontiguousarray(image)
    grown = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    return np.asarray(grown, np.uint8)


def _segment(
    rgb: NDArray[np.uint8], glass: Glass, void: Bools, mpp: float
) -> tuple[Bools, Bools, Bools]:
    """Return tissue, pen and fold masks at the working resolution."""
    full = (rgb.shape[1], rgb.shape[0])
    half = (full[0] // 2, full[1] // 2)
    absorbed = _absorption(cv2.resize(rgb, half, interpolation=cv2.INTER_AREA), glass)
    # The share of light lost to uneven illumination is no absorption.
    falloff = _falloff_at(glass, half)
    absorbed = _as_floats(cv2.subtract(absorbed, cv2.merge([falloff] * 3)))
    # Padding rings into its neighbourhood where JPEG is coarse: nothing is learnt there.
    bare_void = _nearest(void, half)
    half_void = cv2.dilate(bare_void.view(np.uint8), np.ones((3, 3), np.uint8)) > 0
    if half_void.any():
        absorbed = _as_floats(cv2.copyTo(absorbed, (~half_void).view(np.uint8)))

    pen = find_pen(absorbed, half_void, 2 * mpp)
    away = half_void | pen
    level = float(glass.colour.mean())
    soft = _as_floats(cv2.GaussianBlur(absorbed, (0, 0), 1.2))
    dark = _as_floats(cv2.transform(soft, np.full((1, 3), level / 3, np.float32)))
    stained, tint = _stained(soft, dark, away, level)
    usual, cut = _border_levels(dark, stained, level)
    # Beside well stained tissue, what is next to nothing is nothing.
    typical = median_where(dark, stained & (tint > SURE_TINT))
    cut = np.maximum(cut, min(LEAST_CUT_SHARE * typical, MAX_LEAST_CUT))
    dim = (dark > cut) & ~away
    found = stained & dim
    typical = median_where(dark, found)
    # Where stain is plain to see, what shows none is shade, however sharp its edge.
    plain = median_where(tint, found) > PLAIN_TINT_SHARE * typical
    whole = np.zeros_like(dim)
    if typical < FAINT_TISSUE and not plain:
        whole = edged_components(dark, stained, dim, away)
    coarse = whole | without_soft(stained & dim & ~whole, dim & ~whole, dark, tint, away | whole)
    # Pale or neutral parts amid tissue: below the cut or without a tint, but not in the blur
    # along a border.
    pale = ~away & (dark > np.clip(0.12 * usual, 2.0, 8.0))
    pale = cv2.erode(pale.view(np.uint8), np.ones((5, 5), np.uint8)) > 0
    for _ in range(2):  # the second time for parts that border on the first
        further = untinted_parts(
            dim, coarse, dark, away, most_px=MAX_GAP_UM2 / (2 * mpp) ** 2, only_gaps=plain
        )
        if not further.any():
            break
        coarse |= further
    coarse |= _closed(coarse & (cut <= FAINT_CUT), 2 * mpp) & ~away
    near = cv2.dilate(coarse.view(np.uint8), np.ones((5, 5), np.uint8)) > 0
    near &= stained | (half_void & ~bare_void)
    pale &= cv2.blur(coarse.astype(np.float32), (25, 25)) > 0.55
    tissue = _sharpened(rgb, glass, coarse, near, cut, level) | _enlarged(pale, full)
    full_pen = _enlarged(pen, full)
    tissue &= ~void & ~full_pen
    if pen.any():
        tissue &= ~_halos(tissue, full_pen, faint=typical < FAINT_TISSUE)
    tissue = _cleaned(tissue, mpp) & ~void & ~full_pen
    fold = find_folds(absorbed, _nearest(tissue, half) & ~pen, 2 * mpp)
    return tissue, full_pen & ~void, _enlarged(fold, full) & tissue


def _as_floats(array: NDArray[Any]) -> Floats:
    return np.asarray(array, np.float32)


def _nearest(mask: Bools, size: tuple[int, int]) -> Bools:
    return np.asarray(cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0)


def _enlarged(mask: Bools, size: tuple[int, int]) -> Bools:
    soft = cv2.resize(mask.view(np.uint8) * 255, size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(soft > 127)


def _absorption(rgb: NDArray[Any], glass: Glass) -> Floats:
    """Return ln(glass / pixel) per channel, (H, W, 3) float32."""
    values = np.maximum(np.arange(256, dtype=np.float32), 1)[:, None]
    table = np.log(glass.colour) - np.log(values)
    return _as_floats(cv2.LUT(rgb, table.reshape(1, 256, 3).astype(np.float32)))


def _falloff_at(glass: Glass, size: tuple[int, int]) -> Floats:
    return _as_floats(cv2.resize(glass.falloff, size, interpolation=cv2.INTER_LINEAR))


def _stained(soft: Floats, dark: Floats, away: Bools, level: float) -> tuple[Bools, Floats]:
    """Return where the neighbourhood is tinted as only stain is, and the tint itself.

    Very dark places count as tinted: no shade goes so far.
    """
    size = (dark.shape[1] // 2, dark.shape[0] // 2)
    small = cv2.resize(soft, size, interpolation=cv2.INTER_AREA) * np.float32(level)
    small = _as_floats(cv2.GaussianBlur(small, (0, 0), 1.0))
    small_away = _nearest(away, size)
    red, green, blue = cv2.split(small)
    mean = (red + green + blue) / np.float32(3)
    clear = ~small_away & (np.abs(mean) < 1.2)
    if np.count_nonzero(clear) < 0.02 * clear.size:
        clear = ~small_away & (np.abs(mean) < 4)
    base, noise = np.zeros(3, np.float32), 0.5
    if np.count_nonzero(clear) > 30:
        offsets = small[clear] - mean[clear][:, None]
        base = np.median(offsets, axis=0)
        first, second, third = (offsets - base).T
        most = np.maximum(np.maximum(first, second), third)
        noise = float(np.median(most - np.minimum(np.minimum(first, second), third)))
    small -= base
    red, green, blue = cv2.split(small)
    tint = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    least = max(LEAST_TINT, 2.2 * noise)
    seeds = (tint > least) & (tint > MIN_TINT_SHARE * mean) & (mean > 1.2)
    seeds |= mean > 80
    seeds &= ~small_away
    sure = cv2.morphologyEx(seeds.view(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    near = cv2.dilate(sure, np.ones((3, 3), np.uint8))
    full = (dark.shape[1], dark.shape[0])
    wide = _as_floats(cv2.resize(tint, full, interpolation=cv2.INTER_NEAREST))
    return _nearest(near > 0, full) & ~away, wide


def _border_levels(dark: Floats, stained: Bools, level: float) -> tuple[Floats, Floats]:
    """Return the usual darkness of the tissue around each pixel, and where its border is drawn.

    Both (H, W) in grey levels.
    """
    size = (dark.shape[1] // 4, dark.shape[0] // 4)
    sure = (stained & (dark > LEAST_CUT)).astype(np.float32)
    # Dust and what is left of padding at its rim are darker than any tissue near the glass.
    ordinary = 3 * float(np.median(dark[sure > 0])) if sure.any() else 0.0
    amount = cv2.resize(sure * np.minimum(dark, ordinary), size, interpolation=cv2.INTER_AREA)
    weight = cv2.resize(sure, size, interpolation=cv2.INTER_AREA)
    usual = _as_floats(cv2.blur(amount, (9, 9)) / np.maximum(cv2.blur(weight, (9, 9)), 1e-3))
    # A share of the light, not of its logarithm: that is what blur mixes.
    cut = -level * np.log1p(CUT_SHARE * np.expm1(-usual / level))
    cut = np.maximum(cut, LEAST_CUT)
    full = (dark.shape[1], dark.shape[0])
    return _as_floats(cv2.resize(usual, full)), _as_floats(cv2.resize(cut, full))


def _closed(faint: Bools, mpp: float) -> Bools:
    """Close faint tissue over what compression has left of it: larger gaps than elsewhere."""
    mask = cv2.morphologyEx(
        faint.view(np.uint8), cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    )
    _fill_holes(mask, MIN_FAINT_HOLE_UM2 / mpp**2)
    return np.asarray(mask > 0)


def _sharpened(
    rgb: NDArray[np.uint8],
    glass: Glass,
    coarse: Bools,
    stained: Bools,
    cut: Floats,
    level: float,
) -> Bools:
    """Redraw the coarse mask at full resolution where the contrast is worth it."""
    full = (rgb.shape[1], rgb.shape[0])
    half = (coarse.shape[1], coarse.shape[0])
    grey = cv2.GaussianBlur(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (3, 3), 0)
    # Half grey levels in bytes: eight times less memory traffic than floats of both images.
    white = float(glass.colour @ np.array([0.299, 0.587, 0.114], np.float32))
    shades = np.log(white) - np.log(np.maximum(np.arange(256), 1))
    table = np.clip(np.rint(shades * level * 2), 0, 255).astype(np.uint8)
    limit = np.clip(2 * (cut + _falloff_at(glass, half) * level), 0, 254)
    limit = cv2.resize(limit.astype(np.uint8), full, interpolation=cv2.INTER_LINEAR)
    fine = cv2.LUT(grey, table.reshape(1, 256)) > limit
    clear_cut = _nearest(cut > FAINT_CUT, full)
    near = _nearest(stained, full)
    return np.asarray((fine & near & clear_cut) | (_enlarged(coarse, full) & ~clear_cut))


def _cleaned(tissue: Bools, mpp: float) -> Bools:
    """Close cracks, fill small holes, drop threads and specks."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    mask = cv2.morphologyEx(tissue.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    # Holes before threads: the thin walls between fat cells are what makes them small holes.
    _fill_holes(mask, MIN_HOLE_UM2 / mpp**2)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel)
    _drop_specks(mask, MIN_FRAGMENT_UM2 / mpp**2)
    return np.asarray(mask > 0)


def _fill_holes(mask: NDArray[Any], least_px: float) -> None:
    """Fill holes smaller than `least_px`, in place."""
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # A hole's contour turns the other way and runs through the pixels around it.
    holes = [
        contour
        for contour in contours
        if 0 < cv2.contourArea(contour, oriented=True) < least_px + len(contour) / 2 - 1
    ]
    cv2.drawContours(mask, holes, -1, 1, cv2.FILLED)


def _drop_specks(mask: NDArray[Any], least_px: float) -> None:
    """Remove components smaller than `least_px`, holes counted in, in place."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    specks = [
        contour
        for contour in contours
        if cv2.contourArea(contour) + len(contour) / 2 + 1 < least_px
    ]
    cv2.drawContours(mask, specks, -1, 0, cv2.FILLED)
