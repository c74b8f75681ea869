"""Intervals by drawing patients with replacement, all resamples as counts of the same rows.

A statistic is any function of counts (R, n) to values (R,), so that one loop serves all metrics:

    interval(lambda counts: auroc(y, p, counts), patients, seed=0)

Patients are drawn, not rows: slides of one patient come and go together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bagscope.mil.evaluation.inputs import FloatArray, IntArray, Value, check_level, or_none

RESAMPLES = 10_000
LEVEL = 0.95
MOST_UNDEFINED = 0.05
"""Above this share of resamples without a value, no interval is given."""
_COUNTS_AT_ONCE = 1 << 20

Statistic = Callable[[FloatArray], Value]
"""(R, n) counts to (R,) values, NaN where undefined."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value with its interval; NaN for what does not exist.

    Attributes:
        value: of the rows as they are.
        low: lower end.
        high: upper end.
        level: the share of intervals that should cover.
        resamples: how many the interval rests on, undefined ones included; 0 if it is not a
            bootstrap.
        undefined: resamples in which the statistic does not exist, such as those of one class.
    """

    value: float
    low: float
    high: float
    level: float = LEVEL
    resamples: int = 0
    undefined: int = 0

    @property
    def note(self) -> str:
        """Return a sentence on undefined resamples, empty if there are none."""
        if not self.undefined:
            return ""
        told = f"undefined in {self.undefined} of {self.resamples} resamples"
        if self.undefined > MOST_UNDEFINED * self.resamples:
            return f"{told}, too many for an interval"
        return f"{told}, which the interval leaves out"

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with None for NaN."""
        return {
            "value": or_none(self.value),
            "low": or_none(self.low),
            "high": or_none(self.high),
            "level": self.level,
            "resamples": self.resamples,
            "undefined": self.undefined,
        }


def resample_counts(
    groups: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    strata: npt.ArrayLike | None = None,
) -> Iterator[FloatArray]:
    """Yield how often each row counts in each resample, some resamples at a time: (r, n).

    The whole is the same for a seed, whatever is done with the pieces.

    Args:
        groups: (n,) the patient of each row; rows of one are drawn together.
        resamples: how many in total.
        seed: of the draws.
        strata: (n,) such as the class; each stratum keeps its number of patients. Patients whose
            rows lie in several strata form strata of their own, one for each such set.

    Raises:
        ValueError: on empty or unequal lengths, or without a resample.
    """
    member, patients = _members(groups)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; give 1 or more")
    stratum = np.zeros(patients, dtype=np.int64) if strata is None else _strata(member, strata)
    return _draw(member, _by_stratum(stratum), resamples, np.random.default_rng(seed))


