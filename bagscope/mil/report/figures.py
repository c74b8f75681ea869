"""The figures of a report on classes, numbers and several labels; survival has its own module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bagscope.mil.evaluation.answers import Answers
from bagscope.mil.evaluation.bootstrap import Estimate
from bagscope.mil.evaluation.curves import (
    decision_curve,
    precision_recall_curve,
    reliability,
    roc_curve,
)
from bagscope.mil.evaluation.decisions import confusion
from bagscope.mil.evaluation.inputs import BoolArray, FloatArray
from bagscope.mil.evaluation.metric_list import named_class
from bagscope.mil.report.drawing import (
    INK,
    LINE,
    SERIES,
    SOFT,
    Picture,
    canvas,
    diagonal,
    picture,
    unit_square,
)

MOST_LINES = len(SERIES)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForestRow:
    """One line of a forest plot."""

    label: str
    estimate: Estimate
    is_model: bool = False


def figures_of(answers: Answers) -> list[Picture]:
    """Return the figures of a task but survival."""
    target = answers.target
    if target.task == "regression":
        return [predicted_against_true(answers)]
    found = [*_if_any(ranking(answers))]
    if target.task != "multilabel":
        found += [calibration(answers), confusion_matrix(answers)]
    if _is_binary(answers):
        found.append(decision(answers))
    return found


def forest(
    rows: Sequence[ForestRow], *, metric: str, chance: float | None, models_alone: bool = False
) -> Picture:
    """Draw a value with its interval per row: the model and what it has to beat, or models."""
    with canvas(6.6, 0.9 + 0.34 * len(rows)) as figure:
        axes = figure.subplots()
        places = np.arange(len(rows))[::-1]
        for place, row in zip(places, rows, strict=True):
            one = row.estimate
            colour = SERIES[0] if row.is_model else SOFT
            if not np.isnan(one.low):
                axes.plot([one.low, one.high], [place, place], color=colour, linewidth=2.2)
                if row.is_model:
                    axes.axvspan(one.low, one.high, color=SERIES[0], alpha=0.09, linewidth=0)
            axes.plot(one.value, place, "s" if row.is_model else "o", color=colour, markersize=6.5)
        if chance is not None:
            axes.axvline(chance, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(places, [row.label for row in rows])
        axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel=metric)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        shaded = "" if models_alone else " Shaded: the model's interval."
        return picture(
            figure,
            name="models" if models_alone else "baselines",
            title="The runs" if models_alone else "The model beside simple rivals",
            caption=f"{metric} with 95 % intervals, on the same test patients.{shaded} Whether a "
            "difference is more than chance is tested pair by pair below, not read off "
            "overlapping intervals.",
        )


def ranking(answers: Answers) -> Picture | None:
    """Draw ROC and precision–recall curves; None where no class has both outcomes."""
    lines = list(_outcomes(answers))
    if not lines:
        return None
    with canvas(7.2, 3.7 + (0.22 * ((len(lines) + 1) // 2) if len(lines) > 1 else 0)) as figure:
        left, right = figure.subplots(1, 2)
        diagonal(left)
        for (label, outcome, chance), colour in zip(lines, SERIES, strict=False):
            roc = roc_curve(outcome, chance)
            left.plot(roc.false_positive_rate, roc.true_positive_rate, color=colour, label=label)
            curve = precision_recall_curve(outcome, chance)
            recall = np.concatenate(([0.0], curve.recall))
            precision = np.concatenate((curve.precision[:1], curve.precision))
            right.step(recall, precision, where="pre", color=colour)
            if len(lines) == 1:
                right.axhline(curve.prevalence, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        left.set_title("ROC")
        right.set_title("Precision and recall")
        unit_square(left, "1 − specificity", "Sensitivity")
        unit_square(right, "Recall (sensitivity)", "Precision (PPV)")
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=2)
        each = "" if len(lines) == 1 else " Each class against the rest."
        if _is_binary(answers):
            each = f" Positive is {named_class(answers.target.classes[1])}."
        return picture(
            figure,
            name="ranking",
            title="How well patients are ranked",
            caption="All test cases pooled, each answered by models that never saw it. Dashed: "
            f"ranking by chance.{each} Precision holds at the prevalence of this cohort alone.",
        )


def calibration(answers: Answers) -> Picture:
    """Draw the reliability diagram above the distribution of the probabilities."""
    truth = answers.truth[:, 0].astype(np.int64)
    if _is_binary(answers):
        outcome, chance = truth == 1, answers.predicted[:, 1]
        what = f"Predicted probability of {answers.target.classes[1]}"
        seen = "Observed share"
    else:
        outcome = answers.predicted.argmax(axis=1) == truth
        chance = answers.predicted.max(axis=1)
        what, seen = "Probability of the most probable class", "Share that was right"
    bins = reliability(outcome, chance)
    with canvas(4.6, 5.0) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        diagonal(top)
        top.vlines(bins.predicted, bins.low, bins.high, color=SERIES[0], linewidth=1.4)
        top.plot(bins.predicted, bins.observed, "o", color=SERIES[0], markersize=6)
        unit_square(top, "", seen)
        top.set_aspect("auto")
        bottom.hist(chance, bins=np.linspace(0, 1, 21).tolist(), color=SERIES[0], alpha=0.55)
        bottom.set(xlabel=what, ylabel="Cases", xlim=(-0.015, 1.015))
        return picture(
            figure,
            name="calibration",
            title="Whether probabilities can be taken at their word",
            caption="On the dashed line, of patients told 70 % seven in ten have it. Bars: 95 % "
            "intervals of each bin, which may hold few cases. Below: how many cases are told "
            "what.",
        )


def confusion_matrix(answers: Answers) -> Picture:
    """Draw true class by called class."""
    classes = answers.target.classes
    table = confusion(answers.truth[:, 0], answers.called, classes=len(classes))
    of_class = np.maximum(table.sum(axis=1, keepdims=True), 1)
    shares: FloatArray = table / of_class
    how = "The most probable class is called."
    if _is_binary(answers):
        how = (
            "The threshold of each fold comes from its own inner validation patients, or is 0.5 "
            "where those were too few."
        )
    size = max(3.0, 1.1 + 0.85 * len(classes))
    with canvas(size + 0.9, size) as figure:
        axes = figure.subplots()
        for row in range(len(classes)):
            for column in range(len(classes)):
                share = float(shares[row, column])
                axes.fill_between(
                    [column - 0.48, column + 0.48], row - 0.48, row + 0.48,
                    color=SERIES[0], alpha=0.06 + 0.44 * share, linewidth=0,
                )  # fmt: skip
                axes.text(
                    column, row - 0.08, f"{table[row, column]:.0f}",
                    ha="center", va="center", fontsize=12, fontweight="bold",
                )  # fmt: skip
                axes.text(
                    column, row + 0.22, f"{share:.0%}".replace("%", " %"),
                    ha="center", va="center", fontsize=8.5, color=INK,
                )  # fmt: skip
        axes.set_xticks(range(len(classes)), classes)
        axes.set_yticks(range(len(classes)), classes)
        axes.set(xlabel="Called", ylabel="Truth", xlim=(-0.5, len(classes) - 0.5))
        axes.set_ylim(len(classes) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.set_aspect("equal")
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        return picture(
            figure,
            name="confusion",
            title="What was called what",
            caption="Test cases by truth (rows) and call (columns), with the share of the row. "
            f"{how}",
        )


def decision(answers: Answers) -> Picture:
    """Draw the decision curve of two classes."""
    truth = answers.truth[:, 0]
    curve = decision_curve(truth, answers.predicted[:, 1])
    prevalence = float(truth.mean())
    with canvas(5.6, 3.9) as figure:
        axes = figure.subplots()
        axes.plot(curve.threshold, curve.everyone, color=SERIES[1], label="Treat all",
                  linestyle=(0, (5, 2)), linewidth=1.5)  # fmt: skip
        axes.plot(curve.threshold, curve.nobody, color=SOFT, label="Treat none", linewidth=1.2)
        axes.plot(curve.threshold, curve.model, color=SERIES[0], label="Treat by the model")
        axes.set(
            xlim=(0, 1),
            ylim=(-0.15 * max(prevalence, 0.1), 1.08 * max(prevalence, 0.02)),
            xlabel="Probability from which one would act",
            ylabel="Net benefit",
        )
        axes.grid(True)
        axes.set_axisbelow(True)
        # A good model's curve runs along the upper edge: no corner is free of one for a legend.
        figure.legend(loc="outside lower center", ncols=3)
        return picture(
            figure,
            name="decision",
            title="Whether acting on it would help",
            caption="Net benefit of acting at or above a probability, the false alarms weighed by "
            "the odds of that probability. It supposes calibrated probabilities and this "
            "cohort's prevalence.",
        )


def predicted_against_true(answers: Answers) -> Picture:
    """Draw predictions against the truth."""
    truth, predicted = answers.truth[:, 0], answers.predicted[:, 0]
    low = float(min(truth.min(), predicted.min()))
    high = float(max(truth.max(), predicted.max()))
    margin = 0.04 * (high - low or 1.0)
    with canvas(4.6, 4.4) as figure:
        axes = figure.subplots()
        axes.plot([low, high], [low, high], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(
            truth, predicted, "o", color=SERIES[0], alpha=0.55, markersize=5, markeredgewidth=0
        )
        span = (low - margin, high + margin)
        axes.set(
            xlabel=f"{answers.target.name}, true",
            ylabel=f"{answers.target.name}, predicted",
            xlim=span,
            ylim=span,
        )
        axes.set_aspect("equal")
        axes.grid(True, color=LINE)
        axes.set_axisbelow(True)
        return picture(
            figure,
            name="regression",
            title="Predicted against true",
            caption="Each dot a test case. Dashed: a perfect prediction. Predictions that crowd "
            "around one height say little more than the mean.",
        )


def _outcomes(answers: Answers) -> Iterator[tuple[str, BoolArray, FloatArray]]:
    """Yield label, outcome and probability of each class that has both outcomes."""
    target = answers.target
    for place, name in enumerate(target.classes):
        if _is_binary(answers) and place == 0:
            continue
        if target.task == "multilabel":
            known = ~np.isnan(answers.truth[:, place])
            outcome = answers.truth[known, place] == 1
        else:
            known = np.ones(len(answers), np.bool_)
            outcome = answers.truth[:, 0] == place
        if outcome.any() and not outcome.all():
            yield name, outcome, answers.predicted[known, place]


def _is_binary(answers: Answers) -> bool:
    return answers.target.task == "classes" and len(answers.target.classes) == 2


def _if_any(one: Picture | None) -> list[Picture]:
    return [] if one is None else [one]
