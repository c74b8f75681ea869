"""The arrays behind the figures: ROC, precision and recall, reliability, decision curve.

The confusion matrix is `bagscope.mil.evaluation.decisions.confusion`, the survival curve
`bagscope.mil.evaluation.kaplan_meier.kaplan_meier`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from bagscope.mil.evaluation.inputs import (
    BoolArray,
    FloatArray,
    IntArray,
    as_finite,
    as_outcome,
    as_probability,
    check_level,
)
from bagscope.mil.evaluation.probabilities import Binning, bins_of_mass, bins_of_width


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RocCurve:
    """From calling nobody positive to calling all, (G + 1,) each, one point per distinct score.

    Attributes:
        false_positive_rate: 1 − specificity.
        true_positive_rate: sensitivity.
        threshold: call `score >= threshold`; the first is infinite.
    """

    false_positive_rate: FloatArray
    true_positive_rate: FloatArray
    threshold: FloatArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PrecisionRecallCurve:
    """From calling the highest score positive to calling all, (G,) each.

    Attributes:
        recall: sensitivity.
        precision: positive predictive value. Draw it as steps: between two points the value of the
            later one holds, whose sum is the average precision.
        threshold: call `score >= threshold`.
        prevalence: the precision of chance.
    """

    recall: FloatArray
    precision: FloatArray
    threshold: FloatArray
    prevalence: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reliability:
    """Predicted probabilities beside what happened, (B,) each; bins without a case are left out.

    Attributes:
        predicted: mean probability of the bin's cases.
        observed: share of them with outcome 1.
        low: lower end of Wilson's interval of that share, which takes cases as independent.
        high: its upper end.
        cases: how many.
    """

    predicted: FloatArray
    observed: FloatArray
    low: FloatArray
    high: FloatArray
    cases: IntArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecisionCurve:
    """Net benefit TP / n − FP / n · t / (1 − t) of acting from threshold t on, (T,) each.

    Attributes:
        threshold: probabilities t from which a patient would be treated.
        model: of treating those at or above t.
        everyone: of treating all.
        nobody: of treating none: 0.
    """

    threshold: FloatArray
    model: FloatArray
    everyone: FloatArray
    nobody: FloatArray


def roc_curve(outcome: npt.ArrayLike, score: npt.ArrayLike) -> RocCurve:
    """Return the ROC curve of (n,) outcomes and scores; it needs both outcomes."""
    truth, scores = _both_outcomes(outcome, score, "the ROC curve")
    threshold, hits, false_alarms = _from_the_top(truth, scores)
    return RocCurve(
        false_positive_rate=np.concatenate(([0.0], false_alarms / false_alarms[-1])),
        true_positive_rate=np.concatenate(([0.0], hits / hits[-1])),
        threshold=np.concatenate(([np.inf], threshold)),
    )


def precision_recall_curve(outcome: npt.ArrayLike, score: npt.ArrayLike) -> PrecisionRecallCurve:
    """Return precision against recall of (n,) outcomes and scores; it needs both outcomes."""
    truth, scores = _both_outcomes(outcome, score, "the precision–recall curve")
    threshold, hits, false_alarms = _from_the_top(truth, scores)
    return PrecisionRecallCurve(
        recall=hits / hits[-1],
        precision=hits / (hits + false_alarms),
        threshold=threshold,
        prevalence=float(truth.mean()),
    )


def reliability(
    outcome: npt.ArrayLike,
    probability: npt.ArrayLike,
    *,
    bins: int = 10,
    binning: Binning = "width",
    level: float = 0.95,
) -> Reliability:
    """Return the reliability diagram of (n,) outcomes and probabilities of 1.

    For the top class of several, give whether it was right and its probability. Bins are those of
    `bagscope.mil.evaluation.probabilities.binary_ece`.
    """
    chances = as_probability(probability)
    truth = as_outcome(outcome, rows=len(chances))
    check_level(level)
    if bins < 1 or binning not in ("width", "mass"):
        raise ValueError(f"{bins} bins of equal {binning!r}; give 1 or more, of 'width' or 'mass'")
    if binning == "width":
        place = bins_of_width(chances, bins)
    else:
        distinct, group = np.unique(chances, return_inverse=True)
        cases_of_each = np.bincount(group, minlength=len(distinct)).astype(np.float64)
        place = bins_of_mass(cases_of_each[None], bins)[0][group]
    _, member = np.unique(place, return_inverse=True)
    cases = np.bincount(member)
    observed = np.bincount(member, weights=truth) / cases
    low, high = _wilson(observed, cases, level)
    return Reliability(
        predicted=np.bincount(member, weights=chances) / cases,
        observed=observed,
        low=low,
        high=high,
        cases=cases,
    )


def decision_curve(
    outcome: npt.ArrayLike, probability: npt.ArrayLike, thresholds: npt.ArrayLike | None = None
) -> DecisionCurve:
    """Return net benefits of (n,) outcomes and probabilities of 1.

    Args:
        outcome: of 0 and 1.
        probability: calibrated, as a threshold on it stands for the trade of harm and benefit.
        thresholds: (T,) in [0, 1); by default 0.01 to 0.99 in steps of 0.01.
    """
    chances = as_probability(probability)
    truth = as_outcome(outcome, rows=len(chances))
    asked = np.arange(1, 100) / 100 if thresholds is None else as_finite(thresholds, "thresholds")
    if asked.min() < 0 or asked.max() >= 1:
        raise ValueError(
            f"thresholds run from {asked.min():g} to {asked.max():g}; give values from 0 to below 1"
        )
    cases = len(truth)
    exchange = asked / (1 - asked)
    hits, false_alarms = (
        len(ranked) - np.searchsorted(ranked, asked, side="left")
        for ranked in (np.sort(chances[truth]), np.sort(chances[~truth]))
    )
    prevalence = truth.mean()
    return DecisionCurve(
        threshold=asked,
        model=(hits - false_alarms * exchange) / cases,
        everyone=prevalence - (1 - prevalence) * exchange,
        nobody=np.zeros(len(asked)),
    )


def _from_the_top(
    truth: BoolArray, scores: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return distinct scores, descending, and the positives and negatives from there upwards."""
    distinct, place = np.unique(-scores, return_inverse=True)
    hits = np.cumsum(np.bincount(place, weights=truth), dtype=np.float64)
    false_alarms = np.cumsum(np.bincount(place, weights=~truth), dtype=np.float64)
    return -distinct, hits, false_alarms


def _both_outcomes(
    outcome: npt.ArrayLike, score: npt.ArrayLike, what: str
) -> tuple[BoolArray, FloatArray]:
    scores = as_finite(score, "score")
    truth = as_outcome(outcome, rows=len(scores))
    if truth.all() or not truth.any():
        raise ValueError(f"{what} is undefined: all cases have the same outcome; it needs both")
    return truth, scores


def _wilson(share: FloatArray, cases: IntArray, level: float) -> tuple[FloatArray, FloatArray]:
    z = float(stats.norm.ppf((1 + level) / 2))
    scale = 1 + z**2 / cases
    middle = (share + z**2 / (2 * cases)) / scale
    reach = z / scale * np.sqrt(share * (1 - share) / cases + z**2 / (4 * cases**2))
    return np.maximum(middle - reach, 0), np.minimum(middle + reach, 1)
