"""Probabilities that mean what they say, and thresholds: both fitted on inner validation cases.

Either needs enough patients; `calibrate` and `choose_threshold` return what they fitted, or a
`Skipped` that says why not. All of it goes to JSON and back, as plain dicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from bagscope.mil.evaluation.inputs import (
    BoolArray,
    FloatArray,
    as_classes,
    as_finite,
    as_numbers,
    as_outcome,
    as_probability,
)

FEWEST_PATIENTS = 20
"""Of each class; with fewer, what is fitted is mostly their noise."""
COLDEST, HOTTEST = 0.05, 20.0

CalibrationMethod = Literal["temperature", "platt"]
Rule = Literal["youden", "sensitivity", "specificity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Temperature:
    """p = softmax(logits / temperature), which changes no order of the classes of a case.

    Attributes:
        temperature: above 1 it takes confidence away.
        loss_before: mean log loss, in nats, of the cases it was fitted on, at temperature 1.
        loss_after: the same at the fitted one.
    """

    temperature: float
    loss_before: float
    loss_after: float

    def apply(self, logits: npt.ArrayLike) -> FloatArray:
        """Return probabilities (n, C) of logits (n, C)."""
        scaled = _as_logits(logits) / self.temperature
        probabilities: FloatArray = special.softmax(scaled, axis=1)
        return probabilities

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and which kind it is."""
        return {"kind": "temperature", **asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Platt:
    """p = σ(slope · logit + offset), of one outcome.

    Attributes:
        slope: of the logit.
        offset: added.
        loss_before: mean log loss, in nats, of the cases it was fitted on, at slope 1, offset 0.
        loss_after: the same as fitted.
    """

    slope: float
    offset: float
    loss_before: float
    loss_after: float

    def apply_binary(self, logit: npt.ArrayLike) -> FloatArray:
        """Return the probabilities of 1, (n,), of logits (n,)."""
        probabilities: FloatArray = special.expit(
            self.slope * as_finite(logit, "logit") + self.offset
        )
        return probabilities

    def apply(self, logits: npt.ArrayLike) -> FloatArray:
        """Return probabilities (n, 2) of the logits of two classes, (n, 2)."""
        positive = self.apply_binary(_difference(_as_logits(logits)))
        return np.stack([1 - positive, positive], axis=1)

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and which kind it is."""
        return {"kind": "platt", **asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """The probability from which on a case is called positive.

    Attributes:
        value: call `probability >= value`. Halfway between the probabilities of two cases; 0 calls
            everybody, and one above all of them nobody.
        rule: how it was chosen.
        target: the sensitivity or specificity asked for; None for Youden's.
        sensitivity: on the cases that it was chosen on, and so on the bright side.
        specificity: likewise.
    """

    value: float
    rule: Rule
    target: float | None
    sensitivity: float
    specificity: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and which kind it is."""
        return {"kind": "threshold", **asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """What was not fitted, and why."""

    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and which kind it is."""
        return {"kind": "skipped", **asdict(self)}


Fitted = Temperature | Platt | Threshold | Skipped
_KINDS: Mapping[str, type[Fitted]] = {
    "temperature": Temperature,
    "platt": Platt,
    "threshold": Threshold,
    "skipped": Skipped,
}


def from_json(record: Mapping[str, Any]) -> Fitted:
    """Return what `to_json` made a dict of.

    Raises:
        ValueError: on an unknown kind, or fields that are not its own.
    """
    kind = str(record.get("kind"))
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(_KINDS)}")
    fields = {key: value for key, value in record.items() if key != "kind"}
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"a {kind} cannot have the fields {sorted(fields)}") from error


def calibrate(
    logits: npt.ArrayLike,
    y: npt.ArrayLike,
    patients: npt.ArrayLike,
    *,
    method: CalibrationMethod = "temperature",
    fewest: int = FEWEST_PATIENTS,
    names: Sequence[str] | None = None,
) -> Temperature | Platt | Skipped:
    """Fit a calibration of (n, C) logits to (n,) classes, if each class has patients enough.

    Args:
        logits: of inner validation cases, before the softmax.
        y: class indices.
        patients: (n,) the patient of each case; a class is as large as its patients are many.
        method: "platt" takes two classes.
        fewest: patients that each of the C classes must have.
        names: of the classes, for the reason not to; their numbers if not given.

    Raises:
        ValueError: on bad arrays, or "platt" for more than two classes.
    """
    scores = _as_logits(logits)
    classes = as_classes(y, rows=len(scores), classes=scores.shape[1])
    if method not in ("temperature", "platt"):
        raise ValueError(f"method is {method!r}; expected 'temperature' or 'platt'")
    if method == "platt" and scores.shape[1] != 2:
        raise ValueError(
            f"platt takes two classes, and there are {scores.shape[1]}; use temperature"
        )
    skipped = too_few_patients(
        classes, patients, classes=scores.shape[1], fewest=fewest, names=names
    )
    if skipped:
        return skipped
    if method == "platt":
        return fit_platt(_difference(scores), classes)
    return fit_temperature(scores, classes)


def too_few_patients(
    y: npt.ArrayLike,
    patients: npt.ArrayLike,
    *,
    classes: int,
    fewest: int = FEWEST_PATIENTS,
    names: Sequence[str] | None = None,
) -> Skipped | None:
    """Return the reason not to fit on these cases, or None if each class has patients enough."""
    truth = as_classes(y, classes=classes)
    owners = np.asarray(patients)
    if owners.shape != truth.shape:
        raise ValueError(
            f"patients have shape {owners.shape} for {len(truth)} cases; name each one's"
        )
    numbers = [len(np.unique(owners[truth == k])) for k in range(classes)]
    fewer = int(np.argmin(numbers))
    if numbers[fewer] >= fewest:
        return None
    return Skipped(
        reason=(
            f"class {names[fewer] if names else fewer} has {numbers[fewer]} validation patients, "
            f"and {fewest} of each class are needed"
        )
    )


def fit_temperature(logits: npt.ArrayLike, y: npt.ArrayLike) -> Temperature:
    """Fit softmax(logits / T) to (n,) classes by maximum likelihood.

    The loss is convex in 1 / T, and T the root of its slope, between 0.05 and 20: an end of that
    range is returned if the loss still falls there, as it does at 0.05 where all cases are right.
    """
    scores = _as_logits(logits)
    classes = as_classes(y, rows=len(scores), classes=scores.shape[1])
    scores = scores - scores.max(axis=1, keepdims=True)
    given = scores[np.arange(len(classes)), classes]

    def loss(sharpness: float) -> float:
        normaliser = special.logsumexp(sharpness * scores, axis=1)
        return float(np.mean(normaliser - sharpness * given))

    def slope(log_sharpness: float) -> float:
        weight = special.softmax(math.exp(log_sharpness) * scores, axis=1)
        return float(np.mean((weight * scores).sum(axis=1) - given))

    low, high = -math.log(HOTTEST), -math.log(COLDEST)
    if slope(low) >= 0:
        found = low
    elif slope(high) <= 0:
        found = high
    else:
        found = float(optimize.brentq(slope, low, high, xtol=1e-10))
    sharpness = math.exp(found)
    return Temperature(temperature=1 / sharpness, loss_before=loss(1.0), loss_after=loss(sharpness))


def fit_platt(logit: npt.ArrayLike, outcome: npt.ArrayLike) -> Platt:
    """Fit σ(slope · logit + offset) to (n,) outcomes by maximum likelihood (Platt 1999).

    As Platt has it, the targets are (N₊ + 1) / (N₊ + 2) and 1 / (N₋ + 2) in place of 1 and 0, which
    keeps the slope finite where the outcomes are perfectly apart.

    Raises:
        ValueError: if the logits are all the same or the outcomes are.
    """
    scores = as_finite(logit, "logit")
    truth = as_outcome(outcome, rows=len(scores))
    positives = int(truth.sum())
    if positives in (0, len(truth)):
        raise ValueError("Platt scaling needs both outcomes, and all cases have the same")
    middle, spread = float(scores.mean()), float(scores.std())
    if not spread > 0:
        raise ValueError(f"Platt scaling needs logits that differ, and all are {scores[0]:g}")
    standard = (scores - middle) / spread
    target = np.where(truth, (positives + 1) / (positives + 2), 1 / (len(truth) - positives + 2))

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        value = parameters[0] * standard + parameters[1]
        away = special.expit(value) - target
        gradient = np.array([np.mean(away * standard), np.mean(away)])
        return float(np.mean(np.logaddexp(0, value) - target * value)), gradient

    fitted = optimize.minimize(
        loss, np.array([1.0, 0.0]), jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    slope = float(fitted.x[0]) / spread
    offset = float(fitted.x[1]) - slope * middle
    return Platt(
        slope=slope,
        offset=offset,
        loss_before=_binary_loss(scores, truth),
        loss_after=_binary_loss(slope * scores + offset, truth),
    )


def choose_threshold(
    outcome: npt.ArrayLike,
    probability: npt.ArrayLike,
    patients: npt.ArrayLike,
    *,
    rule: Rule = "youden",
    target: float | None = None,
    fewest: int = FEWEST_PATIENTS,
    names: Sequence[str] | None = None,
) -> Threshold | Skipped:
    """Choose a threshold on (n,) validation probabilities, if there are patients enough.

    Args:
        outcome: of 0 and 1.
        probability: of 1, calibrated if predictions will be.
        patients: (n,) the patient of each case.
        rule: "youden" maximises sensitivity + specificity, the lowest of equals; "sensitivity" is
            the highest threshold that has the target, "specificity" the lowest.
        target: the sensitivity or specificity to have, 0 to 1.
        fewest: patients that either outcome must have, at least one.
        names: of the outcomes, for the reason not to; 0 and 1 if not given.
    """
    chances = as_probability(probability)
    truth = as_outcome(outcome, rows=len(chances))
    if rule not in ("youden", "sensitivity", "specificity"):
        raise ValueError(f"rule is {rule!r}; expected 'youden', 'sensitivity' or 'specificity'")
    if (rule == "youden") != (target is None) or (target is not None and not 0 <= target <= 1):
        raise ValueError(
            f"the rule is {rule!r} and the target {target}; give a share from 0 to 1 with "
            "'sensitivity' or 'specificity', and none with 'youden'"
        )
    skipped = too_few_patients(truth, patients, classes=2, fewest=max(1, fewest), names=names)
    if skipped:
        return skipped
    values, found, spared = _every_threshold(truth, chances)
    if target is None:
        chosen = int(np.argmax(np.round(found + spared, 12)))
    elif rule == "sensitivity":
        chosen = int(np.flatnonzero(found >= target - 1e-12)[-1])
    else:
        chosen = int(np.flatnonzero(spared >= target - 1e-12)[0])
    return Threshold(
        value=float(values[chosen]),
        rule=rule,
        target=target,
        sensitivity=float(found[chosen]),
        specificity=float(spared[chosen]),
    )


def _every_threshold(
    truth: BoolArray, chances: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return thresholds, ascending, from all called to none, with sensitivity and specificity."""
    distinct, place = np.unique(chances, return_inverse=True)
    middle = (distinct[:-1] + distinct[1:]) / 2
    # Between neighbouring floats the middle is the lower one, which it would call positive.
    middle = np.where(middle > distinct[:-1], middle, distinct[1:])
    nobody = np.nextafter((distinct[-1] + 1) / 2, np.inf)
    values = np.concatenate(([0.0], middle, [nobody]))
    missed = np.concatenate(([0.0], np.cumsum(np.bincount(place, weights=truth))))
    spared = np.concatenate(([0.0], np.cumsum(np.bincount(place, weights=~truth))))
    return values, 1 - missed / missed[-1], spared / spared[-1]


def _binary_loss(logit: FloatArray, truth: BoolArray) -> float:
    return float(np.mean(np.logaddexp(0, np.where(truth, -logit, logit))))


def _difference(logits: FloatArray) -> FloatArray:
    if logits.shape[1] != 2:
        raise ValueError(f"Platt scaling takes two classes, and there are {logits.shape[1]}")
    apart: FloatArray = logits[:, 1] - logits[:, 0]
    return apart


def _as_logits(logits: npt.ArrayLike) -> FloatArray:
    array = as_numbers(logits, "logits")
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] < 2:
        raise ValueError(f"logits have shape {array.shape}; give (cases, classes), two or more")
    as_finite(array.ravel(), "logits")
    return array
