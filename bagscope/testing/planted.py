"""Bags with a planted signal, and the best that can be made of it: ground truth for aggregators.

Every tile is white noise about its bag's own offset. In every second bag a stated share of the
tiles is shifted along one direction. The offset, different in every bag, hides the shift from the
bag's mean, as stain and scanner do; the tiles that carry it are known, so that not only the bags'
labels but also the tiles' scores can be judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantedBags:
    """What `planted_bags` made. D features, B bags.

    Attributes:
        bags: B arrays (n, D) float32.
        labels: (B,) int64, 1 where tiles were shifted.
        truth: B arrays (n,) bool, the shifted tiles.
        direction: (D,) of length 1, along which they were shifted.
        shift: by how much, in standard deviations of a tile.
        share: of the tiles of a bag with label 1.
        offset: standard deviation of the bags' offsets, in those of a tile.
    """

    bags: tuple[NDArray[np.float32], ...]
    labels: NDArray[np.int64]
    truth: tuple[NDArray[np.bool_], ...]
    direction: NDArray[np.float64]
    shift: float
    share: float
    offset: float

    def __len__(self) -> int:
        return len(self.bags)

    def chosen(self, places: Sequence[int] | slice) -> PlantedBags:
        """Return some of the bags; all lie along the same direction."""
        numbers = np.arange(len(self))[places]
        return PlantedBags(
            bags=tuple(self.bags[place] for place in numbers),
            labels=self.labels[numbers],
            truth=tuple(self.truth[place] for place in numbers),
            direction=self.direction,
            shift=self.shift,
            share=self.share,
            offset=self.offset,
        )

    def oracle_tile_scores(self) -> tuple[NDArray[np.float64], ...]:
        """Return (n,) of each bag: how far along the direction a tile lies from the bag's middle.

        No score of a tile alone orders tiles better: the likelihood ratio rises with it.
        """
        along = [bag.astype(np.float64) @ self.direction for bag in self.bags]
        return tuple(one - np.median(one) for one in along)

    def oracle_scores(self) -> NDArray[np.float64]:
        """Return (B,) the log likelihood ratio of each bag, with direction and shift known.

        log mean exp(shift · s) over its tiles' scores s: exact where one tile is shifted and the
        bag's median is its offset; where several are, no less sure of them.
        """
        return np.array(
            [
                np.logaddexp.reduce(self.shift * s) - math.log(len(s))
                for s in self.oracle_tile_scores()
            ]
        )

    @property
    def mean_auroc(self) -> float:
        """Return what the bags' means allow at best: the AUROC along the known direction.

        Exact where all bags are as large as their mean.
        """
        tiles = float(np.mean([len(bag) for bag in self.bags]))
        moved = max(1, round(self.share * tiles)) / tiles * self.shift
        return NormalDist().cdf(moved / math.sqrt(2 * (self.offset**2 + 1 / tiles)))


def planted_bags(
    count: int = 300,
    *,
    dimension: int = 64,
    tiles: tuple[int, int] = (300, 500),
    share: float = 0.01,
    shift: float = 6.0,
    offset: float = 0.25,
    seed: int = 0,
) -> PlantedBags:
    """Make bags in which a few tiles decide the label; labels are 0, 1, 0, 1, ...

    With the defaults no linear model of a bag's mean comes to an AUROC of 0.65 (`mean_auroc` says
    what it can come to), and whoever knows the direction tells nearly all bags apart, even by one
    tile in a thousand.

    Args:
        count: bags.
        dimension: width of a tile's vector.
        tiles: fewest and most of a bag; drawn evenly.
        share: of a positive bag's tiles that are shifted, at least one tile.
        shift: of these, in standard deviations of a tile along the direction.
        offset: standard deviation of a bag's own offset, in each dimension.
        seed: of all draws.

    Raises:
        ValueError: a number out of its range; names it.
    """
    ranges: dict[str, tuple[Any, bool]] = {
        "count": (count, count >= 1),
        "dimension": (dimension, dimension >= 1),
        "tiles": (tiles, 1 <= tiles[0] <= tiles[1]),
        "share": (share, 0 < share <= 1),
        "shift": (shift, math.isfinite(shift)),
        "offset": (offset, 0 <= offset < math.inf),
    }
    for name, (value, is_right) in ranges.items():
        if not is_right:
            raise ValueError(f"planted_bags: {name} is {value}, out of its range")
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=dimension)
    direction /= np.linalg.norm(direction)
    labels = np.arange(count) % 2
    bags, truth = [], []
    for label in labels:
        size = int(generator.integers(tiles[0], tiles[1] + 1))
        bag = generator.standard_normal((size, dimension), np.float32)
        bag += offset * generator.standard_normal(dimension, np.float32)
        is_shifted = np.zeros(size, np.bool_)
        if label:
            some = generator.choice(size, max(1, round(share * size)), replace=False)
            is_shifted[some] = True
            bag[is_shifted] += (shift * direction).astype(np.float32)
        bags.append(bag)
        truth.append(is_shifted)
    return PlantedBags(
        bags=tuple(bags),
        labels=labels,
        truth=tuple(truth),
        direction=direction,
        shift=shift,
        share=share,
        offset=offset,
    )
