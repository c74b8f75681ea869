"""What every metric takes: arrays that were looked at, and counts that say how often a row counts.

A metric has one form for three uses. Without `weights` each row counts once; with counts of shape
(n,) a row counts as if it were repeated; with counts of shape (R, n), one row for each resample of
a bootstrap, all R values come from the same few array operations. A value that does not exist
raises ValueError in the first two uses and is NaN in the third, where some resamples are bound to
lack a class.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Value = np.float64 | FloatArray
"""One number, or (R,) numbers where the counts were (R, n)."""

_ELEMENTS_AT_ONCE = 1 << 20
_SUM_TOLERANCE = 1e-3
_OVERSHOOT = 1e-6
"""Of a probability beyond its range: the rounding of a mean in float32."""


def over_resamples(
    of_counts: Callable[[FloatArray], FloatArray],
    weights: npt.ArrayLike | None,
    *,
    rows: int,
    undefined: str,
) -> Value:
    """Evaluate a batched statistic, a piece of the resamples at a time.

    Args:
        of_counts: (r, n) counts to (r,) values, NaN where undefined.
        weights: None, (n,) or (R, n), not negative.
        rows: n.
        undefined: the sentence for a single value that does not exist.

    Raises:
        ValueError: on counts that are none, or if the single value does not exist.
    """
    counts = as_counts(weights, rows=rows)
    table = np.atleast_2d(counts)
    step = max(1, _ELEMENTS_AT_ONCE // rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.concatenate(
            [of_counts(table[start : start + step]) for start in range(0, len(table), step)]
        )
    if counts.ndim == 2:
        return values
    if np.isnan(values[0]):
        raise ValueError(undefined)
    return np.float64(values[0])


def as_counts(weights: npt.ArrayLike | None, *, rows: int) -> FloatArray:
    """Return counts (n,) or (R, n) as float64, ones for None.

    Raises:
        ValueError: on another shape, or a negative or not finite count.
    """
    counts = np.ones(rows) if weights is None else as_numbers(weights, "weights")
    if counts.ndim not in (1, 2) or counts.shape[-1] != rows or counts.size == 0:
        raise ValueError(
            f"weights have shape {counts.shape}; give ({rows},) or (resamples, {rows}), as there "
            f"are {rows} rows"
        )
    if not (counts.min() >= 0 and counts.max() < np.inf):
        raise ValueError("weights hold a negative, infinite or missing value; give counts")
    return counts


def as_numbers(values: npt.ArrayLike, name: str) -> FloatArray:
    """Return an array of any shape as float64.

    Raises:
        ValueError: if it is ragged, or holds what is no number.
    """
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no table of numbers ({error}); give numbers alone") from error


def or_none(value: float) -> float | None:
    """Return the value, or None for NaN, which JSON does not know."""
    return None if math.isnan(value) else value


def as_finite(values: npt.ArrayLike, name: str, *, rows: int | None = None) -> FloatArray:
    """Return (n,) finite numbers as float64.

    Raises:
        ValueError: if they are empty, of another shape, as many as `rows` says not, or not finite.
    """
    array = as_numbers(values, name)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; give one value for each case")
    if rows is not None and len(array) != rows:
        raise ValueError(f"{name} has {len(array)} values for {rows} cases; give one for each")
    _refuse(~np.isfinite(array), array, f"{name} holds", "give finite numbers")
    return array


def as_outcome(
    values: npt.ArrayLike, name: str = "outcome", *, rows: int | None = None
) -> BoolArray:
    """Return (n,) zeros and ones as booleans.

    Raises:
        ValueError: as `as_finite`, or if another value is among them.
    """
    array = as_finite(values, name, rows=rows)
    _refuse((array != 0) & (array != 1), array, f"{name} holds", "give 0 or 1")
    happened: BoolArray = array == 1
    return happened


def as_classes(
    values: npt.ArrayLike, name: str = "y", *, rows: int | None = None, classes: int | None = None
) -> IntArray:
    """Return (n,) class indices, from 0 to `classes` − 1.

    Raises:
        ValueError: as `as_finite`, or if a value is no such index.
    """
    array = as_finite(values, name, rows=rows)
    most = np.inf if classes is None else classes - 1
    wrong = (array != np.floor(array)) | (array < 0) | (array > most)
    limit = "0, 1, 2, …" if classes is None else f"0 to {classes - 1}"
    _refuse(wrong, array, f"{name} holds", f"give class indices, {limit}")
    return array.astype(np.int64)


def as_probability(
    values: npt.ArrayLike, name: str = "probability", *, rows: int | None = None
) -> FloatArray:
    """Return (n,) probabilities as float64.

    Raises:
        ValueError: as `as_finite`, or if a value lies outside [0, 1].
    """
    array = as_finite(values, name, rows=rows)
    _refuse(_outside(array), array, f"{name} holds", "give values from 0 to 1")
    return np.clip(array, 0, 1)


def as_distribution(values: npt.ArrayLike, name: str = "p") -> FloatArray:
    """Return (n, C) probabilities of C ≥ 2 classes as float64.

    Raises:
        ValueError: on another shape, a value outside [0, 1], or a row that does not sum to 1.
    """
    array = as_numbers(values, name)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] < 2:
        raise ValueError(
            f"{name} has shape {array.shape}; give (cases, classes) with at least two classes"
        )
    wrong = _outside(array)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} holds {array[row, column]:g} for class {column} at position {row}; give "
            "values from 0 to 1"
        )
    sums = array.sum(axis=1)
    _refuse(np.abs(sums - 1) > _SUM_TOLERANCE, sums, f"{name} has a row that sums to", "give 1")
    return np.clip(array, 0, 1)


def labels_and_distribution(y: npt.ArrayLike, p: npt.ArrayLike) -> tuple[IntArray, FloatArray]:
    """Return (n,) class indices and their (n, C) probabilities, looked at together."""
    probabilities = as_distribution(p)
    return as_classes(y, rows=len(probabilities), classes=probabilities.shape[1]), probabilities


def check_level(level: float) -> None:
    """Refuse a level of an interval that is none."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a share between 0 and 1")


def _outside(array: FloatArray) -> BoolArray:
    """Return where a value is no probability, NaN included."""
    outside: BoolArray = ~((array >= -_OVERSHOOT) & (array <= 1 + _OVERSHOOT))
    return outside


def _refuse(wrong: BoolArray, array: FloatArray, what: str, remedy: str) -> None:
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"{what} {array[first]:g} at position {first}; {remedy}")
