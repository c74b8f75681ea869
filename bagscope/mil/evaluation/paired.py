"""Whether one model is better than another on the same patients, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from bagscope.mil.evaluation.bootstrap import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Statistic,
    draws,
    percentile_ends,
)
from bagscope.mil.evaluation.inputs import (
    FloatArray,
    as_finite,
    as_numbers,
    as_outcome,
    check_level,
    or_none,
)

Method = Literal["DeLong", "paired bootstrap", "corrected resampled t"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models on the same patients; NaN for what does not exist.

    Attributes:
        method: the test.
        first: the first model's value.
        second: the second's.
        difference: first − second.
        low: lower end of the difference's interval.
        high: its upper end.
        level: of the interval.
        p_value: two-sided, of no difference.
        statistic: z of DeLong, t of the corrected test; NaN for the bootstrap.
        resamples: of the bootstrap, undefined ones included; else 0.
        undefined: resamples in which the difference does not exist.
    """

    method: Method
    first: float
    second: float
    difference: float
    low: float
    high: float
    level: float
    p_value: float
    statistic: float = math.nan
    resamples: int = 0
    undefined: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with None for NaN."""
        fields = asdict(self)
        return {k: or_none(v) if isinstance(v, float) else v for k, v in fields.items()}


def delong_interval(
    outcome: npt.ArrayLike, score: npt.ArrayLike, *, level: float = LEVEL
) -> Estimate:
    """Return the AUROC of (n,) scores with DeLong's interval, normal and cut to [0, 1].

    For one case per patient, at least two of each outcome. An AUROC of exactly 1 has no width;
    the bootstrap has none there either.
    """
    areas, covariance = delong_covariance(outcome, as_finite(score, "score")[None])
    reach = _z(level) * math.sqrt(covariance[0, 0])
    area = float(areas[0])
    return Estimate(
        value=area, low=max(0.0, area - reach), high=min(1.0, area + reach), level=level
    )


def delong_test(
    outcome: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike, *, level: float = LEVEL
) -> Comparison:
    """Compare the AUROCs of two sets of scores, (n,) each, on the same cases of one held-out set.

    For one case per patient; where patients have several, `paired_bootstrap` draws patients. If
    the difference has no variance, as between two perfect orders, statistic and p-value are NaN
    unless the difference is 0, which has p = 1.
    """
    one, other = as_finite(first, "first"), as_finite(second, "second")
    if len(one) != len(other):
        raise ValueError(
            f"first has {len(one)} scores and second {len(other)}; give the same cases"
        )
    areas, covariance = delong_covariance(outcome, np.stack([one, other]))
    difference = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    reach = math.sqrt(max(variance, 0.0))
    # Rounding leaves a trace of variance where two orders are the same.
    if reach < 1e-9:
        z, p_value = (0.0, 1.0) if abs(difference) < 1e-12 else (math.nan, math.nan)
    else:
        z = difference / reach
        p_value = float(2 * stats.norm.sf(abs(z)))
    return Comparison(
        method="DeLong",
        first=float(areas[0]),
        second=float(areas[1]),
        difference=difference,
        low=difference - _z(level) * reach,
        high=difference + _z(level) * reach,
        level=level,
        p_value=p_value,
        statistic=z,
    )


def delong_covariance(outcome: npt.ArrayLike, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return AUROCs (k,) and their covariance (k, k), from scores (k, n), in O(k n log n).

    The share of negatives that each positive beats, and of positives that beat each negative, come
    from mid-ranks among all less mid-ranks among its own.
    """
    columns = [as_finite(row, "score") for row in scores]
    truth = as_outcome(outcome, rows=len(columns[0]))
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if min(positives, negatives) < 2:
        raise ValueError(
            f"DeLong's variance needs two cases of each outcome, not {positives} positive "
            f"and {negatives} negative"
        )
    table = np.stack(columns)
    overall = stats.rankdata(table, axis=1)
    among_positives = stats.rankdata(table[:, truth], axis=1)
    among_negatives = stats.rankdata(table[:, ~truth], axis=1)
    beaten = (overall[:, truth] - among_positives) / negatives
    beating = 1 - (overall[:, ~truth] - among_negatives) / positives
    covariance = np.atleast_2d(np.cov(beaten)) / positives
    covariance = covariance + np.atleast_2d(np.cov(beating)) / negatives
    return beaten.mean(axis=1), covariance


