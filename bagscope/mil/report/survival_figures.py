"""The figures of a survival report: risk groups over time, and the AUC over time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bagscope.mil.evaluation.answers import Answers, Text
from bagscope.mil.evaluation.bootstrap import Statistic, draws, percentile_ends
from bagscope.mil.evaluation.inputs import FloatArray, IntArray
from bagscope.mil.evaluation.kaplan_meier import LogRank, kaplan_meier, log_rank
from bagscope.mil.evaluation.metric_list import told_times
from bagscope.mil.evaluation.survival import auc_at
from bagscope.mil.report.drawing import SERIES, SOFT, Picture, canvas, picture

LOW, HIGH = "low risk", "high risk"
RULE = (
    "High risk: above the median risk of the patients tested by the same fold, since risks of "
    "different models are on no common scale. The median is that of test patients, so the groups "
    "could not have been told before the fold was complete"
)
_BAND_RESAMPLES = 500
_TIMES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskGroups:
    """Patients in two groups, (n,) each.

    Attributes:
        time: follow-up of a patient.
        event: 1 for an event.
        group: `LOW` or `HIGH`.
    """

    time: FloatArray
    event: FloatArray
    group: Text

    def test(self) -> LogRank | None:
        """Return the log-rank test; None where there is nothing to compare."""
        try:
            return log_rank(self.time, self.event, self.group)
        except ValueError:
            return None


def risk_groups(answers: Answers) -> RiskGroups:
    """Return the patients of the first round of folds; a risk is the mean of a patient's cases."""
    first = answers.of_rows(answers.repeat_rows[0])
    time, event, group = [], [], []
    for rows in first.fold_rows:
        patients, member = np.unique(first.patient[rows], return_inverse=True)
        cases = np.bincount(member)
        risk = np.bincount(member, weights=first.predicted[rows, 0]) / cases
        one_of_each = _first_of_each(member, len(patients))
        time.append(first.truth[rows, 0][one_of_each])
        event.append(first.truth[rows, 1][one_of_each])
        group.append(np.where(risk > np.median(risk), HIGH, LOW))
    return RiskGroups(
        time=np.concatenate(time), event=np.concatenate(event), group=np.concatenate(group)
    )


def survival_figures(answers: Answers) -> list[Picture]:
    """Return both figures, or the first where there is no AUC at any time."""
    over_time = auc_over_time(answers)
    return [kaplan_meier_by_group(answers), *([] if over_time is None else [over_time])]


def kaplan_meier_by_group(answers: Answers) -> Picture:
    """Draw the survival of both risk groups, with how many are followed below."""
    groups = risk_groups(answers)
    test = groups.test()
    last = float(groups.time.max())
    ticks = _round_times(last)
    with canvas(6.4, 4.6) as figure:
        axes, below = figure.subplots(2, 1, height_ratios=(5, 1), sharex=True)
        for place, (name, colour) in enumerate(((LOW, SERIES[0]), (HIGH, SERIES[1]))):
            chosen = groups.group == name
            if not chosen.any():
                continue
            curve = kaplan_meier(groups.time[chosen], groups.event[chosen])
            time = np.concatenate(([0.0], curve.time))
            alive, bottom, top = (
                np.concatenate(([1.0], values))
                for values in (curve.survival, curve.low, curve.high)
            )
            axes.step(time, alive, where="post", color=colour, label=name.capitalize())
            axes.fill_between(time, bottom, top, step="post", color=colour, alpha=0.13, linewidth=0)
            gone = curve.censored > 0
            axes.plot(curve.time[gone], curve.survival[gone], "|", color=colour, markersize=7)
            for tick, count in zip(ticks, curve.at_risk_at(ticks), strict=True):
                below.text(tick, -place, f"{count}", ha="center", va="center", color=colour)
        if test is not None:
            p = "p < 0.001" if test.p_value < 0.001 else f"p = {test.p_value:.3f}"
            axes.text(0.02, 0.04, f"log-rank {p}", transform=axes.transAxes)
        axes.set(ylim=(0, 1.02), xlim=(-0.02 * last, 1.03 * last), ylabel="Survival")
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 0.1))
        below.set(ylim=(-1.6, 0.6), xlabel=f"Time ({answers.target.time})")
        below.set_xticks(ticks)
        below.set_yticks([0, -1], ["low", "high"])
        below.set_title("At risk", fontsize=9.5, pad=3)
        below.tick_params(length=0)
        for side in ("left", "bottom"):
            below.spines[side].set_visible(False)
        return picture(
            figure,
            name="kaplan_meier",
            title="Survival by risk group",
            caption=f"{RULE}. Bands: 95 % at each time by itself; ticks: last seen alive. The "
            "log-rank test asks whether the groups differ at all, not whether the model adds to "
            "what is known of a patient.",
        )


def auc_over_time(answers: Answers) -> Picture | None:
    """Draw the AUC at times between most events; None where it exists at none."""
    quantiles = np.linspace(0.1, 0.9, _TIMES)
    times = np.unique(told_times(answers, quantiles.tolist()))
    first = answers.of_rows(answers.repeat_rows[0])
    columns = (first.truth[:, 0], first.truth[:, 1], first.predicted[:, 0])
    used, values = [], []
    for time in times.tolist():
        try:
            values.append(float(auc_at(*columns, at=time)))
            used.append(time)
        except ValueError:  # nobody followed for longer
            continue
    if not used:
        return None
    drawn = draws(
        {str(time): _auc_of(*columns, time) for time in used},
        first.patient,
        resamples=_BAND_RESAMPLES,
    )
    ends = np.array([percentile_ends(drawn[str(time)], 0.95) for time in used])
    with canvas(5.6, 3.2) as figure:
        axes = figure.subplots()
        axes.axhline(0.5, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axes.fill_between(used, ends[:, 0], ends[:, 1], color=SERIES[0], alpha=0.13, linewidth=0)
        axes.plot(used, values, "o-", color=SERIES[0], markersize=4.5)
        low = min(0.4, float(np.nanmin(np.append(ends[:, 0], values))) - 0.02)
        axes.set(ylim=(max(0.0, low), 1.01), xlabel=f"Time ({answers.target.time})", ylabel="AUC")
        axes.grid(True)
        axes.set_axisbelow(True)
        return picture(
            figure,
            name="auc_over_time",
            title="How well risk orders patients, by time",
            caption="Of patients with an event by then against those followed for longer, weighted "
            "for censoring, pooled over folds. Band: 95 % at each time by itself. Dashed: chance.",
        )


def _round_times(last: float) -> FloatArray:
    """Return about six round times from 0 to the last follow-up."""
    from matplotlib.ticker import MaxNLocator

    found = np.asarray(MaxNLocator(6).tick_values(0, last), np.float64)
    return found[(found >= 0) & (found <= last)]


def _auc_of(time: FloatArray, event: FloatArray, risk: FloatArray, at: float) -> Statistic:
    return lambda counts: auc_at(time, event, risk, counts, at=at)


def _first_of_each(member: IntArray, groups: int) -> IntArray:
    return np.array([int(np.flatnonzero(member == group)[0]) for group in range(groups)])
