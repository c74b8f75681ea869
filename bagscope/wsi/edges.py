"""Tissue and shade told apart by their borders, where tint does not.

Tissue stops within a pixel or two; a shadow fades. Coarse JPEG chroma takes the tint from faint
tissue and lends one to shadows, in steps of several grey levels, so that on faint slides the edge
is what remains. Darkness is in grey levels below the slide's own glass throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SURE_TINT = 6.0
"""Difference of channels in grey levels that coarse JPEG does not make of a shadow."""

FAINT_TISSUE = 20.0
"""Median darkness below which a slide's tissue counts as faint."""

LEAST_CUT = 2.0
"""Darkness below which nothing is tissue."""

MIN_RIM_SHARE = 0.7
"""Darkness just inside the border, relative to the middle, that only shade stays below."""

MAX_OUTSIDE_SHARE = 0.6
"""Darkness just outside the border, relative to the middle, that only shade has."""


Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


def without_soft(mask: Bools, dim: Bools, dark: Floats, tint: Floats, away: Bools) -> Bools:
    """Drop faint components without a border: shade whose tint is an artefact of compression.

    Tissue stops within a pixel or two; around a shadow it is as dark as just inside it.

    Args:
        mask: (H, W) bool, tinted places, at about 16 µm per pixel as in all of this module.
        dim: (H, W) bool, places dark enough for tissue, tinted or not.
        dark: (H, W) float32, darkness in grey levels.
        tint: (H, W) float32, largest difference between channels in grey levels.
        away: (H, W) bool, ink and padding, which say nothing.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=4)
    area = stats[:, cv2.CC_STAT_AREA].astype(np.float64)
    at = labels[mask]
    darkness = np.bincount(at, weights=dark[mask], minlength=count) / np.maximum(area, 1)
    tinted = np.bincount(at, weights=tint[mask], minlength=count) / np.maximum(area, 1)
    doubtful = (darkness < 25) & (tinted < SURE_TINT)
    doubtful[0] = False
    if not doubtful.any():
        return mask
    suspect = np.asarray(doubtful[labels])
    found = _borders(suspect.view(np.uint8), ~(mask | away), dark)
    count = len(found.middle)
    beside = cv2.dilate((mask | away).view(np.uint8), np.ones((3, 3), np.uint8)) == 0
    ring = beside & (found.grown > 0)
    around = found.grown[ring]
    shaded = dark[ring] > 0.5 * found.middle[around]
    ring_px = np.maximum(np.bincount(around, minlength=count), 1)
    soft = np.bincount(around, weights=shaded, minlength=count) / ring_px
    soft_edged = soft > 0.5
    soft_edged |= (found.outside > MAX_OUTSIDE_SHARE * found.middle) & (found.outside_px >= 8)
    trace = found.middle < 0.15 * median_where(dark, mask)
    # A step of the chroma over a trace of uneven light.
    owner = found.labels[suspect]
    area_px = np.maximum(np.bincount(owner, minlength=count), 1)
    tint_sum = np.bincount(owner, weights=tint[suspect], minlength=count)
    trace |= (found.middle < 3.5) & (tint_sum < 3 * area_px)
    trace[0] = soft_edged[0] = False
    kept = mask & ~trace[found.labels]
    if soft_edged.any():
        kept &= ~(soft_edged[found.labels] & _fading(dim, dark, away))
    return np.asarray(kept)


def _fading(dim: Bools, dark: Floats, away: Bools) -> Bools:
    """Return the components of `dim` that are much darker in the middle than at their border."""
    parts = cv2.morphologyEx(dim.view(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    found = _borders(parts, ~(dim | away), dark)
    fading = (found.inside < MIN_RIM_SHARE * found.middle) | (found.inside_px < 8)
    return np.asarray(fading[found.labels] | (parts == 0))


@dataclass(frozen=True, slots=True)
class _Borders:
    """Darkness of components: in the middle, just inside and just outside of where glass begins.

    Arrays (N + 1,) by label, 0 being no component; `_px` count pixels, `dim_px` those just inside
    that are less than half as dark as the middle.
    """

    labels: NDArray[np.int32]
    grown: NDArray[np.int32]
    area_px: NDArray[np.intp]
    middle: NDArray[np.float64]
    inside: NDArray[np.float64]
    inside_px: NDArray[np.intp]
    dim_px: NDArray[np.intp]
    outside: NDArray[np.float64]
    outside_px: NDArray[np.intp]

    def edged(self, least_inside: float, most_outside: float) -> Bools:
        """Return which are dark right up to their border and have glass right behind it."""
        return (
            (self.inside > least_inside * self.middle)
            & (self.outside < most_outside * self.middle)
            & (np.minimum(self.inside_px, self.outside_px) >= 8)
        )


def _borders(parts: NDArray[Any], glass: Bools, dark: Floats) -> _Borders:
    """Measure the components of `parts` (H, W) against what is next to them in `glass`."""
    count, found = cv2.connectedComponents(parts, connectivity=4)
    labels = np.asarray(found, np.int32)
    clear = glass.view(np.uint8)
    near = cv2.dilate(clear, np.ones((9, 9), np.uint8)) > 0
    edge = cv2.dilate(clear, np.ones((3, 3), np.uint8)) > 0
    far = cv2.erode(clear, np.ones((3, 3), np.uint8)) > 0
    # Labels grown outwards; where two components meet, the later one has the ring between them.
    grown = cv2.dilate(labels.astype(np.float32), np.ones((9, 9), np.uint8)).astype(np.int32)

    def mean_of(owner: NDArray[np.int32], where: Bools) -> tuple[Any, Any]:
        at = owner[where]
        number = np.bincount(at, minlength=count)
        total = np.bincount(at, weights=dark[where], minlength=count)
        return total / np.maximum(number, 1), number

    middle, area_px = mean_of(labels, (parts > 0) & ~edge)
    inside, inside_px = mean_of(labels, (parts > 0) & near & ~edge)
    outside, outside_px = mean_of(grown, (grown > 0) & far)
    faded = (parts > 0) & near & ~edge & (dark < 0.5 * middle.astype(np.float32)[labels])
    dim_px = np.bincount(labels[faded], minlength=count)
    return _Borders(labels, grown, area_px, middle, inside, inside_px, dim_px, outside, outside_px)


def median_where(values: Floats, where: Bools) -> float:
    """Return the median of `values` (H, W) at `where` (H, W), 0 where that is nowhere."""
    return float(np.median(values[where])) if where.any() else 0.0


def edged_components(dark: Floats, stained: Bools, dim: Bools, away: Bools) -> Bools:
    """Return faint components that end in an edge all round and are tinted somewhere.

    Coarse chroma can lose the tint of faint tissue, or lend some to a shadow; only its edge tells
    the tissue then. Several levels, since a shadow may touch the tissue at the lowest. All
    arguments are (H, W); `dim` is where it is dark enough for tissue.
    """
    edged = np.zeros(dark.shape, np.bool_)
    for level in (LEAST_CUT, 1.75 * LEAST_CUT, 2.5 * LEAST_CUT):
        darker = (dark > level) & dim
        parts = cv2.morphologyEx(darker.view(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
        found = _borders(parts, ~(darker | away), dark)
        tinted_px = np.bincount(found.labels[stained], minlength=len(found.area_px))
        keep = found.edged(0.88, 0.27) & (found.middle > 3.5) & (found.middle < FAINT_TISSUE)
        keep &= (tinted_px > 0.02 * found.area_px) | (found.middle > 5)
        keep &= found.dim_px < 0.15 * found.inside_px
        keep[0] = False
        edged |= keep[found.labels]
    return edged


def untinted_parts(
    dim: Bools,
    sure: Bools,
    dark: Floats,
    away: Bools,
    *,
    most_px: float,
    only_gaps: bool,
) -> Bools:
    """Return the parts of `dim` beside sure tissue that end in an edge, as shade does not.

    Mixed stains can be grey, and coarse chroma can lose a faint tint. All masks are (H, W); a gap
    that shows no edge counts up to `most_px` pixels, and `only_gaps` leaves the others out.
    """
    parts = cv2.morphologyEx(
        (dim & ~sure).view(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)
    )
    if not cv2.countNonZero(parts):
        return parts > 0
    found = _borders(parts, ~(dim | sure | away), dark)
    touching_px = np.bincount(found.grown[sure], minlength=len(found.area_px))
    keep = np.zeros(len(touching_px), np.bool_)
    if not only_gaps:
        keep |= found.edged(0.8, 0.35) & (touching_px > 0.5 * found.outside_px)
        keep |= found.edged(0.85, 0.25) & (touching_px > 0.15 * found.outside_px)
    # Without an edge to judge, only gaps amid tissue.
    keep |= (found.outside_px < 0.25 * touching_px) & (found.area_px < most_px)
    # Shade is faint beside well stained tissue, and nothing else can be told apart there.
    usual = median_where(dark, sure)
    keep &= (touching_px >= 12) & (found.middle > 0.4 * usual)
    keep[0] = False
    return np.asarray(keep[found.labels])
