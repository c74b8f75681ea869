"""What empty glass looks like on one slide: its colour, its uneven light, and padding around it.

Scanners fill what they did not scan with one exact colour (black, grey or white). Empty glass is
the brightest flat thing that is not such padding; light falls off smoothly over it, by the same
factor in every channel, so that colour ratios tell stain from shade.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
_PAD_STRAIGHT = 0.6
_PAD_BORDER = 0.03
_PALE_DROP = 60
_LEAST_SHARE = 0.005
_FIT_BLOCKS = 20_000
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
    """Estimate the glass of an overview.

    Args:
        rgb: (H, W, 3) uint8, H and W multiples of `BLOCK_PX`.
        ignore: (H, W) bool, pixels without meaning.
    """
    size = (rgb.shape[1] // BLOCK_PX, rgb.shape[0] // BLOCK_PX)
    small = _image(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA))
    readable = np.ones(small.shape[:2], np.bool_) if ignore is None else ~_any_in_blocks(ignore)
    span = _local_range(small)
    grey = _image(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY))
    neutral = _tint(small) <= _PAD_NEUTRAL
    flat = (span <= _FLAT_RANGE) & readable

    levels = _levels(small, grey, flat, flat & (span <= _PAD_RANGE) & neutral)
    padding = _padding(rgb, grey, flat & neutral, levels.pads)
    usable = readable & ~_any_in_blocks(padding) if levels.pads else readable
    glass_range = levels.glass
    if glass_range is None:
        glass_range = _brightest(small, grey, usable, levels.pads)
        flat = usable
    brighter_than = glass_range[1] if glass_range else 16 + (levels.fallback or (239, 239))[1]
    # Beside brighter padding the margin is not seen: compression mixes the two.
    darker = bool(levels.pads) and max(high for _, high in levels.pads) < brighter_than
    margin = _margin_colour(rgb, small, padding, brighter_than) if darker else None
    if glass_range is None and margin is None and levels.fallback is not None:
        # Nothing brighter than the even colour: that colour is the glass itself.
        glass_range = levels.fallback
        flat = usable = (span <= _FLAT_RANGE) & readable
        rest = [pad for pad in levels.pads if pad != levels.fallback]
        padding = _padding(rgb, grey, flat & neutral, rest)
    measured = glass_range is not None or margin is not None
    colour, falloff = _ASSUMED.copy(), np.zeros(small.shape[:2], np.float32)
    if glass_range is not None:
        colour, falloff = _fit_light(small, flat & usable, usable, glass_range)
    if margin is not None and (glass_range is None or margin.mean() > colour.mean() + 4):
        colour, falloff = margin, np.zeros(small.shape[:2], np.float32)
    return Glass(colour=colour, falloff=falloff, padding=padding, measured=measured)


def _image(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.asarray(array, np.uint8)


def _local_range(small: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the largest range of any channel among 3 × 3 blocks."""
    kernel = np.ones((3, 3), np.uint8)
    span = cv2.subtract(cv2.dilate(small, kernel), cv2.erode(small, kernel))
    red, green, blue = cv2.split(span)
    return _image(cv2.max(cv2.max(red, green), blue))


