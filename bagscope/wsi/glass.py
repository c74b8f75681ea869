"""What empty glass looks like on one slide: its colour, its uneven light, and padding around it.

Scanners fill what they did not scan with one exact colour (black, grey or white). Empty glass is
the brightest flat thing that is not such padding; light falls off smoothly over it, by the same
factor in every channel, so that colour ratios tell stain from shade.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

BLOCK_PX = 4
"""Colours are judged on means of so many pixels squared."""

_FLAT_RANGE = 7
_PAD_RANGE = 2
_PAD_NEUTRAL = 4
_PAD_DARK = 45
_PAD_SPAN = 4
_LEAST_SHARE = 0.005
_ASSUMED = np.array([244.0, 244.0, 244.0], np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Glass:
    """Empty glass of one overview.

    Attributes:
        colour: (3,) float32, RGB where the light is strongest.
        falloff: (h, w) float32, ln of the light lost relative to `colour`, on blocks.
        padding: (H, W) bool, pixels that the scanner filled in.
        measured: false where no glass was seen and a near white was assumed.
    """

    colour: Floats
    falloff: Floats
    padding: Bools
    measured: bool


def estimate_glass(rgb: NDArray[np.uint8], ignore: Bools | None = None) -> Glass:
    """Estimate the glass of an overview (H, W, 3); `ignore` (H, W) marks pixels without meaning."""
    height, width = rgb.shape[:2]
    small_size = (max(1, -(-width // BLOCK_PX)), max(1, -(-height // BLOCK_PX)))
    small = cv2.resize(rgb, small_size, interpolation=cv2.INTER_AREA)
    usable = np.ones(small.shape[:2], np.bool_)
    if ignore is not None and ignore.any():
        share = cv2.resize(ignore.astype(np.float32), small_size, interpolation=cv2.INTER_AREA)
        usable = share < 0.01
    span = _local_range(small)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    neutral = (small.max(axis=2) - small.min(axis=2)) <= _PAD_NEUTRAL
    flat = (span <= _FLAT_RANGE) & usable

    pad_levels, glass_range = _levels(small, grey, flat, flat & (span <= _PAD_RANGE) & neutral)
    padding = _padding(rgb, grey, flat & neutral, pad_levels)
    usable &= ~_shrunk(padding, small_size)
    if glass_range is None:
        colour, found = _brightest(rgb, ~padding if ignore is None else ~(padding | ignore))
        falloff = np.zeros(small.shape[:2], np.float32)
        return Glass(colour=colour, falloff=falloff, padding=padding, measured=found)
    colour, falloff = _fit_light(small, flat & usable, glass_range)
    return Glass(colour=colour, falloff=falloff, padding=padding, measured=True)


def _local_range(small: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the largest range of any channel among 3 × 3 blocks."""
    kernel = np.ones((3, 3), np.uint8)
    span = cv2.subtract(cv2.dilate(small, kernel), cv2.erode(small, kernel))
    return np.asarray(span.max(axis=2), np.uint8)


def _levels(
    small: NDArray[np.uint8], grey: NDArray[np.uint8], flat: Bools, exact: Bools
) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
    """Split the grey levels of flat blocks into padding and glass.

    Returns:
        Ranges of grey that are padding, and the range that is glass (None: none seen).
    """
    least = max(6.0, _LEAST_SHARE * grey.size)
    exact_count = np.bincount(grey[exact], minlength=256)
    flat_count = np.bincount(grey[flat], minlength=256)
    clusters = []
    for low, high in _runs(flat_count, least):
        inside = flat & (grey >= low) & (grey <= high)
        colour = np.median(small[inside], axis=0)
        spike = int(exact_count[low : high + 1].max()) >= 0.8 * flat_count[low : high + 1].sum()
        is_pad = high < _PAD_DARK or (spike and np.ptp(colour) <= _PAD_NEUTRAL)
        clusters.append((low, high, colour, bool(is_pad)))
    pads = [(low, high) for low, high, _, is_pad in clusters if is_pad]
    # Glass is near neutral; a flat pink or brown area is tissue.
    bright = [c for c in clusters if c[1] >= 120 and np.ptp(c[2]) <= 0.12 * c[2].max()]
    own = [c for c in bright if not c[3]]
    if own and pads:
        brightest = max(own, key=lambda c: c[1])
        pad_above = [c for c in bright if c[3] and c[0] > brightest[1]]
        # Beside bright flat padding, the next flat level is glass only if it has no tint of its
        # own; otherwise what looked like padding is perfectly even glass and this is pale tissue.
        tint = [np.ptp(c[2] - brightest[2]) for c in pad_above]
        if not tint or min(tint) <= 6:
            return pads, brightest[:2]
        glass = max(pad_above, key=lambda c: c[1])
        return [p for p in pads if p != glass[:2]], glass[:2]
    if bright:
        glass = max(bright, key=lambda c: c[1])
        return [p for p in pads if p != glass[:2]], glass[:2]
    return [p for p in pads if p[1] < _PAD_DARK or len(clusters) > 1], None


