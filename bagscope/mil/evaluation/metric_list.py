"""Which numbers a task is judged by; the first of them is its headline.

A metric looks at some rows of the answers under counts (see `bagscope.mil.evaluation.inputs`), so
that pooled values, values of a fold and all resamples of a bootstrap come from one function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from bagscope.mil.evaluation import decisions, probabilities, ranking, regression, survival
from bagscope.mil.evaluation.answers import Answers
from bagscope.mil.evaluation.inputs import FloatArray, IntArray, Value
from bagscope.mil.evaluation.multilabel import macro, per_label

Scope = Literal["pooled", "folds"]
OfRows = Callable[[IntArray, FloatArray | None], Value]
"""Rows, and None or (R, rows) counts, to a value or (R,) values."""

GIVEN_SHARE = 0.9
"""Of sensitivity at a specificity, and the reverse."""
TIME_QUANTILES = (0.25, 0.5, 0.75)
"""Of the times of events, at which the AUC over time is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number that predictions are judged by.

    Attributes:
        name: in files.
        label: for people.
        of: its function.
        higher_is_better: or lower.
        chance: its value for answers that know nothing; None where that depends on the cases.
    """

    name: str
    label: str
    of: OfRows
    higher_is_better: bool = True
    chance: float | None = None


def headline_scope(answers: Answers) -> Scope:
    """Return over what a run's headline is told: all cases pooled, or the mean over folds.

    Risks of different models are on no common scale, so survival is judged within folds.
    """
    return "folds" if answers.target.task == "survival" else "pooled"


def metrics_of(answers: Answers) -> tuple[Metric, ...]:
    """Return the metrics of a task, the headline first."""
    task = answers.target.task
    if task == "survival":
        return _survival(answers)
    if task == "regression":
        return _regression(answers)
    if task == "multilabel":
        return _multilabel(answers)
    if len(answers.target.classes) == 2 and task == "classes":
        return _binary(answers)
    return _classes(answers)


def named_class(name: str) -> str:
    """Return a class as a sentence speaks of it: a number needs the word."""
    return f"class {name}" if name[:1].isdigit() else name


def why_undefined(metric: Metric, rows: IntArray) -> str:
    """Return why a metric has no value on rows; empty where it has one."""
    if not len(rows):
        return "there is no case"
    try:
        metric.of(rows, None)
    except ValueError as error:
        return str(error)
    return ""


def _of(function: Callable[..., Any], *columns: Any, **options: Any) -> OfRows:
    """Return a metric's function with its columns, (n,) or (n, k), bound."""

    def of_rows(rows: IntArray, counts: FloatArray | None) -> Value:
        value: Value = function(*(column[rows] for column in columns), counts, **options)
        return value

    return of_rows


def _binary(answers: Answers) -> tuple[Metric, ...]:
    truth, chance, called = answers.truth[:, 0], answers.predicted[:, 1], answers.called
    share = f"{GIVEN_SHARE:.0%}".replace("%", " %")
    positive = named_class(answers.target.classes[1])
    return (
        Metric(
            name="auroc", label="AUROC", of=_of(ranking.binary_auroc, truth, chance), chance=0.5
        ),
        Metric(
            name="auprc",
            label=f"Average precision of {positive}",
            of=_of(ranking.binary_auprc, truth, chance),
        ),
        *_right(truth, called),
        Metric(
            name="f1",
            label=f"F1 of {positive}",
            of=_of(decisions.f1, truth, called),
        ),
        Metric(
            name="sensitivity",
            label=f"Sensitivity to {positive}",
            of=_of(decisions.sensitivity, truth, called),
        ),
        Metric(
            name="specificity", label="Specificity", of=_of(decisions.specificity, truth, called)
        ),
        Metric(
            name="ppv",
            label="Positive predictive value",
            of=_of(decisions.positive_predictive_value, truth, called),
        ),
        Metric(
            name="npv",
            label="Negative predictive value",
            of=_of(decisions.negative_predictive_value, truth, called),
        ),
        Metric(
            name="sensitivity_at_specificity",
            label=f"Sensitivity to {positive} at {share} specificity",
            of=_of(ranking.sensitivity_at_specificity, truth, chance, specificity=GIVEN_SHARE),
        ),
        Metric(
            name="specificity_at_sensitivity",
            label=f"Specificity at {share} sensitivity",
            of=_of(ranking.specificity_at_sensitivity, truth, chance, sensitivity=GIVEN_SHARE),
        ),
        Metric(
            name="brier",
            label="Brier score",
            of=_of(probabilities.binary_brier, truth, chance),
            higher_is_better=False,
        ),
        _log_loss(answers),
        Metric(
            name="ece",
            label="Calibration error (ECE)",
            of=_of(probabilities.binary_ece, truth, chance),
            higher_is_better=False,
        ),
    )