def _draw(
    member: IntArray, pools: Sequence[IntArray], resamples: int, random: np.random.Generator
) -> Iterator[FloatArray]:
    patients = sum(len(pool) for pool in pools)
    step = max(1, _COUNTS_AT_ONCE // len(member))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        first = patients * np.arange(rows)[:, None]
        drawn = [first + pool[random.integers(len(pool), size=(rows, len(pool)))] for pool in pools]
        flat = np.concatenate(drawn, axis=1).ravel()
        times = np.bincount(flat, minlength=rows * patients).reshape(rows, patients)
        # As float64 at once, since every metric computes in it.
        yield times[:, member].astype(np.float64)


def draws(
    statistics: Mapping[str, Statistic],
    groups: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    strata: npt.ArrayLike | None = None,
) -> dict[str, FloatArray]:
    """Return the (resamples,) values of several statistics over the same resamples."""
    pieces: dict[str, list[FloatArray]] = {name: [] for name in statistics}
    for counts in resample_counts(groups, resamples=resamples, seed=seed, strata=strata):
        for name, statistic in statistics.items():
            pieces[name].append(np.asarray(statistic(counts), dtype=np.float64))
    return {name: np.concatenate(values) for name, values in pieces.items()}


def intervals(
    statistics: Mapping[str, Statistic],
    groups: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    strata: npt.ArrayLike | None = None,
) -> dict[str, Estimate]:
    """Return the percentile interval of each statistic, over the same resamples.

    A statistic that does not exist for the rows as they are has NaN throughout. The ends are NaN
    too with fewer than two patients, where there is nothing to draw, and where more than
    `MOST_UNDEFINED` of the resamples are undefined.
    """
    check_level(level)
    member, patients = _members(groups)
    once = np.ones((1, len(member)))
    values = {name: _single(statistic, once) for name, statistic in statistics.items()}
    drawn = draws(statistics, groups, resamples=resamples, seed=seed, strata=strata)
    return {
        name: _estimate(values[name], drawn[name], level, enough=patients > 1)
        for name in statistics
    }


def interval(
    statistic: Statistic,
    groups: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    strata: npt.ArrayLike | None = None,
) -> Estimate:
    """Return the percentile interval of one statistic; see `intervals`."""
    found = intervals(
        {"": statistic}, groups, resamples=resamples, level=level, seed=seed, strata=strata
    )
    return found[""]


def fold_mean(of_rows: Callable[[IntArray, FloatArray], Value], folds: npt.ArrayLike) -> Statistic:
    """Return the statistic that is the mean over test folds of one computed within each.

    Scores of different folds come from different models and need not be on one scale, which a
    pooled AUROC takes for granted. A resample in which one fold is undefined is undefined; give
    the folds, or folds and classes, as `strata` where that happens often.

    Args:
        of_rows: the rows (indices) of a fold and their counts (R, rows) to (R,) values, such as
            `lambda rows, counts: auroc(y[rows], p[rows], counts)`.
        folds: (n,) the fold in which each row is tested.
    """
    names, place = np.unique(np.asarray(folds), return_inverse=True)
    members = [np.flatnonzero(place == k) for k in range(len(names))]

    def statistic(counts: FloatArray) -> Value:
        values = np.stack([of_rows(rows, counts[:, rows]) for rows in members])
        mean: FloatArray = values.mean(axis=0)
        return mean

    return statistic


def defined_enough(values: FloatArray) -> bool:
    """Return whether no more than `MOST_UNDEFINED` of the values are NaN."""
    return bool(np.isnan(values).mean() <= MOST_UNDEFINED)


def percentile_ends(values: FloatArray, level: float) -> tuple[float, float]:
    """Return the ends of the interval of (R,) values; NaN if too many are undefined."""
    if not defined_enough(values):
        return math.nan, math.nan
    low, high = np.quantile(values[~np.isnan(values)], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _estimate(value: float, drawn: FloatArray, level: float, *, enough: bool) -> Estimate:
    usable = enough and not math.isnan(value)
    low, high = percentile_ends(drawn, level) if usable else (math.nan, math.nan)
    return Estimate(
        value=value,
        low=low,
        high=high,
        level=level,
        resamples=len(drawn),
        undefined=int(np.isnan(drawn).sum()),
    )


def _single(statistic: Statistic, once: FloatArray) -> float:
    return float(np.asarray(statistic(once)).reshape(()))


def _members(groups: npt.ArrayLike) -> tuple[IntArray, int]:
    names = np.asarray(groups)
    if names.ndim != 1 or names.size == 0:
        raise ValueError(f"groups have shape {names.shape}; give the patient of each case")
    distinct, member = np.unique(names, return_inverse=True)
    return member.astype(np.int64), len(distinct)


def _strata(member: IntArray, strata: npt.ArrayLike) -> IntArray:
    """Return the stratum of each patient: a number for the set that its rows lie in."""
    kinds, place = np.unique(np.asarray(strata), return_inverse=True)
    if place.shape != member.shape:
        raise ValueError(
            f"strata have shape {place.shape} for {len(member)} cases; give one for each"
        )
    lies_in = np.zeros((int(member.max()) + 1, len(kinds)), dtype=np.bool_)
    lies_in[member, place] = True
    return np.unique(lies_in, axis=0, return_inverse=True)[1].ravel()


def _by_stratum(stratum: IntArray) -> list[IntArray]:
    return [np.flatnonzero(stratum == k) for k in range(int(stratum.max()) + 1)]