def _tint(small: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the range of the channels of each block."""
    red, green, blue = cv2.split(small)
    most = cv2.max(cv2.max(red, green), blue)
    return _image(cv2.subtract(most, cv2.min(cv2.min(red, green), blue)))


@dataclass(frozen=True, slots=True)
class _Levels:
    """Grey ranges (lowest, highest) of flat blocks; `fallback` is padding that may be glass."""

    pads: list[tuple[int, int]]
    glass: tuple[int, int] | None
    fallback: tuple[int, int] | None


def _levels(
    small: NDArray[np.uint8], grey: NDArray[np.uint8], flat: Bools, exact: Bools
) -> _Levels:
    """Tell the grey levels of padding from those of glass."""
    least = max(6.0, _LEAST_SHARE * grey.size)
    exact_count = np.bincount(grey[exact], minlength=256)
    flat_count = np.bincount(grey[flat], minlength=256)
    clusters: list[tuple[int, int, NDArray[np.float64], bool]] = []
    certain: set[int] = set()
    free = flat.copy()
    framed = _framed_levels(grey, exact, exact_count, least)
    for low, high in _runs(flat_count, exact_count, framed, least):
        inside = free & (grey >= low) & (grey <= high)
        colour = np.median(small[inside], axis=0)
        spike = exact_count[low : high + 1].max() >= 0.7 * np.count_nonzero(inside)
        # A spike inside a wider range came first, and is no part of it.
        free, exact_count[low : high + 1] = free & ~inside, 0
        alike = (grey >= low) & (grey <= high)
        if high < _PAD_DARK:
            is_pad = _border_share(alike) > _PAD_BORDER or _straightness(alike) > _PAD_STRAIGHT
        else:
            is_pad = bool(spike and np.ptp(colour) <= _PAD_NEUTRAL)
        clusters.append((low, high, colour, bool(is_pad)))
        # Padding ends in straight lines along the axes, glass does so nowhere.
        if is_pad and _straightness(alike) > _PAD_STRAIGHT:
            certain.add(low)
    pads = [(low, high) for low, high, _, is_pad in clusters if is_pad]
    # Glass is near neutral; a flat pink or brown area is tissue.
    bright = [c for c in clusters if c[1] >= 120 and np.ptp(c[2]) <= 0.12 * c[2].max()]
    even = [c for c in bright if c[3] and c[0] not in certain]
    own = max((c for c in bright if not c[3]), key=lambda c: c[1], default=None)
    if own is None:
        fallback = max(even, key=lambda c: c[1])[:2] if even else None
        return _Levels(pads, None, fallback)
    # Even glass of one exact colour looks like padding. What is flat beside it and darker is glass
    # itself only if it is no more tinted than shade is; otherwise it is pale tissue.
    above = [c for c in even if own[1] < c[0] <= own[1] + _PALE_DROP]
    tinted = [c for c in above if _is_tinted(own[2], beside=c[2])]
    if tinted:
        glass = max(tinted, key=lambda c: c[1])[:2]
        return _Levels([pad for pad in pads if pad != glass], glass, None)
    return _Levels(pads, own[:2], None)


def _border_share(mask: Bools) -> float:
    """Return which share of the picture's outermost blocks is in a mask."""
    outermost = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return float(outermost.mean())


def _straightness(mask: Bools) -> float:
    """Return which share of a mask's outline runs along the axes for at least 6 blocks."""
    straight = total = 0
    for turned in (mask, mask.T):
        steps = (turned[1:] != turned[:-1]).astype(np.uint8)
        total += int(steps.sum())
        if steps.shape[1] >= 6:
            long = cv2.morphologyEx(steps, cv2.MORPH_OPEN, np.ones((1, 6), np.uint8))
            straight += int(long.sum())
    return straight / max(1, total)


def _is_tinted(colour: NDArray[np.float64], *, beside: NDArray[np.float64]) -> bool:
    drop = beside - colour
    # Saturated white is what scanners fill in, seldom what they see.
    tolerance = 10.0 if beside.min() >= 254 else max(3.0, 0.3 * drop.mean())
    return bool(np.ptp(drop) > tolerance)


def _framed_levels(
    grey: NDArray[np.uint8], exact: Bools, exact_count: NDArray[np.intp], least: float
) -> list[int]:
    """Return levels of exact colour whose blocks are bounded by straight lines: surely padding."""
    likely = [int(level) for level in np.argsort(exact_count)[::-1][:2]]
    return [
        level
        for level in likely
        if exact_count[level] >= 4 * least
        and _straightness(exact & (grey == level)) > _PAD_STRAIGHT
    ]


def _runs(
    count: NDArray[np.intp], exact: NDArray[np.intp], framed: list[int], least: float
) -> list[tuple[int, int]]:
    """Return the grey ranges that hold at least `least` blocks: lone spikes, and what has gaps.

    A spike stands in one or two levels with next to nothing beside it, or in a frame; so padding
    a few levels from the glass is still told from it.
    """
    count = count.copy()
    total = count.sum()
    runs = []
    for level in np.argsort(exact)[::-1][:4]:
        near = count[max(0, level - 1) : level + 2].sum()
        skirt = count[max(0, level - 4) : level + 5].sum() - near
        vast = exact[level] > 0.25 * total
        # Glass that JPEG has rounded stands in several exact levels, padding in one.
        others = exact[max(0, level - 12) : level + 13].sum()
        others -= exact[max(0, level - 1) : level + 2].sum()
        lone = exact[level] > 0.7 * near and (skirt < 0.3 * near or vast)
        lone &= bool(others < 0.05 * exact[level])
        if exact[level] >= 4 * least and (lone or int(level) in framed):
            runs.append((max(0, int(level) - 1), min(255, int(level) + 1)))
            count[max(0, level - 1) : level + 2] = 0
    solid = np.convolve(count, np.ones(7), mode="same") >= max(3.0, 0.1 * least)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], solid.astype(np.int8), [0]])))
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
        alike = (full >= max(0, low - slack)) & (full <= min(255, high + slack))
        padding |= (reach > 0) & alike
        _add_thin_frame(padding, alike)
    return np.asarray(cv2.dilate(padding.view(np.uint8), np.ones((3, 3), np.uint8)) > 0)


