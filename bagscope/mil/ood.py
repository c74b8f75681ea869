"""How unlike the training bags a bag is, in one number with a known rate of false alarms.

Of every bag two distances are taken, each the root of a mean over the dimensions j,

    d² = mean_j (x̄_j − μ_j)² / σ_j²                 of its mean tile, among the training bags' means
    q² = mean_j mean_i (x_ij − m_j)² / s_j²          of its tiles i, among all training tiles

and its score is max(d / d̃, q / q̃), where d̃ and q̃ are what is usual of training bags. d notices
another scanner or stain, q a share of strange tiles that leaves the mean where it was. The training
bags' own distances are taken from the other patients' alone, so that a new bag of their kind is one
more of them: it exceeds the k-th smallest of n scores with a chance of (n + 1 − k) / (n + 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope.mil.sources import BagSource
from bagscope.mil.statistics import FeatureStatistics

Array = NDArray[np.float64]

FALSE_ALARMS = 0.01
"""Share of bags like the training bags that may be flagged; more only where these are few."""
FEWEST_PATIENTS = 3
"""With fewer training patients nothing can be said."""
_ROWS = 1024
"""Tiles that are float64 at a time, so that a bag's moments take no memory to speak of."""
_LEAST_STD = 0.05
"""No dimension counts as steadier than this share of the root mean square deviation of all: one
that never moved in training would else decide alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OodReference:
    """What is usual among the training bags.

    Attributes:
        usual_bag: d̃, the median distance of a training bag's mean from the others.
        usual_tiles: q̃, the median distance of a training bag's tiles from the others.
        scores: (n,) of the training bags, rising; empty where patients are fewer than three.
    """

    usual_bag: float
    usual_tiles: float
    scores: Array

    @property
    def limit(self) -> float:
        """Return the score above which a bag is flagged; infinite where nothing can be said."""
        return float(self.scores[self._rank - 1]) if len(self.scores) else math.inf

    @property
    def false_alarm_rate(self) -> float:
        """Return how often a bag like the training bags is flagged."""
        count = len(self.scores)
        return (count + 1 - self._rank) / (count + 1) if count else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Return the numbers as tensors, by name."""
        usual = np.array([self.usual_bag, self.usual_tiles])
        return {"usual": torch.from_numpy(usual), "scores": torch.from_numpy(self.scores.copy())}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> OodReference:
        """Return what `tensors` took apart."""
        usual_bag, usual_tiles = tensors["usual"].tolist()
        scores = tensors["scores"].double().numpy()
        return cls(usual_bag=usual_bag, usual_tiles=usual_tiles, scores=scores)

    @property
    def _rank(self) -> int:
        count = len(self.scores)
        return min(count, math.ceil((count + 1) * (1 - FALSE_ALARMS) - 1e-9))


@dataclass(frozen=True, kw_only=True, slots=True)
class BagMoments:
    """Mean (D,) and mean squared deviation (D,) of the tiles of a bag."""

    tiles: int
    mean: Array
    variance: Array


def moments_of(features: NDArray[Any]) -> BagMoments:
    """Return the moments of a bag (n, D), n at least 1."""
    count = len(features)
    mean, variance = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for begin in range(0, count, _ROWS):
        mean += features[begin : begin + _ROWS].sum(axis=0, dtype=np.float64) / count
    for begin in range(0, count, _ROWS):
        off = features[begin : begin + _ROWS].astype(np.float64)
        off -= mean
        variance += (off**2).sum(axis=0) / count
    return BagMoments(tiles=count, mean=mean, variance=variance)


def reference_of(source: BagSource, statistics: FeatureStatistics) -> OodReference:
    """Return what is usual among a source's bags, whose statistics these are; reads each once."""
    of_patient: dict[str, list[int]] = {}
    for place, case in enumerate(source.cases):
        of_patient.setdefault(case.patient_id, []).append(place)
    if len(of_patient) < FEWEST_PATIENTS:
        return OodReference(usual_bag=1.0, usual_tiles=1.0, scores=np.empty(0))
    count, total = len(source.cases), int(source.lengths.sum())
    bag, tile = np.empty(count), np.empty(count)
    for places in of_patient.values():
        own = [moments_of(source.read(place).features) for place in places]
        bags = _Others(count, statistics.bag_mean, statistics.bag_std)
        tiles = _Others(total, statistics.mean, statistics.std)
        for one in own:
            bags.leave_out(1, one.mean, np.zeros_like(one.variance))
            tiles.leave_out(one.tiles, one.mean, one.variance)
        for place, one in zip(places, own, strict=True):
            bag[place] = bags.distance(one.mean, np.zeros_like(one.variance))
            tile[place] = tiles.distance(one.mean, one.variance)
    usual_bag, usual_tiles = _positive(np.median(bag)), _positive(np.median(tile))
    scores = np.sort(np.maximum(bag / usual_bag, tile / usual_tiles))
    return OodReference(usual_bag=usual_bag, usual_tiles=usual_tiles, scores=scores)


class _Others:
    """Mean and variance of all rows but some, which are taken away from the sums about the mean."""

    def __init__(self, count: int, mean: Array, std: Array) -> None:
        self._count, self._mean = count, mean
        self._sum, self._square = np.zeros_like(mean), count * std**2

    def leave_out(self, rows: int, mean: Array, variance: Array) -> None:
        off = mean - self._mean
        self._count -= rows
        self._sum -= rows * off
        self._square -= rows * (variance + off**2)

    def distance(self, mean: Array, variance: Array) -> float:
        """Return how far rows of such a mean and variance lie from the others."""
        shift = self._sum / self._count
        others = self._square / self._count - shift**2
        return _distance(variance + (mean - self._mean - shift) ** 2, others)


def ood_distance(bag: BagMoments, statistics: FeatureStatistics, reference: OodReference) -> float:
    """Return a bag's score in units of the limit: above 1 it is flagged; NaN where unknown."""
    if not len(reference.scores):
        return math.nan
    off = bag.mean - statistics.bag_mean
    of_bag = _distance(off**2, statistics.bag_std**2)
    off = bag.mean - statistics.mean
    of_tiles = _distance(bag.variance + off**2, statistics.std**2)
    score = max(of_bag / reference.usual_bag, of_tiles / reference.usual_tiles)
    return score / _positive(reference.limit)


def _distance(squares: Array, variance: Array) -> float:
    """Return the root mean of squares (D,) in units of the standard deviation."""
    least = _LEAST_STD**2 * max(0.0, float(variance.mean()))
    floored = np.maximum(variance, least)
    still = floored <= 0
    if still.any() and bool((squares[still] > 0).any()):
        return math.inf  # nothing ever moved, and this did
    ratio = np.divide(squares, floored, out=np.zeros_like(squares), where=~still)
    return math.sqrt(float(ratio.mean()))


def _positive(value: float) -> float:
    return float(value) if value > 0 and math.isfinite(value) else 1.0
