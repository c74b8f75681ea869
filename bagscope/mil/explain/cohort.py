"""What an intervention does over a cohort: paired, with patients drawn anew for the interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bagscope.mil.evaluation.bootstrap import RESAMPLES, Estimate, Statistic, intervals
from bagscope.mil.evaluation.decisions import sensitivity, specificity
from bagscope.mil.evaluation.inputs import Value
from bagscope.mil.evaluation.paired import Comparison, paired_bootstrap
from bagscope.mil.explain.effects import Effect
from bagscope.mil.explain.question import NO_DECISION, Array

UNDEFINED = Estimate(value=math.nan, low=math.nan, high=math.nan)


@dataclass(frozen=True, kw_only=True, slots=True)
class CohortEffect:
    """One intervention over several slides, of one answer.

    Attributes:
        column: name of the answer.
        slides: how many.
        change: of the mean answer, after (first) against before (second).
        flips: slides whose decision changed.
        sensitivity: before and after, of the decision for this column; NaN where truth is not
            known or nothing is decided.
        specificity: likewise.
    """

    column: str
    slides: int
    change: Comparison
    flips: int
    sensitivity: tuple[Estimate, Estimate]
    specificity: tuple[Estimate, Estimate]


def over_cohort(
    effects: Sequence[Effect],
    *,
    column: int,
    patients: Sequence[str],
    truth: npt.ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> CohortEffect:
    """Sum up the effects of one intervention, one per slide.

    Args:
        effects: of the slides.
        column: of the answers.
        patients: (n,) of each slide, drawn together.
        truth: (n,) whether a slide is of this column's class.
        resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        ValueError: no effects, or lengths that differ.
    """
    if not effects or len(patients) != len(effects):
        raise ValueError(f"{len(effects)} effects and {len(patients)} patients; give one each")
    before = np.array([effect.before[column] for effect in effects])
    after = np.array([effect.after[column] for effect in effects])
    decided = np.array([(effect.decision_before, effect.decision_after) for effect in effects])
    shares = {"sensitivity": (UNDEFINED,) * 2, "specificity": (UNDEFINED,) * 2}
    if truth is not None and (decided != NO_DECISION).all():
        called = decided == column
        statistics: dict[str, Statistic] = {
            f"{name} {place}": _share(function, truth, called[:, place])
            for name, function in (("sensitivity", sensitivity), ("specificity", specificity))
            for place in (0, 1)
        }
        found = intervals(statistics, patients, resamples=resamples, seed=seed, strata=truth)
        shares = {name: (found[f"{name} 0"], found[f"{name} 1"]) for name in shares}
    return CohortEffect(
        column=effects[0].columns[column],
        slides=len(effects),
        change=paired_bootstrap(
            _mean(after), _mean(before), patients, resamples=resamples, seed=seed
        ),
        flips=sum(effect.flips for effect in effects),
        sensitivity=shares["sensitivity"],
        specificity=shares["specificity"],
    )


def _mean(values: Array) -> Statistic:
    return lambda counts: counts @ values / counts.sum(axis=1)


def _share(
    function: Callable[..., Value], truth: npt.ArrayLike, called: npt.ArrayLike
) -> Statistic:
    outcome = np.asarray(truth).astype(int)
    has_any = bool(outcome.any()) if function is sensitivity else not bool(outcome.all())
    if not has_any:
        return lambda counts: np.full(len(counts), np.nan)
    chosen = np.asarray(called).astype(int)
    return lambda counts: function(outcome, chosen, counts)
