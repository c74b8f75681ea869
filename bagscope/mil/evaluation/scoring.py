"""The numbers of a run: each metric pooled, over folds, within each fold, for each seed.

pooled   all test cases of a round of folds at once; with several rounds, the mean over them
folds    the mean of the values within folds, over the folds where the metric exists

Pooling sets scores of different models side by side as if they were on one scale; the mean over
folds does not, but rests on few cases a fold. Patients are drawn for the intervals, never rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bagscope.mil.evaluation.answers import Answers
from bagscope.mil.evaluation.bootstrap import RESAMPLES, Estimate, Statistic, intervals
from bagscope.mil.evaluation.inputs import FloatArray, IntArray, Value, or_none
from bagscope.mil.evaluation.metric_list import (
    Metric,
    Scope,
    headline_scope,
    metrics_of,
    why_undefined,
)
from bagscope.mil.evaluation.ranking import mean_of_defined

MOST_SUBGROUPS = 12
"""A column of numbers with more values is cut at its median."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldScores:
    """One fold's numbers.

    Attributes:
        name: of the fold.
        cases: that it tests.
        patients: whose they are.
        values: by metric.
        undefined: why a metric has no value, by metric.
    """

    name: str
    cases: int
    patients: int
    values: Mapping[str, Estimate]
    undefined: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """A run's numbers for one target.

    Attributes:
        metrics: the headline first.
        scope: over what the headline is told.
        pooled: by metric.
        over_folds: by metric; empty with a single fold, where it would say the same again.
        by_fold: in order.
        by_seed: by seed and metric, in the headline's scope; empty with a single seed.
    """

    metrics: tuple[Metric, ...]
    scope: Scope
    pooled: Mapping[str, Estimate]
    over_folds: Mapping[str, Estimate]
    by_fold: tuple[FoldScores, ...]
    by_seed: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def headline(self) -> Metric:
        """Return the metric that a run is judged by."""
        return self.metrics[0]

    @property
    def headline_estimate(self) -> Estimate:
        """Return the headline's value, in its scope."""
        return self.told(self.headline.name)

    def told(self, name: str) -> Estimate:
        """Return a metric's value in the headline's scope."""
        over = self.over_folds if self.scope == "folds" and self.over_folds else self.pooled
        return over[name]

    def to_json(self) -> dict[str, Any]:
        """Return all numbers, None for what does not exist."""
        return {
            "headline": self.headline.name,
            "scope": self.scope,
            "metrics": {
                metric.name: {
                    "label": metric.label,
                    "higher_is_better": metric.higher_is_better,
                    "chance": metric.chance,
                }
                for metric in self.metrics
            },
            "pooled": _as_json(self.pooled),
            "mean_over_folds": _as_json(self.over_folds),
            "folds": {
                one.name: {
                    "cases": one.cases,
                    "patients": one.patients,
                    "values": _as_json(one.values),
                    "undefined": dict(one.undefined),
                }
                for one in self.by_fold
            },
            "seeds": {
                str(seed): {name: or_none(value) for name, value in values.items()}
                for seed, values in self.by_seed.items()
            },
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Subgroup:
    """The headline among the cases that share a cell of the cohort table.

    Attributes:
        value: the cell, or the half of the numbers.
        undefined: why there is no value; empty where there is one.
    """

    column: str
    value: str
    cases: int
    patients: int
    estimate: Estimate | None
    undefined: str = ""


def statistic_of(metric: Metric, answers: Answers, scope: Scope) -> Statistic:
    """Return a metric as a function of counts (R, n) over all rows."""
    parts = answers.fold_rows if scope == "folds" else answers.repeat_rows

    def statistic(counts: FloatArray) -> Value:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.stack([_defined(metric, rows, counts[:, rows]) for rows in parts])
            if scope == "folds":
                return mean_of_defined(values)
        mean: FloatArray = values.mean(axis=0)
        return mean

    return statistic


def score(
    answers: Answers,
    by_seed: Mapping[int, Answers] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Return the numbers of a run for one target.

    Args:
        answers: the mean over seeds.
        by_seed: each seed's own, for their spread.
        resamples: of each bootstrap.
        seed: of the draws.
    """
    metrics, scope = metrics_of(answers), headline_scope(answers)
    seeds = by_seed if by_seed and len(by_seed) > 1 else {}
    found: dict[Scope, Mapping[str, Estimate]] = {"pooled": {}, "folds": {}}
    scopes: tuple[Scope, ...] = ("pooled", "folds") if len(answers.fold_names) > 1 else ("pooled",)
    for one in scopes:
        found[one] = intervals(
            {metric.name: statistic_of(metric, answers, one) for metric in metrics},
            answers.patient,
            resamples=resamples,
            seed=seed,
        )
    return Scores(
        metrics=metrics,
        scope=scope,
        pooled=found["pooled"],
        over_folds=found["folds"],
        by_fold=tuple(
            _fold(name, metrics, answers, rows, resamples=resamples, seed=seed)
            for name, rows in zip(answers.fold_names, answers.fold_rows, strict=True)
        ),
        by_seed={number: _values(own, scope) for number, own in seeds.items()},
    )


def subgroups(
    answers: Answers,
    column: str,
    cells: Mapping[str, str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Subgroup, ...]:
    """Return the headline, pooled, for each value of a column of the cohort table.

    Args:
        answers: the mean over seeds.
        column: its name, for the result.
        cells: the column by case.
        resamples: of each bootstrap.
        seed: of the draws.
    """
    metric = metrics_of(answers)[0]
    groups = _cut([cells.get(case, "") for case in answers.case.tolist()])
    found = []
    for value in sorted(set(groups), key=_natural):
        rows = np.array([row for row, group in enumerate(groups) if group == value])
        one = _fold(value, (metric,), answers, rows, resamples=resamples, seed=seed)
        found.append(
            Subgroup(
                column=column,
                value=value or "not stated",
                cases=one.cases,
                patients=one.patients,
                estimate=one.values.get(metric.name),
                undefined=one.undefined.get(metric.name, ""),
            )
        )
    return tuple(found)


def _fold(
    name: str,
    metrics: Sequence[Metric],
    answers: Answers,
    rows: IntArray,
    *,
    resamples: int,
    seed: int,
) -> FoldScores:
    reasons = {metric.name: why_undefined(metric, rows) for metric in metrics}
    defined = [metric for metric in metrics if not reasons[metric.name]]
    values: Mapping[str, Estimate] = {}
    if defined:
        values = intervals(
            {metric.name: _within(metric, rows) for metric in defined},
            answers.patient[rows],
            resamples=resamples,
            seed=seed,
        )
    return FoldScores(
        name=name,
        cases=len(np.unique(answers.case[rows])),
        patients=len(np.unique(answers.patient[rows])),
        values=values,
        undefined={name: reason for name, reason in reasons.items() if reason},
    )


def _within(metric: Metric, rows: IntArray) -> Statistic:
    return lambda counts: _defined(metric, rows, counts)


def _defined(metric: Metric, rows: IntArray, counts: FloatArray) -> FloatArray:
    return np.asarray(metric.of(rows, counts), dtype=np.float64)


def _values(answers: Answers, scope: Scope) -> dict[str, float]:
    once = np.ones((1, len(answers)))
    return {
        metric.name: float(np.asarray(statistic_of(metric, answers, scope)(once))[0])
        for metric in metrics_of(answers)
    }


def _cut(cells: Sequence[str]) -> list[str]:
    """Return the groups of cells: their values, or two halves of many numbers."""
    if len(set(cells)) <= MOST_SUBGROUPS:
        return list(cells)
    try:
        numbers = [float(cell) if cell else np.nan for cell in cells]
    except ValueError:
        return list(cells)
    middle = float(np.nanmedian(numbers))
    return [
        "" if np.isnan(number) else f"{'≤' if number <= middle else '>'} {middle:g}"
        for number in numbers
    ]


def _natural(text: str) -> tuple[bool, int, float, str]:
    # Cells that are empty come last, the lower half of numbers before the upper.
    try:
        return (not text, 0, float(text), text)
    except ValueError:
        return (not text, 1, float(text.startswith(">")), text)


def _as_json(values: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in values.items()}
