"""Colours of scores: one scale for a whole cohort, so that a colour means the same number anywhere.

The maps are perceptually ordered and told apart by any kind of colour vision: viridis where more
is more, red to blue where a number has a sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bagscope.heatmaps.choices import RATIOS, ScaleName, Shows
from bagscope.heatmaps.scores import MEANINGS

if TYPE_CHECKING:
    from bagscope.artifacts import Json
    from bagscope.mil.bags import ScoreKind

SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
OF_DISAGREEMENT = "magma"
"""Not that of scores: the two pictures of a slide are not to be taken for each other."""
EMPTY_RGB = (255, 255, 255)
"""Where there is no tile."""

_TAIL_PERCENT = 1.0
"""Of a slide's tiles, at either end, that may lie beyond the range: one tile can't bleach all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColourScale:
    """Which number has which colour.

    Attributes:
        scale: what the numbers are.
        low: has the first colour, and so has everything below.
        high: has the last colour, and so has everything above.
        logarithmic: equal factors are equal steps of colour.
        map_name: of matplotlib.
        shows: whether the numbers are on the scale, or how far the members are apart on it.
    """

    scale: ScaleName
    low: float
    high: float
    logarithmic: bool
    map_name: str
    shows: Shows = "score"

    def positions(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return where values lie between `low` (0) and `high` (1), kept within; NaN stays."""
        low, high = self.low, self.high
        numbers = np.asarray(values, np.float64)
        if self.logarithmic:
            low, high = math.log(low), math.log(high)
            numbers = np.log(np.maximum(numbers, np.finfo(np.float64).tiny))
        return np.clip((numbers - low) / (high - low), 0.0, 1.0)

    def rgb(self, values: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Return the colours (..., 3) uint8 of values (...); NaN is white."""
        places = self.positions(values)
        empty = np.isnan(places)
        index = np.minimum(np.where(empty, 0.0, places) * 256, 255).astype(np.intp)
        colours: NDArray[np.uint8] = lookup_table(self.map_name)[index]
        colours[empty] = EMPTY_RGB
        return colours

    def ticks(self) -> list[float]:
        """Return numbers to mark on a legend, at most nine, both ends among them."""
        if self.logarithmic:
            power = round(math.log2(self.high))
            powers = range(power + 1) if power <= 3 else (0, power // 2, power)
            ticks = {2.0**sign for p in powers for sign in (p, -p)}
            inside = {tick for tick in ticks if self.low < tick < self.high}
            return sorted({self.low, *inside, self.high})
        return [round(number, 6) for number in np.linspace(self.low, self.high, 5)]

    def fields(self) -> dict[str, Json]:
        """Return what a fingerprint is made of."""
        return {"low": self.low, "high": self.high, "map": self.map_name}

    @property
    def title(self) -> str:
        """Return what the numbers are, for a legend."""
        own = MEANINGS[self.scale]
        if self.shows == "disagreement":
            return f"Disagreement of the models: {own[0].lower()}{own[1:]}"
        return own

    @property
    def meaning(self) -> str:
        """Return how to read a number, in a sentence."""
        if self.shows == "disagreement":
            return (
                "Standard deviation over the models, in the scale's own units: 0 where all of them "
                "say the same."
            )
        return _EXPLAINED[self.scale]

    def tick_text(self, value: float) -> str:
        """Return a number as it stands on a legend."""
        if self.logarithmic:
            return f"{value:g}×" if value >= 1 else f"1/{1 / value:g}"
        return f"{value:g}".replace("-", "−")


@lru_cache(maxsize=8)
def lookup_table(map_name: str) -> NDArray[np.uint8]:
    """Return a map's 256 colours: (256, 3) uint8."""
    from matplotlib import colormaps

    colours = colormaps[map_name](np.arange(256), bytes=True)
    return np.ascontiguousarray(colours[:, :3], np.uint8)


def usual_range(values: NDArray[np.floating]) -> tuple[float, float]:
    """Return the range of a slide's values, the outermost percent at either end left out."""
    low, high = np.percentile(values, [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
    return float(low), float(high)


def shared_scale(
    scale: ScaleName,
    kind: ScoreKind,
    ranges: Iterable[tuple[float, float]] = (),
    *,
    limits: tuple[float, float] | None = None,
    shows: Shows = "score",
) -> ColourScale:
    """Return the one scale of a cohort.

    A ratio reaches from 1/2^k to 2^k, numbers with a sign from -x to x, so that 1 and 0 are always
    the middle; x and k are the least that hold every slide's usual range.

    Args:
        scale: what the numbers are.
        kind: what the scores are that they were made of.
        ranges: of each slide (see `usual_range`).
        limits: low and high, over all that.
        shows: the numbers, or how far members are apart on their scale: from 0 on.
    """
    if shows == "disagreement":
        top = _rounded_up(max((high for _, high in ranges), default=0.0))
        low, high = limits or (0.0, top)
        return ColourScale(
            scale=scale,
            low=low,
            high=high,
            logarithmic=False,
            map_name=OF_DISAGREEMENT,
            shows=shows,
        )
    signed = scale == "contribution" or (scale == "logit" and kind != "log_weight")
    logarithmic = scale in RATIOS
    if limits is None:
        limits = _limits(scale, signed, list(ranges))
    return ColourScale(
        scale=scale,
        low=limits[0],
        high=limits[1],
        logarithmic=logarithmic,
        map_name=DIVERGING if signed else SEQUENTIAL,
    )


def _limits(
    scale: ScaleName, signed: bool, ranges: list[tuple[float, float]]
) -> tuple[float, float]:
    if scale == "percentile":
        return 0.0, 100.0
    if scale == "probability":
        return 0.0, 1.0
    low = min((one[0] for one in ranges), default=0.0)
    high = max((one[1] for one in ranges), default=1.0)
    if scale in RATIOS:
        tiny = np.finfo(np.float64).tiny
        widest = max(abs(math.log2(max(low, tiny))), abs(math.log2(max(high, tiny))))
        # Beyond a factor of 1024 a weight is as good as none, or as good as all.
        top = 2.0 ** min(10, max(1, math.ceil(widest - 1e-9)))
        return 1 / top, top
    if signed:
        top = _rounded_up(max(abs(low), abs(high)))
        return -top, top
    return math.floor(low * 10) / 10, max(
        math.ceil(high * 10) / 10, math.floor(low * 10) / 10 + 0.1
    )


def _rounded_up(value: float) -> float:
    """Return the least of 1, 2, 2.5, 5 times a power of ten that is not below a value."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


_EXPLAINED: dict[ScaleName, str] = {
    "ratio": "1× is what each tile would weigh if all weighed the same; 4× is four times that.",
    "logit": "Higher speaks more for it; comparable between slides of the same model only.",
    "percentile": "90: nine tenths of this slide's own tiles score lower. Says nothing of other "
    "slides.",
    "probability": "What the model would say of a slide that were this tile alone.",
    "rollout": "1× is what each tile would have if all had the same; counts the way through all "
    "layers, back from the tiles that the last one looked at.",
    "contribution": "What the tile adds to the class's logit: red speaks for the class, blue "
    "against it; all tiles and a constant add up to the logit.",
}