def _runs(count: NDArray[np.intp], least: float) -> list[tuple[int, int]]:
    """Return the grey ranges that hold at least `least` blocks, split at gaps."""
    solid = np.convolve(count, np.ones(7), mode="same") >= max(3.0, 0.1 * least)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], solid.astype(np.int8), [0]])))
    runs = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        filled = np.flatnonzero(count[start:stop]) + start
        if count[start:stop].sum() >= least:
            runs.append((int(filled[0]), int(filled[-1])))
    return runs


def _padding(
    rgb: NDArray[np.uint8], grey: NDArray[np.uint8], core: Bools, levels: list[tuple[int, int]]
) -> Bools:
    """Return the pixels of padding: connected to flat cores, close to their level."""
    padding = np.zeros(rgb.shape[:2], np.bool_)
    if not levels:
        return padding
    full = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    for low, high in levels:
        seed = core & (grey >= low) & (grey <= high)
        reach = cv2.dilate(seed.astype(np.uint8), np.ones((5, 5), np.uint8))
        size = (reach.shape[1] * BLOCK_PX, reach.shape[0] * BLOCK_PX)
        reach = cv2.resize(reach, size, interpolation=cv2.INTER_NEAREST)
        reach = reach[: rgb.shape[0], : rgb.shape[1]]
        # Ringing of strong JPEG compression moves pixels beside an edge by tens of levels.
        slack = 40 if high < _PAD_DARK else 10
        padding |= (reach > 0) & (full >= max(0, low - slack)) & (full <= min(255, high + slack))
    grown: NDArray[np.uint8] = cv2.dilate(padding.astype(np.uint8), np.ones((3, 3), np.uint8))
    return grown > 0


def _shrunk(mask: Bools, size: tuple[int, int]) -> Bools:
    share = cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA)
    return np.asarray(share > 0)


def _brightest(rgb: NDArray[np.uint8], where: Bools) -> tuple[Floats, bool]:
    """Return the colour of the brightest near-neutral pixels, or the assumed one."""
    pixels = rgb[where].astype(np.int16)
    if len(pixels) > 200_000:
        pixels = pixels[:: len(pixels) // 200_000]
    pale = pixels[(pixels.max(1) - pixels.min(1) <= 24) & (pixels.min(1) >= 150)]
    if len(pale) < max(4, 0.01 * len(pixels)):
        return _ASSUMED.copy(), False
    brightness = pale.sum(1)
    top = pale[brightness >= np.percentile(brightness, 60)]
    return np.median(top, axis=0).astype(np.float32), True


def _fit_light(
    small: NDArray[np.uint8], flat: Bools, glass_range: tuple[int, int]
) -> tuple[Floats, Floats]:
    """Fit glass colour and a smooth falloff of light to the upper envelope of flat blocks.

    What lies below the fit counts less with every round: tissue and shadows only darken.
    """
    height, width = flat.shape
    rows, columns = np.nonzero(flat)
    logs = np.log(np.maximum(small[rows, columns].astype(np.float64), 1))
    level = logs.mean(axis=1)
    tints = logs[:, :2] - logs[:, 2:]
    low, high = np.log(max(1, glass_range[0] - 1)), np.log(glass_range[1] + 1)
    weight = ((level >= low) & (level <= high)).astype(np.float64)
    design = _quadratic(rows, columns, (height, width))
    start = float(np.percentile(level[weight > 0], 70))
    fitted = np.full(len(level), start)
    tint = np.median(tints[(weight > 0) & (level >= start - 0.02)], axis=0)
    coefficients = np.array([start, 0, 0, 0, 0, 0.0])
    for tolerance in (0.10, 0.06, 0.04, 0.025, 0.016, 0.012, 0.012):
        below = np.minimum(level - fitted, 0) / tolerance
        above = np.maximum(level - fitted, 0) / (3 * tolerance)
        off_tint = np.abs(tints - tint).max(axis=1) / max(tolerance, 0.02)
        weight = np.exp(-(below**2) - above**2 - off_tint**2)
        total = weight.sum()
        if total < 3:
            break
        pull = np.diag([0, 2e-3, 2e-3, 2e-2, 2e-2, 2e-2]) * total
        weighted = design * weight[:, None]
        coefficients = np.linalg.solve(design.T @ weighted + pull, weighted.T @ level)
        fitted = design @ coefficients
        near = weight > 0.5
        if near.any():
            tint = np.median(tints[near], axis=0)
    yy, xx = np.mgrid[:height, :width]
    surface = (_quadratic(yy.ravel(), xx.ravel(), (height, width)) @ coefficients).reshape(
        height, width
    )
    top = float(surface[flat].max())
    # Extrapolated light stays within what was seen on glass.
    falloff = np.clip(top - surface, 0, 0.5).astype(np.float32)
    blue = top - tint.sum() / 3
    colour = np.exp([blue + tint[0], blue + tint[1], blue])
    return np.minimum(colour, 255).astype(np.float32), falloff


def _quadratic(
    rows: NDArray[np.intp], columns: NDArray[np.intp], shape: tuple[int, int]
) -> NDArray[np.float64]:
    y = (rows + 0.5) / shape[0] * 2 - 1
    x = (columns + 0.5) / shape[1] * 2 - 1
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
