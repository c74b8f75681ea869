"""Ink on slide or tissue: red, green, blue and black marker.

Marker dyes absorb in other proportions than tissue stains: blue ink takes red light alone where
haematoxylin takes green as well, red ink spares red where eosin spares blue too, green ink spares
green, which no stain does; black ink takes everything alike. Ink is also thick and even where
tissue of the same darkness is grainy. Strict rules find sure ink, loose ones follow it out to its
edge and across tissue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

MAX_PEN = 0.05
"""A tile with a larger share of ink is left out by default."""

MIN_STROKE_UM = 50.0
"""Thinner lines are not called ink."""

MIN_MARK_UM2 = 12_000.0
MIN_SURE_SHARE = 0.1
"""Least part of a mark that the strict rule accepts; dense tissue has it here and there."""

MAX_UNEVEN = 0.6
MAX_GRAIN = 0.05
"""Mean difference from the pixels around, relative to the absorption; tissue has 0.05 and more."""

MIN_SOLID_SHARE = 0.5
MIN_DARKNESS_SHARE = 0.35
SPREAD_UM = 16.0
"""How far the ink's blurred edge is counted with it."""

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Channels:
    """Absorption ln(glass / pixel) of each channel; grain, least and most of the three."""

    red: Floats
    green: Floats
    blue: Floats
    grain: Floats
    least: Floats
    most: Floats


def _floats(array: NDArray[Any]) -> Floats:
    return np.asarray(array, np.float32)


