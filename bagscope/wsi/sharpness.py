"""How well a small window is in focus, from how its detail is spread over scales.

Tissue in focus holds nearly as much contrast in structures of about a micrometre as in those of a
few; defocus takes the fine ones first. Their ratio hardly depends on stain strength, so pale
tissue is not mistaken for blurred tissue.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

MIN_SHARPNESS = 0.15
"""A lower score counts as out of focus: a Gaussian blur of 2 µm lies below, one of 1 µm above."""

FINE_UM = 1.0
MIDDLE_UM = (1.5, 4.0)
MIN_CONTRAST = 1.5
"""Spread in grey levels (of what is left after a 1 µm blur) that a judgement needs."""

_NOISE_VARIANCE = 0.5
"""Variance that sensor noise leaves in the fine band at about 1 µm per pixel."""

_FULL_RATIO = 2.0


def sharpness(windows: NDArray[np.uint8], *, mpp: float) -> NDArray[np.float32]:
    """Score the focus of windows.

    Args:
        windows: (N, S, S, 3) uint8 RGB, S at least 16, read at about 1 µm per pixel.
        mpp: their micrometres per pixel.

    Returns:
        (N,) float32 in [0, 1]: half the ratio of root-mean-square detail finer than about 1 µm to
        that of 1.5 to 4 µm. 0: no fine detail; in-focus tissue: 0.25 to 0.8. NaN where the window
        shows nothing to judge, such as empty glass.
    """
    scores = np.full(len(windows), np.nan, np.float32)
    for i, window in enumerate(windows):
        scores[i] = _score(window, mpp)
    return scores


def _score(window: NDArray[np.uint8], mpp: float) -> float:
    image = window.astype(np.float32)
    fine = cv2.GaussianBlur(image, (0, 0), max(FINE_UM / mpp, 0.5))
    if float(cv2.meanStdDev(fine)[1].max()) < MIN_CONTRAST:
        return float("nan")
    low, high = (cv2.GaussianBlur(image, (0, 0), sigma / mpp) for sigma in MIDDLE_UM)
    # The outermost pixels are blurred with mirrored ones, not with what lies beside the window.
    margin = min(round(MIDDLE_UM[1] / mpp), window.shape[0] // 4)
    inner = np.s_[margin : window.shape[0] - margin, margin : window.shape[1] - margin]
    fine_variance = float(np.square((image - fine)[inner]).mean()) - _NOISE_VARIANCE
    middle_variance = float(np.square((low - high)[inner]).mean())
    ratio = np.sqrt(max(fine_variance, 0.0) / max(middle_variance, 1.0))
    return float(min(1.0, ratio / _FULL_RATIO))
