"""How well scores order the cases: AUROC, average precision, sensitivity at a specificity.

`outcome` is (n,) of 0 and 1, `score` (n,), higher meaning 1; for classes, `y` is (n,) indices and
`p` (n, C) probabilities. `weights` and undefined values: see `bagscope.mil.evaluation.inputs`. All
of these need both outcomes, or two classes, among the rows that count.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bagscope.mil.evaluation.inputs import (
    BoolArray,
    FloatArray,
    IntArray,
    Value,
    as_finite,
    as_outcome,
    labels_and_distribution,
    over_resamples,
)

_ROUNDING = 1e-9


def binary_auroc(
    outcome: npt.ArrayLike, score: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return the chance that a positive case outscores a negative one, ties counting one half."""
    truth, scores = _checked(outcome, score)
    return over_resamples(
        lambda counts: _auroc_of(truth, scores, counts),
        weights,
        rows=len(truth),
        undefined=_needs_both("AUROC"),
    )


def binary_auprc(
    outcome: npt.ArrayLike, score: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return the average precision Σ (recall_k − recall_{k−1}) precision_k, not interpolated."""
    truth, scores = _checked(outcome, score)
    return over_resamples(
        lambda counts: _average_precision_of(truth, scores, counts),
        weights,
        rows=len(truth),
        undefined=_needs_both("the average precision"),
    )


def auroc(y: npt.ArrayLike, p: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Value:
    """Return the AUROC of two classes, or the mean over classes of one against the rest.

    A class without a case is left out of the mean, in a resample too; the mean is not weighted by
    prevalence.
    """
    classes, probabilities = labels_and_distribution(y, p)
    if probabilities.shape[1] == 2:
        return binary_auroc(classes == 1, probabilities[:, 1], weights)
    return over_resamples(
        lambda counts: _one_against_rest(_auroc_of, classes, probabilities, counts),
        weights,
        rows=len(classes),
        undefined=_needs_two("AUROC"),
    )


def auprc(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    positive: int = 1,
) -> Value:
    """Return the average precision of two classes, or the mean of one against the rest.

    Of two classes it is that of `positive`, since it changes when they are swapped; of more,
    `positive` has no part. A class without a case is left out of the mean, in a resample too.
    """
    classes, probabilities = labels_and_distribution(y, p)
    if probabilities.shape[1] == 2:
        return binary_auprc(classes == positive, probabilities[:, positive], weights)
    return over_resamples(
        lambda counts: _one_against_rest(_average_precision_of, classes, probabilities, counts),
        weights,
        rows=len(classes),
        undefined=_needs_two("the average precision"),
    )


def sensitivity_at_specificity(
    outcome: npt.ArrayLike,
    score: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    specificity: float,
) -> Value:
    """Return the highest sensitivity of any threshold that keeps at least this specificity.

    Nothing is interpolated between thresholds; calling nobody positive is one of them. The
    threshold is chosen on these very cases, in each resample anew.
    """
    truth, scores = _checked(outcome, score)
    return _best_share(truth, scores, weights, specificity, "specificity")


def specificity_at_sensitivity(
    outcome: npt.ArrayLike,
    score: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    sensitivity: float,
) -> Value:
    """Return the highest specificity of any threshold that keeps at least this sensitivity."""
    truth, scores = _checked(outcome, score)
    return _best_share(~truth, -scores, weights, sensitivity, "sensitivity")


def weighted_auroc(
    positive_scores: FloatArray,
    negative_scores: FloatArray,
    positive_weights: FloatArray,
    negative_weights: FloatArray,
) -> FloatArray:
    """Return (R,) AUROCs of scores (P,) and (N,) under weights (R, P) and (R, N).

    NaN where either side has no weight.
    """
    order = np.argsort(negative_scores, kind="stable")
    ranked = negative_scores[order]
    below = np.zeros((len(negative_weights), len(ranked) + 1))
    np.cumsum(negative_weights[:, order], axis=1, out=below[:, 1:])
    first = np.searchsorted(ranked, positive_scores, side="left")
    last = np.searchsorted(ranked, positive_scores, side="right")
    beaten = below[:, first]
    if (first != last).any():
        beaten = (beaten + below[:, last]) / 2
    won = np.einsum("rp,rp->r", positive_weights, beaten)
    values: FloatArray = won / (positive_weights.sum(axis=1) * below[:, -1])
    return values


def _auroc_of(truth: BoolArray, scores: FloatArray, counts: FloatArray) -> FloatArray:
    return weighted_auroc(scores[truth], scores[~truth], counts[:, truth], counts[:, ~truth])


def _best_share(
    truth: BoolArray, scores: FloatArray, weights: npt.ArrayLike | None, kept: float, name: str
) -> Value:
    """Find the largest share of `truth` called while `kept` of the others are not."""
    if not 0 <= kept <= 1:
        raise ValueError(f"{name} is {kept}; give a share from 0 to 1")

    def of_counts(counts: FloatArray) -> FloatArray:
        hits, false_alarms = _called(truth, scores, counts)
        hits, false_alarms = np.cumsum(hits, axis=1), np.cumsum(false_alarms, axis=1)
        positives, negatives = hits[:, -1], false_alarms[:, -1]
        allowed = (1 - kept + _ROUNDING) * negatives
        found = np.where(false_alarms <= allowed[:, None], hits, 0).max(axis=1)
        return np.where(negatives > 0, found / positives, np.nan)

    return over_resamples(
        of_counts, weights, rows=len(truth), undefined=_needs_both(f"the best at a given {name}")
    )


def _average_precision_of(truth: BoolArray, scores: FloatArray, counts: FloatArray) -> FloatArray:
    hits, false_alarms = _called(truth, scores, counts)
    found = np.cumsum(hits, axis=1)
    called = np.cumsum(false_alarms, axis=1)
    some_negative = called[:, -1] > 0
    called += found
    # Nobody has been called yet where the first scores were not drawn; nothing is added there.
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    summed = np.einsum("rg,rg->r", hits, precision) / found[:, -1]
    return np.where(some_negative, summed, np.nan)


def _called(
    truth: BoolArray, scores: FloatArray, counts: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Sum the counts of both outcomes per distinct score, the highest first: (r, G) each."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    moved = counts[:, order]
    positive = moved * truth[order]
    negative = moved - positive
    if len(starts) == len(ranked):
        return positive, negative
    return np.add.reduceat(positive, starts, axis=1), np.add.reduceat(negative, starts, axis=1)


def _one_against_rest(
    of_counts: Callable[[BoolArray, FloatArray, FloatArray], FloatArray],
    classes: IntArray,
    probabilities: FloatArray,
    counts: FloatArray,
) -> FloatArray:
    values = np.stack(
        [of_counts(classes == k, column, counts) for k, column in enumerate(probabilities.T)]
    )
    return mean_of_defined(values)


def mean_of_defined(values: FloatArray) -> FloatArray:
    """Return the mean over the first axis of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    mean: FloatArray = np.where(defined, values, 0).sum(axis=0) / defined.sum(axis=0)
    return mean


def _checked(outcome: npt.ArrayLike, score: npt.ArrayLike) -> tuple[BoolArray, FloatArray]:
    scores = as_finite(score, "score")
    return as_outcome(outcome, rows=len(scores)), scores


def _needs_both(what: str) -> str:
    return f"{what} is undefined: all cases that count have the same outcome; it needs both"


def _needs_two(what: str) -> str:
    return f"{what} is undefined: all cases that count are of one class; it needs two"
