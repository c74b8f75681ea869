"""The one number by which the inner validation part is watched."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bagscope.mil.evaluation.decisions import decide, quadratic_kappa
from bagscope.mil.evaluation.multilabel import macro
from bagscope.mil.evaluation.ranking import auroc, binary_auroc
from bagscope.mil.evaluation.regression import r2
from bagscope.mil.evaluation.survival import concordance
from bagscope.mil.targets import TargetSpec

METRICS = {
    "classes": "AUROC",
    "multilabel": "macro AUROC",
    "ordinal": "quadratic κ",
    "regression": "R²",
    "survival": "C-index",
}
"""What is watched, by task."""


def metric_of(
    target: TargetSpec, values: NDArray[np.float64], predicted: NDArray[np.float64]
) -> float:
    """Return the task's metric (see `METRICS`), NaN where the labels do not define it.

    Args:
        target: the target.
        values: (n, w) labels; rows with NaN are left out.
        predicted: what the objective's `predictions` gives for the target.
    """
    known = ~np.isnan(values).any(axis=1)
    try:
        return _metric(target, values[known], predicted[known])
    except ValueError:  # one class only, no event, ...
        return math.nan


def _metric(
    target: TargetSpec, values: NDArray[np.float64], predicted: NDArray[np.float64]
) -> float:
    if target.task == "survival":
        return float(concordance(values[:, 0], values[:, 1], predicted[:, 0]))
    if target.task == "regression":
        return float(r2(values[:, 0], predicted))
    if target.task == "multilabel":
        return float(macro(binary_auroc, values, predicted))
    classes = values[:, 0].astype(int)
    if target.task == "ordinal":
        return float(quadratic_kappa(classes, decide(predicted)))
    return float(auroc(classes, predicted))
