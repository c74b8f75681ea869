"""How close predicted numbers come: MAE, RMSE, R², and Pearson's and Spearman's correlation.

`y` and `predicted` are (n,). `weights` and undefined values: see
`bagscope.mil.evaluation.inputs`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bagscope.mil.evaluation.inputs import FloatArray, IntArray, Value, as_finite, over_resamples

_NO_SPREAD = 1e-12
"""A variance below this share of the mean square is rounding, and the values are constant."""


def mae(y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Value:
    """Return the mean absolute error, in units of `y`."""
    truth, guess = _checked(y, predicted)
    error = np.abs(truth - guess)
    return over_resamples(
        lambda counts: counts @ error / counts.sum(axis=1),
        weights,
        rows=len(truth),
        undefined="the mean absolute error is undefined: no case counts",
    )


def rmse(y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Value:
    """Return the root of the mean squared error, in units of `y`."""
    truth, guess = _checked(y, predicted)
    error = (truth - guess) ** 2
    return over_resamples(
        lambda counts: np.sqrt(counts @ error / counts.sum(axis=1)),
        weights,
        rows=len(truth),
        undefined="the root mean squared error is undefined: no case counts",
    )


def r2(y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Value:
    """Return 1 − Σ(y − predicted)² / Σ(y − mean)², the mean being that of the cases that count.

    It is not a squared correlation: a biased prediction can bring it below 0.
    """
    truth, guess = _checked(y, predicted)
    error = (truth - guess) ** 2
    centred = truth - truth.mean()
    return over_resamples(
        lambda counts: 1 - counts @ error / _spread(counts, centred),
        weights,
        rows=len(truth),
        undefined="R² is undefined: y is the same for all cases that count",
    )


def pearson(
    y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return Pearson's correlation."""
    truth, guess = _checked(y, predicted)
    truth, guess = truth - truth.mean(), guess - guess.mean()
    return over_resamples(
        lambda counts: _correlation(counts, truth, guess),
        weights,
        rows=len(truth),
        undefined=_NO_CORRELATION,
    )


def spearman(
    y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return Spearman's correlation: Pearson's of the mid-ranks, ranked in each resample anew."""
    truth, guess = _checked(y, predicted)
    _, rank_of_truth = np.unique(truth, return_inverse=True)
    _, rank_of_guess = np.unique(guess, return_inverse=True)
    return over_resamples(
        lambda counts: _correlation(
            counts, _centred_ranks(counts, rank_of_truth), _centred_ranks(counts, rank_of_guess)
        ),
        weights,
        rows=len(truth),
        undefined=_NO_CORRELATION,
    )


_NO_CORRELATION = "the correlation is undefined: one side is the same for all cases that count"


def _checked(y: npt.ArrayLike, predicted: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    truth = as_finite(y, "y")
    return truth, as_finite(predicted, "predicted", rows=len(truth))


def _sum(counts: FloatArray, values: FloatArray) -> FloatArray:
    """Sum values, (n,) or (r, n), under counts (r, n)."""
    if values.ndim == 1:
        return counts @ values
    summed: FloatArray = np.einsum("rn,rn->r", counts, values)
    return summed


def _spread(counts: FloatArray, values: FloatArray) -> FloatArray:
    """Return Σ(values − mean)², NaN where they are constant."""
    squares = _sum(counts, values**2)
    spread = squares - _sum(counts, values) ** 2 / counts.sum(axis=1)
    return np.where(spread > _NO_SPREAD * squares, spread, np.nan)


def _correlation(counts: FloatArray, one: FloatArray, other: FloatArray) -> FloatArray:
    means = _sum(counts, one) * _sum(counts, other) / counts.sum(axis=1)
    spread = np.sqrt(_spread(counts, one) * _spread(counts, other))
    values: FloatArray = np.clip((_sum(counts, one * other) - means) / spread, -1, 1)
    return values


def _centred_ranks(counts: FloatArray, rank: IntArray) -> FloatArray:
    """Return mid-ranks (r, n) less half the number of cases, from the order of distinct values."""
    order = np.argsort(rank, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(rank[order]) > 0])
    cases = np.add.reduceat(counts[:, order], starts, axis=1)
    middle = np.cumsum(cases, axis=1) - cases / 2
    centred: FloatArray = (middle - counts.sum(axis=1)[:, None] / 2)[:, rank]
    return centred
