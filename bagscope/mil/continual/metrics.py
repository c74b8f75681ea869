"""What is left of earlier tasks: metrics of a matrix A (T, T).

A[t, j] is what the model says of task j's test cases after it has learnt tasks 0 to t; NaN for
tasks that it has not learnt yet (j > t), and where a metric is not defined.

    average    = mean_j A[T−1, j]
    learning   = mean_t A[t, t]                                as each task was just learnt
    forgetting = mean_{j<T−1} max_{j≤t<T−1} (A[t, j] − A[T−1, j])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bagscope.mil.evaluation.ranking import binary_auroc


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What a matrix comes to; NaN where it says nothing."""

    average: float
    learning: float
    forgetting: float


def kept(matrix: ArrayLike) -> Kept:
    """Return the three numbers of a matrix (T, T).

    Raises:
        ValueError: it is not square.
    """
    found = np.asarray(matrix, np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ValueError(f"the matrix is {found.shape}; a row and a column per task are needed")
    last = len(found) - 1
    best = [_mean_or_max(found[task:last, task], np.max) for task in range(last)]
    return Kept(
        average=_mean_or_max(found[last], np.mean),
        learning=_mean_or_max(np.diagonal(found), np.mean),
        forgetting=_mean_or_max(np.array(best) - found[last, :last], np.mean),
    )


def accuracy(probabilities: NDArray[np.float64], classes: NDArray[np.int64]) -> float:
    """Return the share of bags whose likeliest class (n, C) is theirs (n,)."""
    return float((probabilities.argmax(1) == classes).mean()) if len(classes) else np.nan


def localisation(scores: list[NDArray[np.float64]], truth: list[NDArray[np.bool_]]) -> float:
    """Return the mean over bags of the tiles' AUROC; NaN where no bag has tiles of both kinds.

    Args:
        scores: (n,) of each bag.
        truth: (n,) whether each tile carries what the bag's class stands for.
    """
    found = [
        float(binary_auroc(one, score))
        for score, one in zip(scores, truth, strict=True)
        if one.any() and not one.all()
    ]
    return float(np.mean(found)) if found else np.nan


def _mean_or_max(values: NDArray[np.float64], how: object) -> float:
    there = values[~np.isnan(values)]
    return float(how(there)) if len(there) else np.nan  # type: ignore[operator]
