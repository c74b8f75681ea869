"""Several models on the same test patients: every pair tested, and the tests counted.

one held-out set, two classes, one case per patient   DeLong
cross-validation                                      paired bootstrap that draws patients
the same repeated folds                               also the corrected resampled t-test

The last one that applies is what a pair is judged by; the bootstrap stands beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bagscope.errors import ConfigError
from bagscope.mil.evaluation.answers import Answers
from bagscope.mil.evaluation.bootstrap import RESAMPLES, Estimate, Statistic, intervals
from bagscope.mil.evaluation.inputs import FloatArray, IntArray, Value, or_none
from bagscope.mil.evaluation.metric_list import Metric, Scope, headline_scope, metrics_of
from bagscope.mil.evaluation.paired import (
    Comparison,
    corrected_resampled_t_test,
    delong_test,
    holm,
    paired_bootstrap,
)
from bagscope.mil.evaluation.scoring import statistic_of
from bagscope.wording import listed


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two models, the first against the second.

    Attributes:
        tests: the one that the pair is judged by first.
        holm_p: of that test, adjusted for the number of pairs.
    """

    first: str
    second: str
    tests: tuple[Comparison, ...]
    holm_p: float

    @property
    def judged_by(self) -> Comparison:
        """Return the test that the pair is judged by."""
        return self.tests[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Models side by side.

    Attributes:
        metric: the headline of the task.
        scope: over what it is told.
        estimates: by model.
        pairs: each against each.
        patients: that all of them were tested on.
        notes: what to beware of.
    """

    metric: Metric
    scope: Scope
    estimates: Mapping[str, Estimate]
    pairs: tuple[Pair, ...]
    patients: int
    cases: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all numbers."""
        return {
            "metric": self.metric.name,
            "label": self.metric.label,
            "scope": self.scope,
            "patients": self.patients,
            "cases": self.cases,
            "models": {name: one.to_json() for name, one in self.estimates.items()},
            "pairs": [
                {
                    "first": pair.first,
                    "second": pair.second,
                    "holm_p": or_none(pair.holm_p),
                    "tests": [test.to_json() for test in pair.tests],
                }
                for pair in self.pairs
            ],
            "notes": list(self.notes),
        }


def require_same_patients(models: Mapping[str, Answers]) -> None:
    """Refuse models that were not tested on the same cases with the same labels.

    Raises:
        ConfigError: names the first cases that differ.
    """
    (first, one), *others = models.items()
    for name, other in others:
        if one.target.task != other.target.task or one.target.classes != other.target.classes:
            raise ConfigError(
                f"{first} and {name} predict different things "
                f"({_described(one)} and {_described(other)}); they can't be compared"
            )
        mine, theirs = _labels(one), _labels(other)
        for lacking, whose in (
            (sorted(set(mine) - set(theirs)), name),
            (sorted(set(theirs) - set(mine)), first),
        ):
            if lacking:
                raise ConfigError(
                    f"{first} and {name} were tested on different patients: {whose} lacks "
                    f"{listed(lacking, 4)} ({len(lacking)} in all); train both on the same splits"
                )
        changed = sorted(case for case in mine if mine[case] != theirs[case])
        if changed:
            raise ConfigError(
                f"{first} and {name} have other patients or labels for {listed(changed, 4)} "
                f"({len(changed)} in all); train both on the same cohort table"
            )


def compare(
    models: Mapping[str, Answers],
    *,
    train_patients: float,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Compared:
    """Compare every pair of models by the headline of their task.

    Args:
        models: answers to the same cases, by name.
        train_patients: that a fold trains on, in the mean; the corrected test needs it.
        resamples: of each bootstrap.
        seed: of the draws.

    Raises:
        ConfigError: other cases or labels.
    """
    require_same_patients(models)
    first = next(iter(models.values()))
    scope, metric = headline_scope(first), metrics_of(first)[0]
    cases, where = np.unique(first.case, return_index=True)
    patients = first.patient[where]
    statistics = {
        name: _over_cases(statistic_of(metrics_of(one)[0], one, scope), one, cases.tolist())
        for name, one in models.items()
    }
    same_folds = all(set(one.keys) == set(first.keys) for one in models.values())
    one_set = same_folds and len(first.fold_names) == 1
    repeated = same_folds and len(first.repeat_rows) > 1
    two_classes = first.target.task == "classes" and len(first.target.classes) == 2
    by_delong = one_set and two_classes and len(np.unique(patients)) == len(patients)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    tested: list[tuple[str, str, tuple[Comparison, ...]]] = []
    for a, b in itertools.combinations(models, 2):
        tests = [paired_bootstrap(statistics[a], statistics[b], patients, **options)]
        if repeated:
            corrected = _corrected(models[a], models[b], train_patients)
            tests = [corrected, *tests] if corrected is not None else tests
        if by_delong and (found := _delong(models[a], models[b])) is not None:
            tests = [found, *tests]
        tested.append((a, b, tuple(tests)))
    adjusted = holm([tests[0].p_value for *_, tests in tested])
    return Compared(
        metric=metric,
        scope=scope,
        estimates=intervals(statistics, patients, **options),
        pairs=tuple(
            Pair(first=a, second=b, tests=tests, holm_p=float(p))
            for (a, b, tests), p in zip(tested, adjusted, strict=True)
        ),
        patients=len(np.unique(patients)),
        cases=len(cases),
        notes=_notes(
            same_folds=same_folds,
            over_folds=scope == "pooled"
            and any(tests[0].method == "corrected resampled t" for *_, tests in tested),
        ),
    )


def _over_cases(statistic: Statistic, answers: Answers, cases: Sequence[str]) -> Statistic:
    """Return a statistic of counts over cases, whatever folds and repeats test them."""
    place = {case: number for number, case in enumerate(cases)}
    rows: IntArray = np.array([place[case] for case in answers.case.tolist()])

    def over_cases(counts: FloatArray) -> Value:
        return statistic(counts[:, rows])

    return over_cases


def _corrected(one: Answers, other: Answers, train_patients: float) -> Comparison | None:
    """Return the corrected resampled t-test over the folds in which both have a value."""
    values = np.array([_by_fold(one), _by_fold(other)])
    defined = ~np.isnan(values).any(axis=0)
    if defined.sum() < 2:
        return None
    test_patients = float(np.mean([len(np.unique(one.patient[rows])) for rows in one.fold_rows]))
    first, second = values[:, defined]
    return corrected_resampled_t_test(
        first, second, train_cases=train_patients, test_cases=test_patients
    )


def _by_fold(answers: Answers) -> list[float]:
    metric = metrics_of(answers)[0]
    found = []
    for rows in answers.fold_rows:
        value = np.asarray(metric.of(rows, np.ones((1, len(rows)))), np.float64)
        found.append(float(value[0]))
    return found


def _delong(one: Answers, other: Answers) -> Comparison | None:
    place = {key: row for row, key in enumerate(other.keys)}
    there = np.array([place[key] for key in one.keys])
    try:
        return delong_test(one.truth[:, 0], one.predicted[:, 1], other.predicted[there, 1])
    except ValueError:  # fewer than two cases of an outcome
        return None


def _labels(answers: Answers) -> dict[str, tuple[str, tuple[float | None, ...]]]:
    return {
        case: (patient, tuple(None if math.isnan(value) else value for value in row))
        for case, patient, row in zip(
            answers.case.tolist(), answers.patient.tolist(), answers.truth.tolist(), strict=True
        )
    }


def _described(answers: Answers) -> str:
    target = answers.target
    return f"{target.name}, {target.task}" + (
        f" of {', '.join(target.classes)}" if target.classes else ""
    )


def _notes(*, same_folds: bool, over_folds: bool) -> tuple[str, ...]:
    notes = []
    if not same_folds:
        notes.append(
            "the models were not trained on the same folds, so part of a difference may be the "
            "folds'"
        )
    if over_folds:
        notes.append(
            "a difference by the corrected t is the mean over folds, and need not be that of the "
            "values by themselves, which are pooled"
        )
    return tuple(notes)
