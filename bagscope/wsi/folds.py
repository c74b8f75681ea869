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
SURROUND_UM = 400.0

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
    mean = cv2.GaussianBlur(cv2.transform(absorbed, np.full((1, 3), 1 / 3, np.float32)), (3, 3), 0)
    inside = mean[tissue]
    usual, upper = np.percentile(inside, [50, 84])
    weight = tissue.astype(np.float32)
    size = (round(SURROUND_UM / mpp) | 1, round(SURROUND_UM / mpp) | 1)
    around = cv2.blur(np.minimum(mean, upper) * weight, size) / np.maximum(
        cv2.blur(weight, size), 1e-3
    )
    strict = (
        tissue & (mean > 1.75 * around) & (mean > usual + 1.6 * (upper - usual)) & (mean > 0.12)
    )
    loose = tissue & (mean > 1.45 * around) & (mean > upper)
    width = max(2, round(MIN_WIDTH_UM / mpp))
    core = cv2.erode(strict.astype(np.uint8), np.ones((width, width), np.uint8))
    if not core.any():
        return none
    wide = cv2.morphologyEx(loose.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(wide, connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA]
    # A fold is a solid band over several of its widths; a scatter of dark nuclei is neither.
    held = np.bincount(labels.ravel(), weights=core.ravel(), minlength=len(area))
    keep = (area >= MIN_FOLD_UM2 / mpp**2) & (held >= 0.12 * area)
    keep[0] = False
    return np.asarray(keep[labels])
