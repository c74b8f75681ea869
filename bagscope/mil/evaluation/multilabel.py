"""Several labels at once: any metric of one outcome, label by label and in the mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bagscope.mil.evaluation.inputs import FloatArray, Value, as_counts, as_numbers, over_resamples
from bagscope.mil.evaluation.ranking import mean_of_defined

BinaryMetric = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], Value]
"""Takes (n,) outcomes, (n,) scores, probabilities or calls, and (R, n) counts."""


def per_label(
    metric: BinaryMetric,
    outcomes: npt.ArrayLike,
    scores: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
) -> FloatArray:
    """Return a metric of each label: (L,), or (R, L) for (R, n) weights.

    A label that a case lacks (NaN) leaves the case out for this label only. A label whose metric is
    undefined, such as AUROC where no case has it, gives NaN.

    Args:
        metric: such as `binary_auroc`; fix its options with `functools.partial`.
        outcomes: (n, L) of 0, 1 and NaN.
        scores: (n, L), what the metric takes.
        weights: None, (n,) or (R, n) counts.
    """
    truth, given = _checked(outcomes, scores)
    cases, labels = truth.shape
    counts = as_counts(weights, rows=cases)
    table = np.atleast_2d(counts)
    values = np.full((len(table), labels), np.nan)
    for label in range(labels):
        known = ~np.isnan(truth[:, label])
        if known.any():
            column = truth[known, label], given[known, label]
            values[:, label] = metric(*column, table[:, known])
    return values if counts.ndim == 2 else values[0]


def macro(
    metric: BinaryMetric,
    outcomes: npt.ArrayLike,
    scores: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
) -> Value:
    """Return the mean over labels of a metric; a label where it is undefined is left out.

    Arguments as of `per_label`.
    """
    truth, given = _checked(outcomes, scores)
    return over_resamples(
        lambda counts: mean_of_defined(per_label(metric, truth, given, counts).T),
        weights,
        rows=len(truth),
        undefined="the mean over labels is undefined, as the metric is for each of them",
    )


def _checked(outcomes: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    truth = as_numbers(outcomes, "outcomes")
    given = as_numbers(scores, "scores")
    if truth.ndim != 2 or truth.size == 0 or truth.shape != given.shape:
        raise ValueError(
            f"outcomes have shape {truth.shape} and scores {given.shape}; give (cases, labels) for "
            "both"
        )
    return truth, given
