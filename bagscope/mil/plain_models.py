"""Models of one vector per case, as simple as they come: what an aggregator has to beat.

linear       logistic regression, ridge regression, Cox regression: each with a ridge penalty
neighbours   the mean label of the nearest training cases; not of survival

Vectors are standardised by the training cases. How strong the penalty is, or how many neighbours
count, is chosen by cross-validation over the training patients alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from bagscope.mil.evaluation.inputs import FloatArray, IntArray
from bagscope.mil.evaluation.survival import concordance
from bagscope.mil.targets import TargetSpec

Kind = Literal["linear", "neighbours"]
Strength = float
Fit = Callable[[TargetSpec, FloatArray, FloatArray, FloatArray, Strength], FloatArray]

STRENGTHS: Mapping[Kind, tuple[Strength, ...]] = {
    "linear": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "neighbours": (1, 3, 5, 10, 20),
}
"""Of linear models the inverse of the penalty, of neighbours how many."""
_INNER_FOLDS = 5
_USUAL: Mapping[Kind, Strength] = {"linear": 1.0, "neighbours": 5}
"""Where there are too few patients to choose by."""
_ROUNDS = 2000
_SMALLEST = 1e-9


def predict(
    kind: Kind,
    target: TargetSpec,
    x: FloatArray,
    y: FloatArray,
    patients: npt.NDArray[np.str_],
    x_test: FloatArray,
    *,
    strength: Strength | None = None,
) -> FloatArray:
    """Fit on training cases and return predictions (m, k) of test cases.

    Args:
        kind: of model.
        target: whose task decides what is fitted.
        x: (n, D) vectors.
        y: (n, w) labels, NaN only among several labels.
        patients: (n,) whose cases they are.
        x_test: (m, D).
        strength: of the penalty; chosen where not given.
    """
    # Hundreds of small fits: threads would spend their time waiting for each other.
    with threadpool_limits(1):
        if strength is None:
            strength = _choose(kind, target, x, y, patients)
        return _FITS[kind](target, *_prepared(x, x_test, y), strength)


def constant(target: TargetSpec, y: FloatArray, cases: int) -> FloatArray:
    """Return the same answer for all: the classes' shares, the median, or one risk; (cases, k)."""
    if target.task == "survival":
        return np.zeros((cases, 1))
    if target.task == "regression":
        return np.full((cases, 1), np.median(y))
    if target.task == "multilabel":
        known = ~np.isnan(y)
        shares = np.where(known, y, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    else:
        shares = np.bincount(y[:, 0].astype(np.int64), minlength=len(target.classes)) / len(y)
    return np.tile(shares, (cases, 1))


def cox(x: FloatArray, time: FloatArray, event: FloatArray, strength: Strength) -> FloatArray:
    """Return the coefficients (D,) of a Cox regression: Breslow's ties, penalty |w|² / 2 strength.

    minimises  −Σ_{i: event} [θ_i − log Σ_{j: t_j ≥ t_i} exp θ_j] + |w|² / (2 strength),  θ = x w
    """
    order = np.argsort(-time, kind="stable")
    x, time, died = x[order], time[order], event[order] > 0
    # Times fall, so a risk set is all rows up to the last one with the same time.
    last = np.searchsorted(-time, -time, side="right") - 1

    def loss(w: FloatArray) -> tuple[float, FloatArray]:
        theta = x @ w
        log_at_risk = np.logaddexp.accumulate(theta)[last]
        value = float((log_at_risk - theta)[died].sum() + w @ w / (2 * strength))
        # Row j is at risk at every event that comes no later: those from its own ties onwards.
        own = np.where(died, -log_at_risk, -np.inf)
        later = np.logaddexp.accumulate(own[::-1])[::-1]
        first = np.searchsorted(-time, -time, side="left")
        slope = np.exp(theta + later[first]) - died
        return value, x.T @ slope + w / strength

    found = optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B")
    coefficients: FloatArray = found.x
    return coefficients


def _prepared(
    x: FloatArray, x_test: FloatArray, y: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Standardise; turn wide vectors onto the training cases' own axes, which loses nothing.

    A ridge penalty knows no direction, and its coefficients lie in the span of the training cases.
    """
    mean, std = x.mean(axis=0), x.std(axis=0)
    factor = np.where(std > _SMALLEST, 1 / np.maximum(std, _SMALLEST), 0)
    train, test = (x - mean) * factor, (x_test - mean) * factor
    if train.shape[1] > train.shape[0]:
        axes = np.linalg.svd(train, full_matrices=False)[2]
        train, test = train @ axes.T, test @ axes.T
    return train, test, y


def _linear(
    target: TargetSpec, x: FloatArray, x_test: FloatArray, y: FloatArray, strength: Strength
) -> FloatArray:
    if target.task == "survival":
        return (x_test @ cox(x, y[:, 0], y[:, 1], strength))[:, None]
    if target.task == "regression":
        middle = y.mean()
        gram = x.T @ x + np.eye(x.shape[1]) / strength
        values: FloatArray = middle + x_test @ np.linalg.solve(gram, x.T @ (y - middle))
        return values
    if target.task == "multilabel":
        columns = [
            _logistic(x[known], labels[known], x_test, 2, strength)[:, 1]
            for labels in y.T
            for known in [~np.isnan(labels)]
        ]
        return np.stack(columns, axis=1)
    return _logistic(x, y[:, 0], x_test, len(target.classes), strength)


def _logistic(
    x: FloatArray, y: FloatArray, x_test: FloatArray, classes: int, strength: Strength
) -> FloatArray:
    chances = np.zeros((len(x_test), classes))
    seen = np.unique(y).astype(np.int64)
    if len(seen) < 2:
        chances[:, seen] = 1.0
        return chances
    model = LogisticRegression(C=strength, max_iter=_ROUNDS)
    with warnings.catch_warnings():
        # A baseline that stops a little early is a baseline still.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y.astype(np.int64))
    chances[:, seen] = model.predict_proba(x_test)
    return chances


def _neighbours(
    target: TargetSpec, x: FloatArray, x_test: FloatArray, y: FloatArray, strength: Strength
) -> FloatArray:
    labels = y
    if target.is_categorical:
        labels = np.eye(len(target.classes))[y[:, 0].astype(np.int64)]
    squares = (x_test**2).sum(1)[:, None] + (x**2).sum(1) - 2 * x_test @ x.T
    nearest = np.argsort(squares, axis=1, kind="stable")[:, : int(strength)]
    found = labels[nearest]
    known = ~np.isnan(found)
    mean: FloatArray = np.where(known, found, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return mean


_FITS: Mapping[Kind, Fit] = {"linear": _linear, "neighbours": _neighbours}


def _choose(
    kind: Kind,
    target: TargetSpec,
    x: FloatArray,
    y: FloatArray,
    patients: npt.NDArray[np.str_],
) -> Strength:
    """Return the strength with the least loss on patients that were held out; the weaker of two."""
    strengths = STRENGTHS[kind]
    losses: list[list[float]] = []
    for train, test in _inner_folds(target, y, patients):
        parts = _prepared(x[train], x[test], y[train])
        losses.append(
            [_loss(target, _FITS[kind](target, *parts, one), y[test]) for one in strengths]
        )
    table = np.array(losses)
    usable = table[~np.isnan(table).any(axis=1)] if len(table) else table
    if not len(usable):
        return _USUAL[kind]
    return strengths[int(np.argmin(usable.mean(axis=0)))]


def _inner_folds(
    target: TargetSpec, y: FloatArray, patients: npt.NDArray[np.str_]
) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield folds of the training patients; none where a class has too few of them."""
    if target.is_categorical or target.task == "survival":
        strata = y[:, -1].astype(np.int64)
        fewest = min(len(np.unique(patients[strata == k])) for k in np.unique(strata))
        folds = min(_INNER_FOLDS, fewest)
        if folds > 1:
            split = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
            yield from split.split(strata, strata, patients)
        return
    folds = min(_INNER_FOLDS, len(np.unique(patients)))
    if folds > 1:
        yield from GroupKFold(folds, shuffle=True, random_state=0).split(y, groups=patients)


def _loss(target: TargetSpec, predicted: FloatArray, y: FloatArray) -> float:
    if target.task == "survival":
        try:
            return -float(concordance(y[:, 0], y[:, 1], predicted[:, 0]))
        except ValueError:  # nobody to compare with in this small part
            return float("nan")
    if target.task == "regression":
        return float(np.mean((predicted - y) ** 2))
    if target.task == "multilabel":
        given = np.where(y == 1, predicted, 1 - predicted)[~np.isnan(y)]
    else:
        given = predicted[np.arange(len(y)), y[:, 0].astype(np.int64)]
    return float(-np.log(np.maximum(given, _floor(predicted))).mean())


def _floor(predicted: FloatArray) -> float:
    """Return what a chance of zero counts as, so that one miss does not decide the choice."""
    return 1 / (4 * max(1, len(predicted)))