def find_pen(absorbed: Floats, void: Bools, mpp: float) -> Bools:
    """Return where ink is, (H, W) bool.

    Args:
        absorbed: (H, W, 3) float32, ln(glass / pixel) of red, green and blue.
        void: (H, W) bool, padding and unreadable pixels.
        mpp: micrometres per pixel, about 16.
    """
    pen = np.zeros(void.shape, np.uint8)
    soft = cv2.GaussianBlur(absorbed, (3, 3), 0)
    red, green, blue = cv2.split(soft)
    mean = (red + green + blue) * np.float32(1 / 3)
    if float(mean.max(initial=0)) < 0.3:
        return pen > 0
    square = cv2.blur(mean * mean, (5, 5)) - cv2.blur(mean, (5, 5)) ** 2
    uneven = np.sqrt(np.maximum(square, 0)) / np.maximum(mean, 0.05)
    raw = np.asarray(cv2.transform(absorbed, np.full((1, 3), 1 / 3, np.float32)))
    grain = np.abs(raw - cv2.blur(raw, (3, 3))) / np.maximum(mean, 0.05)
    channels = _Channels(
        red=_floats(red),
        green=_floats(green),
        blue=_floats(blue),
        grain=grain,
        least=_floats(cv2.min(cv2.min(red, green), blue)),
        most=_floats(cv2.max(cv2.max(red, green), blue)),
    )
    stroke = max(2, round(MIN_STROKE_UM / mpp))
    thick = np.ones((stroke, stroke), np.uint8)
    for ink in _INKS:
        strict = ink.strict(channels) & ~void & (uneven < MAX_UNEVEN)
        core = cv2.erode(strict.view(np.uint8), thick)
        if cv2.countNonZero(core):
            loose = ink.loose(channels) & ~void
            # Ink on tissue takes the tissue's colour on, but is darker than it is without.
            key = ink.key(channels)
            bare = key[(mean > 0.05) & ~loose & ~void]
            darkest = float(np.percentile(bare, 96)) if bare.size else 0.0
            across = ink.across(channels) & (key > max(1.1 * darkest, 0.4)) & ~void
            if ink.reach_um is not None:
                reach = 2 * round(ink.reach_um / mpp) + 1
                near = cv2.dilate(strict.view(np.uint8), np.ones((reach, reach), np.uint8)) > 0
                loose &= near
            wide = (strict | loose | across).view(np.uint8)
            wide = cv2.morphologyEx(wide, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
            pen |= _marks(wide, cv2.dilate(core, thick), mean, MIN_MARK_UM2 / mpp**2)
    if not cv2.countNonZero(pen):
        return pen > 0
    reach = 2 * max(1, round(SPREAD_UM / mpp)) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    closed = cv2.morphologyEx(pen, cv2.MORPH_CLOSE, kernel)
    return np.asarray(cv2.dilate(closed, kernel) > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ink:
    """Where one ink is certain, likely, and possible on tissue; the channel it takes most of.

    `reach_um`: how far ink is followed where tissue can have its colour, None for any distance.
    """

    strict: Callable[[_Channels], Bools]
    loose: Callable[[_Channels], Bools]
    across: Callable[[_Channels], Bools]
    key: Callable[[_Channels], Floats]
    reach_um: float | None = None


def _certain_green(c: _Channels) -> Bools:
    bare = (c.red > 1.6 * c.green) & (c.blue > 1.2 * c.green) & (c.red > 0.4)
    on_tissue = (c.red > 0.7) & (c.red > 1.1 * c.green) & (c.blue > 0.75 * c.green)
    return bare | _even_parts(on_tissue, c.grain) | _solid_parts(on_tissue)


def _certain_black(c: _Channels) -> Bools:
    even = _even_parts((c.least > 0.7) & (c.least > 0.72 * c.most), c.grain)
    # Dense DAB over haematoxylin is nearly as grey, and solid too.
    return even | _solid_parts((c.least > 0.95) & (c.least > 0.82 * c.most))


_INKS = (
    _Ink(
        strict=lambda c: (
            (c.green > 0.45)
            & (c.red < 0.16 * c.green)
            & (c.blue > 0.55 * c.green)
            & (c.blue < 1.35 * c.green)
        ),
        loose=lambda c: (
            (c.green > 0.3)
            & (c.red < 0.36 * c.green)
            & (c.blue > 0.5 * c.green)
            & (c.blue < 1.35 * c.green)
        ),
        across=lambda c: (
            (c.red < 0.5 * c.green) & (c.blue > 0.45 * c.green) & (c.blue < 1.35 * c.green)
        ),
        key=lambda c: c.green,
    ),
    _Ink(
        strict=_certain_green,
        loose=lambda c: (c.red > 0.3) & (c.red > 1.1 * c.green) & (c.blue > 0.75 * c.green),
        across=lambda c: (c.red > 0.95 * c.green) & (c.blue > 0.5 * c.green),
        key=lambda c: c.red,
    ),
    _Ink(
        strict=lambda c: (c.red > 0.6) & (c.red > 1.12 * c.green) & (c.blue < 0.28 * c.red),
        loose=lambda c: (c.red > 0.4) & (c.red > 0.95 * c.green) & (c.blue < 0.38 * c.red),
        across=lambda c: (c.red > 0.75 * c.green) & (c.blue < 0.7 * c.red),
        key=lambda c: c.red,
        reach_um=320.0,
    ),
    _Ink(
        strict=_certain_black,
        loose=lambda c: (c.least > 0.5) & (c.least > 0.65 * c.most),
        across=lambda c: c.least > 0.5 * c.most,
        key=lambda c: c.least,
        reach_um=80.0,
    ),
)
"""Red, green, blue and black."""


def _even_parts(mask: Bools, grain: Floats) -> Bools:
    """Keep the components that are even inside: ink flows, tissue has cells."""
    bits = mask.view(np.uint8)
    inner = cv2.erode(bits, np.ones((3, 3), np.uint8))
    if not cv2.countNonZero(inner):
        return np.zeros_like(mask)
    count, labels = cv2.connectedComponents(bits, connectivity=4)
    at = labels[inner > 0]
    inner_px = np.bincount(at, minlength=count)
    keep = np.bincount(at, weights=grain[inner > 0], minlength=count) < MAX_GRAIN * inner_px
    keep &= inner_px >= 6
    keep[0] = False
    return np.asarray(keep[labels])


def _solid_parts(mask: Bools) -> Bools:
    """Keep the components that are broad and without gaps, as strokes across tissue are."""
    bits = cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    broad = cv2.erode(bits, np.ones((5, 5), np.uint8))
    if not cv2.countNonZero(broad):
        return np.zeros_like(mask)
    inner = cv2.erode(bits, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(bits, connectivity=4)
    area = stats[:, cv2.CC_STAT_AREA]
    keep = np.bincount(labels[inner > 0], minlength=count) > MIN_SOLID_SHARE * area
    keep &= np.bincount(labels[broad > 0], minlength=count) >= 6
    keep[0] = False
    return np.asarray(keep[labels])


def _marks(
    mask: NDArray[Any], core: NDArray[Any], mean: Floats, least_px: float
) -> NDArray[np.uint8]:
    """Keep the components of `mask` that are large enough and to a fair part sure ink.

    Of those, only what absorbs nearly as much as their sure part: coarse chroma lends the colour
    of ink to its surroundings, but not its darkness.
    """
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA]
    at = labels[core > 0]
    sure = np.bincount(at, minlength=len(area))
    amount = np.bincount(at, weights=mean[core > 0], minlength=len(area))
    keep = (area >= least_px) & (sure >= MIN_SURE_SHARE * area)
    keep[0] = False
    least = np.where(keep, MIN_DARKNESS_SHARE * amount / np.maximum(sure, 1), np.inf)
    marks = np.zeros(mask.shape, np.uint8)
    inside = np.flatnonzero(mask)
    own = least.astype(np.float32)[labels.ravel()[inside]]
    marks.ravel()[inside[mean.ravel()[inside] > own]] = 1
    return marks