def _add_thin_frame(padding: Bools, alike: Bools) -> None:
    """Add outermost lines of pixels that have nearly all the colour of padding, in place.

    A frame of a few pixels is thinner than the blocks that padding is recognised by.
    """
    for turned, target in ((alike, padding), (alike.T, padding.T)):
        for order in (slice(None), slice(None, None, -1)):
            lines = turned[order][: 3 * BLOCK_PX]
            full = lines.mean(axis=1) > 0.9
            depth = len(full) if full.all() else int(full.argmin())
            target[order][:depth] |= lines[:depth]


def _any_in_blocks(mask: Bools) -> Bools:
    """Return the blocks that hold any pixel of `mask`."""
    size = (mask.shape[1] // BLOCK_PX, mask.shape[0] // BLOCK_PX)
    share = cv2.resize(mask.view(np.uint8) * 255, size, interpolation=cv2.INTER_AREA)
    return np.asarray(share > 0)


def _brightest(
    small: NDArray[np.uint8], grey: NDArray[np.uint8], usable: Bools, pads: list[tuple[int, int]]
) -> tuple[int, int] | None:
    """Return the grey range of the brightest near-neutral blocks, where there are enough.

    For glass that shows only as a thin margin around tissue.
    """
    pale = usable & (_tint(small) <= 24) & (grey >= 130)
    for _, high in pads:
        if high >= 120:
            pale &= grey > high + 6
    if np.count_nonzero(pale) < max(6.0, 0.006 * grey.size):
        return None
    high = int(np.percentile(grey[pale], 98))
    return max(0, high - 8), high


def _margin_colour(
    rgb: NDArray[np.uint8], small: NDArray[np.uint8], padding: Bools, level: int
) -> Floats | None:
    """Return the glass colour seen in a thin margin between padding and tissue, if only there.

    Some scanners keep tissue with a narrow margin and fill in the rest, along ragged lines. Any
    flat area of such an overview is tissue, and the margin is brighter.
    """
    bits = padding.view(np.uint8)
    size = (small.shape[1], small.shape[0])
    blocks = _image(cv2.resize(bits * 255, size, interpolation=cv2.INTER_AREA))
    if blocks.mean() < 0.02 * 255 or _straightness(blocks > 127) > _PAD_STRAIGHT:
        return None
    ring = cv2.subtract(cv2.dilate(bits, np.ones((5, 5), np.uint8)), bits)
    pixels = rgb[ring > 0].astype(np.float32)
    if len(pixels) < 50:
        return None
    grey = pixels.mean(axis=1)
    colour = np.median(pixels[grey >= np.percentile(grey, 60)], axis=0)
    inside = cv2.erode((blocks == 0).view(np.uint8), np.ones((3, 3), np.uint8)) > 0
    usual = float(np.median(small[inside].mean(axis=1))) if inside.any() else 0.0
    neutral = np.ptp(colour) <= 0.12 * colour.max()
    if neutral and colour.mean() >= 120 and colour.mean() > max(usual, level - 12) + 2:
        return np.asarray(colour, np.float32)
    return None


def _fit_light(
    small: NDArray[np.uint8], flat: Bools, usable: Bools, glass_range: tuple[int, int]
) -> tuple[Floats, Floats]:
    """Fit glass colour and a smooth falloff of light to the upper envelope of the blocks.

    What lies below the fit counts less with every round: tissue and shadows only darken.
    """
    height, width = flat.shape
    grey_floor = int(0.7 * glass_range[0])
    red, green, blue = cv2.split(small)
    least = cv2.min(cv2.min(red, green), blue)
    rows, columns = np.nonzero(usable & (least >= max(1, grey_floor)))
    sparse = max(1, len(rows) // _FIT_BLOCKS)
    rows, columns = rows[::sparse], columns[::sparse]
    prior = np.where(flat[rows, columns], 1.0, 0.15)
    logs = np.log(np.maximum(small[rows, columns].astype(np.float64), 1))
    level = logs.mean(axis=1)
    tints = logs[:, :2] - logs[:, 2:]
    low, high = np.log(max(1, glass_range[0] - 1)), np.log(glass_range[1] + 1)
    inside = (level >= low) & (level <= high)
    if not inside.any():
        return _ASSUMED.copy(), np.zeros(flat.shape, np.float32)
    design = _quadratic(rows, columns, (height, width))
    start = float(np.percentile(level[inside], 70))
    fitted = np.full(len(level), start)
    near = inside & (level >= start - 0.02)
    tint = np.median(tints[near if near.any() else inside], axis=0)
    coefficients = np.array([start, 0, 0, 0, 0, 0.0])
    for tolerance in (0.10, 0.06, 0.04, 0.025, 0.016, 0.012, 0.012):
        residual = level - fitted
        if tolerance < 0.05:
            tint = _brightest_tint(tints, residual, prior, tint)
        below = np.minimum(residual, 0) / tolerance
        above = np.maximum(residual, 0) / max(3 * tolerance, 0.06)
        off_tint = _tint_distance(tints, tint) / max(0.5 * tolerance, 0.012)
        weight = prior * np.exp(-(below**2) - above**2 - off_tint**2)
        weight *= np.where(residual > 0, 3.0, 1.0)
        total = weight.sum()
        if total < 3:
            break
        pull = np.diag([0, 2e-3, 2e-3, 2e-2, 2e-2, 2e-2]) * total
        weighted = design * weight[:, None]
        coefficients = np.linalg.solve(design.T @ weighted + pull, weighted.T @ level)
        fitted = design @ coefficients
    y, x = _centred(np.arange(height), height)[:, None], _centred(np.arange(width), width)
    c = coefficients
    surface = (c[0] + c[2] * y + c[4] * y * y) + (c[1] + c[3] * x + c[5] * y) * x
    top = float(surface[usable].max())
    # Extrapolated light stays within what was seen on glass.
    falloff = np.clip(top - surface, 0, 0.5).astype(np.float32)
    blue = top - tint.sum() / 3
    colour = np.exp([blue + tint[0], blue + tint[1], blue])
    return np.minimum(colour, 255).astype(np.float32), falloff


def _brightest_tint(
    tints: NDArray[np.float64],
    residual: NDArray[np.float64],
    weight: NDArray[np.float64],
    current: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the tint (ln red/blue, ln green/blue) of the brightest of the common tints.

    Faint tissue may cover more blocks than glass does, but it is darker.
    """
    step = 0.004
    near = (_tint_distance(tints, current) < 0.12) & (np.abs(residual) < 0.08)
    if np.count_nonzero(near) < 10:
        return current
    cells = np.rint((tints[near] - current) / step).astype(np.int64) + 32
    count = np.bincount(cells[:, 0] * 65 + cells[:, 1], weights=weight[near], minlength=65 * 65)
    density = cv2.GaussianBlur(count.reshape(65, 65), (0, 0), 1.3)
    peaks = (density == cv2.dilate(density, np.ones((5, 5)))) & (density > 0.04 * density.max())
    found = []
    for cell in np.argwhere(peaks):
        tint = current + (cell - 32) * step
        own = near & (_tint_distance(tints, tint) < 0.008)
        if own.sum() >= 5:
            light = float(np.percentile(residual[own], 60))
            found.append((light, float(density[tuple(cell)]), np.median(tints[own], axis=0)))
    if not found:
        return current
    # Chroma comes in steps, so that glass may show two tints; tissue is clearly darker.
    heaviest = max(found, key=lambda entry: entry[1])
    brighter = [
        entry
        for entry in found
        if entry[0] > heaviest[0] + (0.008 if entry[1] > 0.15 * heaviest[1] else 0.015)
    ]
    chosen: NDArray[np.float64] = max(brighter or [heaviest], key=lambda entry: entry[1])[2]
    return chosen


def _tint_distance(tints: NDArray[np.float64], tint: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the larger of both differences for each of `tints` (N, 2)."""
    apart = np.abs(tints - tint)
    return np.asarray(np.maximum(apart[:, 0], apart[:, 1]), np.float64)


def _quadratic(
    rows: NDArray[np.intp], columns: NDArray[np.intp], shape: tuple[int, int]
) -> NDArray[np.float64]:
    y, x = _centred(rows, shape[0]), _centred(columns, shape[1])
    terms = [np.ones_like(x), x, y, x * x, y * y, x * y]
    return np.asarray(np.stack(terms, axis=1), np.float64)


def _centred(index: NDArray[np.intp], length: int) -> NDArray[np.float64]:
    """Return the centres of pixels on an axis that runs from -1 to 1."""
    return np.asarray((index + 0.5) / length * 2 - 1, np.float64)
