"""How often decisions are right: accuracy, F1, κ, sensitivity, specificity, predictive values.

`y` and `predicted` are (n,) class indices; `outcome` and `called` (n,) of 0 and 1. For the value at
a threshold, call the cases first: `called = score >= threshold`, or `decide`. `weights` and
undefined values: see `bagscope.mil.evaluation.inputs`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bagscope.mil.evaluation.inputs import (
    FloatArray,
    IntArray,
    Value,
    as_classes,
    as_counts,
    as_distribution,
    as_outcome,
    over_resamples,
)
from bagscope.mil.evaluation.ranking import mean_of_defined


def decide(p: npt.ArrayLike, *, threshold: float | None = None, positive: int = 1) -> IntArray:
    """Return the predicted class of each case, (n,), from (n, C) probabilities.

    Without a threshold it is the most probable class, the first of equals. With one, which takes
    two classes, it is `positive` where that has at least this probability.
    """
    probabilities = as_distribution(p)
    if threshold is None:
        likeliest: IntArray = np.argmax(probabilities, axis=1)
        return likeliest
    if probabilities.shape[1] != 2 or positive not in (0, 1):
        raise ValueError(
            f"a threshold divides two classes, and there are {probabilities.shape[1]} with the "
            f"positive one at {positive}; leave it out"
        )
    return np.where(probabilities[:, positive] >= threshold, positive, 1 - positive)


def confusion(
    y: npt.ArrayLike,
    predicted: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    classes: int | None = None,
) -> FloatArray:
    """Return counts of true class by predicted class: (C, C), or (R, C, C) for (R, n) weights.

    C is `classes`, or one more than the highest index there is.
    """
    truth = as_classes(y, classes=classes)
    guess = as_classes(predicted, "predicted", rows=len(truth), classes=classes)
    size = classes or _size(truth, guess)
    counts = as_counts(weights, rows=len(truth))
    return _table(truth, guess, counts, size)


def accuracy(
    y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return the share of cases whose class is predicted."""
    return _of_table(y, predicted, weights, _accuracy, "accuracy is undefined: no case counts")


