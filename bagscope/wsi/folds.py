"""Dark folds: narrow bands where tissue lies double.

A fold absorbs about twice as much as the tissue beside it, in every channel, so it is found
against its own surroundings and against the darkness that is usual on the slide.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

MIN_FOLD_UM2 = 12_000.0
MIN_WIDTH_UM = 32.0
MAX_WIDTH_UM = 160.0
SURROUND_UM = 400.0
MIN_LENGTH_UM = 200.0
MIN_LIKENESS = 0.99
"""Cosine between the absorption of a fold and of the tissue around it."""

_COARSE = 4

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


def find_folds(absorbed: Floats, tissue: Bools, mpp: float) -> Bools:
    """Return where tissue is folded, (H, W) bool.

    Args:
        absorbed: (H, W, 3) float32, ln(glass / pixel) of red, green and blue.
        tissue: (H, W) bool, without ink.
        mpp: micrometres per pixel, about 16.
    """
    none = np.zeros(tissue.shape, np.bool_)
    if np.count_nonzero(tissue) < 50:
        return none
    soft = np.asarray(cv2.GaussianBlur(absorbed, (3, 3), 0), np.float32)
    mean = np.asarray(cv2.transform(soft, np.full((1, 3), 1 / 3, np.float32)), np.float32)
    inside = mean[tissue]
    step = max(1, len(inside) // 50_000)
    median, dark, darkest = np.percentile(inside[::step], [50, 85, 97.5])
    least = max(1.5 * median, min(dark * 1.2, darkest), 0.08)
    deep = tissue & (mean > 0.85 * least)
    if not np.any(deep & (mean > least)):
        return none
    rows, columns = np.nonzero(deep)
    around, share = _surroundings(soft, tissue & (mean < least), mpp)
    around, share = (
        around[rows // _COARSE, columns // _COARSE],
        share[rows // _COARSE, columns // _COARSE],
    )
    own, level = soft[rows, columns], mean[rows, columns]
    # Twice the same tissue has its colour; another cell type or a stained mark has not.
    length = np.linalg.norm(own, axis=1) * np.linalg.norm(around, axis=1)
    alike = (own * around).sum(axis=1) > MIN_LIKENESS * length
    ratio = level / np.maximum(around.mean(axis=1), 1e-3)
    candidate = alike & (share > 0.1)
    strict, loose = np.zeros((2, *tissue.shape), np.bool_)
    strict[rows, columns] = candidate & (ratio > 1.7) & (level > least)
    loose[rows, columns] = candidate & (ratio > 1.4)
    width = max(2, round(MIN_WIDTH_UM / mpp))
    core = cv2.morphologyEx(
        strict.view(np.uint8), cv2.MORPH_OPEN, np.ones((width, width), np.uint8)
    )
    if not core.any():
        return none
    wide = cv2.morphologyEx(loose.view(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(wide, connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA]
    held = np.bincount(labels[core > 0], minlength=len(area))
    extent = np.hypot(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT])
    thick = round(MAX_WIDTH_UM / mpp)
    broad = cv2.morphologyEx(wide, cv2.MORPH_OPEN, np.ones((thick, thick), np.uint8))
    broad_px = np.bincount(labels[broad > 0], minlength=len(area))
    # A fold is a solid band, longer than wide; a scatter of dark cells or a round nest is not.
    keep = (area >= MIN_FOLD_UM2 / mpp**2) & (held >= 0.5 * area) & (area < 0.35 * extent**2)
    keep &= (extent * mpp >= MIN_LENGTH_UM) & (broad_px < 0.2 * area)
    keep[0] = False
    return np.asarray(keep[labels])


def _surroundings(soft: Floats, ordinary: Bools, mpp: float) -> tuple[Floats, Floats]:
    """Return the mean absorption of `ordinary` pixels around, and their share, on coarse pixels."""
    height, width = ordinary.shape
    size = (-(-width // _COARSE), -(-height // _COARSE))
    weight = ordinary.astype(np.float32)
    kept = cv2.copyTo(soft, ordinary.view(np.uint8))
    edge = max(3, round(SURROUND_UM / mpp / _COARSE)) | 1
    amount = cv2.blur(cv2.resize(kept, size, interpolation=cv2.INTER_AREA), (edge, edge))
    share = cv2.blur(cv2.resize(weight, size, interpolation=cv2.INTER_AREA), (edge, edge))
    mean = amount / np.maximum(share, 1e-3)[..., None]
    return np.asarray(mean, np.float32), np.asarray(share, np.float32)