def paired_bootstrap(
    first: Statistic,
    second: Statistic,
    groups: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    strata: npt.ArrayLike | None = None,
) -> Comparison:
    """Compare any statistic of two models, drawing the same patients for both.

    The p-value is twice the share of resamples on the far side of 0, (1 + those) / (1 + all), at
    most 1; the interval is that of percentiles. NaN as in `bagscope.mil.evaluation.bootstrap`.

    Args:
        first: a model's statistic of (R, n) counts.
        second: the other model's, of the same rows.
        groups: (n,) the patient of each row.
        resamples: how many.
        level: of the interval.
        seed: of the draws.
        strata: as of `resample_counts`.
    """
    check_level(level)
    once = np.ones((1, np.asarray(groups).size))
    one, other = (float(np.asarray(each(once)).reshape(())) for each in (first, second))
    drawn = draws(
        {"first": first, "second": second}, groups, resamples=resamples, seed=seed, strata=strata
    )
    away = drawn["first"] - drawn["second"]
    low, high, p_value = math.nan, math.nan, math.nan
    if not math.isnan(one - other) and np.unique(np.asarray(groups)).size > 1:
        low, high = percentile_ends(away, level)
        if not math.isnan(low):
            p_value = _share_beyond_zero(away[~np.isnan(away)])
    return Comparison(
        method="paired bootstrap",
        first=one,
        second=other,
        difference=one - other,
        low=low,
        high=high,
        level=level,
        p_value=p_value,
        resamples=resamples,
        undefined=int(np.isnan(away).sum()),
    )


def corrected_resampled_t_test(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    train_cases: float,
    test_cases: float,
    level: float = LEVEL,
) -> Comparison:
    """Compare a metric of two models over repeated folds (Nadeau and Bengio 2003).

    Folds of repeated cross-validation share training cases, so that their plain t-test is too
    sure; the variance is raised from s² / J to s² (1 / J + test / train).

    Args:
        first: (J,) a model's values, one for each fold of each repeat.
        second: (J,) the other's, on the same folds.
        train_cases: how many cases, or patients, a fold trains on.
        test_cases: how many it tests on.
        level: of the interval.
    """
    one, other = as_finite(first, "first"), as_finite(second, "second")
    if len(one) != len(other) or len(one) < 2:
        raise ValueError(
            f"first has {len(one)} folds and second {len(other)}; give the same two folds or more"
        )
    if not (train_cases > 0 and test_cases > 0):
        raise ValueError(
            f"folds train on {train_cases} cases and test on {test_cases}; both must be above 0"
        )
    differences = one - other
    folds = len(differences)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) * math.sqrt(1 / folds + test_cases / train_cases)
    reach = float(stats.t.ppf((1 + level) / 2, folds - 1)) * error
    if error > 0:
        t = mean / error
        p_value = float(2 * stats.t.sf(abs(t), folds - 1))
    else:
        t, p_value = (0.0, 1.0) if mean == 0 else (math.nan, math.nan)
    return Comparison(
        method="corrected resampled t",
        first=float(one.mean()),
        second=float(other.mean()),
        difference=mean,
        low=mean - reach,
        high=mean + reach,
        level=level,
        p_value=p_value,
        statistic=t,
    )


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Return p-values (m,) adjusted for being m, by Holm's step-down rule.

    NaN stays NaN and is not counted among the m.
    """
    given = as_numbers(p_values, "p_values")
    known = ~np.isnan(given)
    if given.ndim != 1 or ((given[known] < 0) | (given[known] > 1)).any():
        raise ValueError(f"p-values are {given.tolist()}; give a list of values from 0 to 1")
    order = np.argsort(given[known], kind="stable")
    factors = np.arange(len(order), 0, -1)
    stepped = np.minimum(np.maximum.accumulate(given[known][order] * factors), 1)
    adjusted = np.full(len(given), np.nan)
    places = np.flatnonzero(known)
    adjusted[places[order]] = stepped
    return adjusted


def _share_beyond_zero(away: FloatArray) -> float:
    rarer = min((away <= 0).sum(), (away >= 0).sum())
    return min(1.0, 2 * float(1 + rarer) / (1 + len(away)))


def _z(level: float) -> float:
    check_level(level)
    return float(stats.norm.ppf((1 + level) / 2))