def balanced_accuracy(
    y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return the mean over classes of the share that is found; it needs two classes.

    A class without a case is left out of the mean, in a resample too.
    """
    undefined = "balanced accuracy is undefined: all cases are of one class; it needs two"
    return _of_table(y, predicted, weights, _balanced_accuracy, undefined)


def macro_f1(
    y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return the mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    A class that no case has and none is predicted to have is left out of the mean.
    """
    return _of_table(y, predicted, weights, _macro_f1, "F1 is undefined: no case counts")


def cohen_kappa(
    y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return Cohen's κ, the agreement beyond that of chance."""
    return _of_table(y, predicted, weights, lambda table: _kappa(table, power=0), _NO_KAPPA)


def quadratic_kappa(
    y: npt.ArrayLike, predicted: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return κ with disagreement counted as the squared distance of the indices: ordered classes.

    The indices of `y` must be the ranks, with no rank left out.
    """
    return _of_table(y, predicted, weights, lambda table: _kappa(table, power=2), _NO_KAPPA)


def sensitivity(
    outcome: npt.ArrayLike, called: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return TP / (TP + FN)."""
    return _share(outcome, called, weights, (1, 1), _row, "sensitivity", "no case is positive")


def specificity(
    outcome: npt.ArrayLike, called: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return TN / (TN + FP)."""
    return _share(outcome, called, weights, (0, 0), _row, "specificity", "no case is negative")


def positive_predictive_value(
    outcome: npt.ArrayLike, called: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return TP / (TP + FP), at the prevalence of these cases."""
    what = "the positive predictive value"
    return _share(outcome, called, weights, (1, 1), _column, what, "no case is called positive")


def negative_predictive_value(
    outcome: npt.ArrayLike, called: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return TN / (TN + FN), at the prevalence of these cases."""
    what = "the negative predictive value"
    return _share(outcome, called, weights, (0, 0), _column, what, "no case is called negative")


def f1(
    outcome: npt.ArrayLike, called: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Value:
    """Return F1 of the positive outcome, 2 TP / (2 TP + FP + FN)."""
    truth = as_outcome(outcome)
    calls = as_outcome(called, "called", rows=len(truth))
    undefined = "F1 is undefined: no case is positive and none is called positive"
    return _of_table(truth, calls, weights, lambda t: _f1(t)[:, 1], undefined, classes=2)


_NO_KAPPA = "κ is undefined: all cases have one class and are predicted to; it needs two"


def _of_table(
    y: npt.ArrayLike,
    predicted: npt.ArrayLike,
    weights: npt.ArrayLike | None,
    of_table: Callable[[FloatArray], FloatArray],
    undefined: str,
    *,
    classes: int | None = None,
) -> Value:
    truth = as_classes(y)
    guess = as_classes(predicted, "predicted", rows=len(truth))
    size = classes or _size(truth, guess)
    return over_resamples(
        lambda counts: of_table(_table(truth, guess, counts, size)),
        weights,
        rows=len(truth),
        undefined=undefined,
    )


def _size(truth: IntArray, guess: IntArray) -> int:
    return int(max(truth.max(), guess.max())) + 1


def _table(truth: IntArray, guess: IntArray, counts: FloatArray, size: int) -> FloatArray:
    cells, which = np.unique(truth * size + guess, return_inverse=True)
    table = np.zeros((*counts.shape[:-1], size * size))
    table[..., cells] = counts @ np.eye(len(cells))[which]
    return table.reshape(*counts.shape[:-1], size, size)


def _accuracy(table: FloatArray) -> FloatArray:
    right: FloatArray = np.einsum("rcc->r", table) / table.sum(axis=(1, 2))
    return right


def _balanced_accuracy(table: FloatArray) -> FloatArray:
    cases = table.sum(axis=2)
    found = mean_of_defined((np.einsum("rcc->rc", table) / cases).T)
    return np.where((cases > 0).sum(axis=1) > 1, found, np.nan)


def _f1(table: FloatArray) -> FloatArray:
    values: FloatArray = 2 * np.einsum("rcc->rc", table) / (table.sum(axis=1) + table.sum(axis=2))
    return values


def _macro_f1(table: FloatArray) -> FloatArray:
    return mean_of_defined(_f1(table).T)


def _kappa(table: FloatArray, *, power: int) -> FloatArray:
    ranks = np.arange(table.shape[1])
    apart = np.abs(ranks[:, None] - ranks)
    cost = (apart > 0).astype(np.float64) if power == 0 else apart.astype(np.float64) ** power
    total = table.sum(axis=(1, 2))
    seen = np.einsum("rij,ij->r", table, cost)
    by_chance = np.einsum("ri,rj,ij->r", table.sum(axis=2), table.sum(axis=1), cost) / total
    values: FloatArray = 1 - seen / by_chance
    return values


def _row(table: FloatArray, k: int) -> FloatArray:
    cases: FloatArray = table[:, k, :].sum(axis=1)
    return cases


def _column(table: FloatArray, k: int) -> FloatArray:
    cases: FloatArray = table[:, :, k].sum(axis=1)
    return cases


def _share(
    outcome: npt.ArrayLike,
    called: npt.ArrayLike,
    weights: npt.ArrayLike | None,
    cell: tuple[int, int],
    of_which: Callable[[FloatArray, int], FloatArray],
    what: str,
    lacks: str,
) -> Value:
    truth = as_outcome(outcome)
    calls = as_outcome(called, "called", rows=len(truth))
    return _of_table(
        truth,
        calls,
        weights,
        lambda table: table[:, cell[0], cell[1]] / of_which(table, cell[0]),
        f"{what} is undefined: {lacks}",
        classes=2,
    )