def _classes(answers: Answers) -> tuple[Metric, ...]:
    truth, called = answers.truth[:, 0], answers.called
    columns = (truth, answers.predicted)
    found = [
        Metric(
            name="auroc",
            label="AUROC, mean over classes",
            of=_of(ranking.auroc, *columns),
            chance=0.5,
        ),
        Metric(
            name="auprc",
            label="Average precision, mean over classes",
            of=_of(ranking.auprc, *columns),
        ),
        *_right(truth, called),
        Metric(
            name="macro_f1",
            label="F1, mean over classes",
            of=_of(decisions.macro_f1, truth, called),
        ),
        Metric(
            name="brier",
            label="Brier score (0 to 2)",
            of=_of(probabilities.brier, *columns),
            higher_is_better=False,
        ),
        _log_loss(answers),
        Metric(
            name="ece",
            label="Calibration error (ECE)",
            of=_of(probabilities.ece, *columns),
            higher_is_better=False,
        ),
    ]
    if answers.target.task == "ordinal":
        ordered = Metric(
            name="quadratic_kappa",
            label="Quadratic κ",
            of=_of(decisions.quadratic_kappa, truth, called),
            chance=0.0,
        )
        apart = Metric(
            name="mae",
            label="Mean distance in classes",
            of=_of(regression.mae, truth, called.astype(np.float64)),
            higher_is_better=False,
        )
        return (ordered, apart, *found)
    return tuple(found)


def _right(truth: FloatArray, called: IntArray) -> tuple[Metric, ...]:
    return (
        Metric(name="accuracy", label="Accuracy", of=_of(decisions.accuracy, truth, called)),
        Metric(
            name="balanced_accuracy",
            label="Balanced accuracy",
            of=_of(decisions.balanced_accuracy, truth, called),
        ),
        Metric(
            name="kappa", label="Cohen's κ", of=_of(decisions.cohen_kappa, truth, called), chance=0
        ),
    )


def _log_loss(answers: Answers) -> Metric:
    return Metric(
        name="log_loss",
        label="Log loss",
        of=_of(probabilities.log_loss, answers.truth[:, 0], answers.predicted),
        higher_is_better=False,
    )


def _multilabel(answers: Answers) -> tuple[Metric, ...]:
    columns = (answers.truth, answers.predicted)
    return (
        Metric(
            name="auroc",
            label="AUROC, mean over labels",
            of=_of(partial(macro, ranking.binary_auroc), *columns),
            chance=0.5,
        ),
        Metric(
            name="auprc",
            label="Average precision, mean over labels",
            of=_of(partial(macro, ranking.binary_auprc), *columns),
        ),
        Metric(
            name="f1",
            label="F1, mean over labels",
            of=_of(partial(macro, decisions.f1), answers.truth, answers.called.astype(np.float64)),
        ),
        Metric(
            name="brier",
            label="Brier score, mean over labels",
            of=_of(partial(macro, probabilities.binary_brier), *columns),
            higher_is_better=False,
        ),
        *(
            Metric(
                name=f"auroc_{label}",
                label=f"AUROC of {label}",
                of=partial(_one_label, answers, place),
                chance=0.5,
            )
            for place, label in enumerate(answers.target.classes)
        ),
    )


def _one_label(answers: Answers, place: int, rows: IntArray, counts: FloatArray | None) -> Value:
    column = slice(place, place + 1)
    truth, chances = answers.truth[rows, column], answers.predicted[rows, column]
    values = per_label(ranking.binary_auroc, truth, chances, counts)
    if counts is None and np.isnan(values).any():
        name = answers.target.classes[place]
        raise ValueError(f"AUROC of {name} is undefined: all labelled cases are of one kind")
    return values[..., 0]


def _regression(answers: Answers) -> tuple[Metric, ...]:
    columns = (answers.truth[:, 0], answers.predicted[:, 0])
    return (
        Metric(name="r2", label="R²", of=_of(regression.r2, *columns), chance=0.0),
        Metric(
            name="mae",
            label="Mean absolute error",
            of=_of(regression.mae, *columns),
            higher_is_better=False,
        ),
        Metric(
            name="rmse",
            label="Root mean squared error",
            of=_of(regression.rmse, *columns),
            higher_is_better=False,
        ),
        Metric(name="pearson", label="Pearson's correlation", of=_of(regression.pearson, *columns)),
        Metric(
            name="spearman", label="Spearman's correlation", of=_of(regression.spearman, *columns)
        ),
    )


def _survival(answers: Answers) -> tuple[Metric, ...]:
    columns = (answers.truth[:, 0], answers.truth[:, 1], answers.predicted[:, 0])
    return (
        Metric(name="c_index", label="C-index", of=_of(survival.concordance, *columns), chance=0.5),
        *(
            Metric(
                name=f"auc_at_q{round(100 * quantile)}",
                label=f"AUC at time {time:.4g}",
                of=_of(survival.auc_at, *columns, at=time),
                chance=0.5,
            )
            for quantile, time in zip(TIME_QUANTILES, told_times(answers), strict=True)
        ),
    )


def told_times(answers: Answers, quantiles: Sequence[float] = TIME_QUANTILES) -> tuple[float, ...]:
    """Return quantiles of the times of events; of all times where there is no event."""
    time, event = answers.truth.T
    known = time[event == 1] if (event == 1).any() else time
    return tuple(float(value) for value in np.quantile(known, quantiles))
