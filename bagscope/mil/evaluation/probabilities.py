"""How far probabilities can be taken at their word: Brier score, log loss, calibration error.

`y` is (n,) class indices and `p` (n, C) probabilities; `outcome` (n,) of 0 and 1 and `probability`
(n,) that of 1. `weights` and undefined values: see `bagscope.mil.evaluation.inputs`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from bagscope.mil.evaluation.inputs import (
    FloatArray,
    IntArray,
    Value,
    as_outcome,
    as_probability,
    labels_and_distribution,
    over_resamples,
)

Binning = Literal["width", "mass"]
BINS = 15
_SMALLEST = float(np.finfo(np.float64).eps)


def brier(y: npt.ArrayLike, p: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Value:
    """Return the mean over cases of Σ_c (p_c − [y = c])², the sum form: 0 to 2.

    Of two classes it is twice `binary_brier`.
    """
    classes, probabilities = labels_and_distribution(y, p)
    truth = np.eye(probabilities.shape[1])[classes]
    return _mean(((probabilities - truth) ** 2).sum(axis=1), weights, "the Brier score")


def binary_brier(
    outcome: npt.ArrayLike, probability: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return the mean of (probability − outcome)²: 0 to 1."""
    truth, probabilities = _checked(outcome, probability)
    return _mean((probabilities - truth) ** 2, weights, "the Brier score")


def log_loss(y: npt.ArrayLike, p: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Value:
    """Return the mean of −log p_y in nats, p_y not below 2⁻⁵²."""
    classes, probabilities = labels_and_distribution(y, p)
    given = probabilities[np.arange(len(classes)), classes]
    return _mean(-np.log(np.maximum(given, _SMALLEST)), weights, "log loss")


def ece(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    bins: int = BINS,
    binning: Binning = "width",
) -> Value:
    """Return the expected calibration error Σ_b (n_b / n) |share right − mean confidence|.

    Confidence is the probability of the most probable class, of two classes too. Bins: see
    `binary_ece`.
    """
    classes, probabilities = labels_and_distribution(y, p)
    right = np.argmax(probabilities, axis=1) == classes
    return binary_ece(right, probabilities.max(axis=1), weights, bins=bins, binning=binning)


def binary_ece(
    outcome: npt.ArrayLike,
    probability: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    bins: int = BINS,
    binning: Binning = "width",
) -> Value:
    """Return the expected calibration error of the probability of 1.

    "width", the default, divides [0, 1] into equal bins, closed on the right. "mass" gives bins of
    equal counts, in each resample anew; equal probabilities stay together, in the bin of their
    middle rank.
    """
    truth, probabilities = _checked(outcome, probability)
    if bins < 1 or binning not in ("width", "mass"):
        raise ValueError(f"{bins} bins of equal {binning!r}; give 1 or more, of 'width' or 'mass'")
    gap = truth - probabilities
    by_width = np.eye(bins)[bins_of_width(probabilities, bins)]
    order = np.argsort(probabilities, kind="stable")
    ranked = probabilities[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])

    def of_counts(counts: FloatArray) -> FloatArray:
        if binning == "width":
            gaps = (counts * gap) @ by_width
        else:
            cases = np.add.reduceat(counts[:, order], starts, axis=1)
            grouped = np.add.reduceat((counts * gap)[:, order], starts, axis=1)
            gaps = _in_bins(grouped, bins_of_mass(cases, bins), bins)
        values: FloatArray = np.abs(gaps).sum(axis=1) / counts.sum(axis=1)
        return values

    return over_resamples(
        of_counts,
        weights,
        rows=len(truth),
        undefined="the calibration error is undefined: no case counts",
    )


def bins_of_width(probability: FloatArray, bins: int) -> IntArray:
    """Return the bin of each probability among `bins` equal parts of [0, 1], closed on the right.

    Zero belongs to the first.
    """
    edges = np.linspace(0, 1, bins + 1)
    return np.clip(np.searchsorted(edges, probability, side="left") - 1, 0, bins - 1)


def bins_of_mass(cases: FloatArray, bins: int) -> IntArray:
    """Return the bin of each distinct value, in order, from its counts: (R, G) to (R, G)."""
    reached = np.cumsum(cases, axis=1)
    share = (reached - cases / 2) / np.maximum(reached[:, -1:], 1e-300)
    return np.minimum(share * bins, bins - 1).astype(np.int64)


def _in_bins(values: FloatArray, which: IntArray, bins: int) -> FloatArray:
    rows = len(values)
    flat = (which + bins * np.arange(rows)[:, None]).ravel()
    summed = np.bincount(flat, weights=values.ravel(), minlength=rows * bins)
    return summed.reshape(rows, bins).astype(np.float64, copy=False)


def _mean(losses: FloatArray, weights: npt.ArrayLike | None, what: str) -> Value:
    return over_resamples(
        lambda counts: counts @ losses / counts.sum(axis=1),
        weights,
        rows=len(losses),
        undefined=f"{what} is undefined: no case counts",
    )


def _checked(outcome: npt.ArrayLike, probability: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    probabilities = as_probability(probability)
    return as_outcome(outcome, rows=len(probabilities)).astype(np.float64), probabilities
