"""Survival over time: the Kaplan–Meier estimate with its band, the median, the log-rank test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from bagscope.mil.evaluation.bootstrap import Estimate
from bagscope.mil.evaluation.inputs import FloatArray, IntArray, check_level
from bagscope.mil.evaluation.survival import checked_survival

_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KaplanMeier:
    """A survival curve: a step down at each distinct time, (G,) each.

    Attributes:
        time: distinct follow-up times, ascending, of events and censorings.
        at_risk: cases followed up to that time.
        events: cases with an event then.
        censored: cases last seen then.
        survival: share alive just after that time.
        low: the band's lower edge; NaN where nobody is left alive and it does not exist.
        high: its upper edge.
        level: of the band, at each time by itself.
    """

    time: FloatArray
    at_risk: IntArray
    events: IntArray
    censored: IntArray
    survival: FloatArray
    low: FloatArray
    high: FloatArray
    level: float

    def survival_at(self, times: npt.ArrayLike) -> FloatArray:
        """Return the share alive just after each of the times; NaN beyond the follow-up."""
        asked = np.asarray(times, dtype=np.float64)
        steps = np.concatenate(([1.0], self.survival))
        alive: FloatArray = steps[np.searchsorted(self.time, asked, side="right")]
        ended = self.survival[-1] <= 0
        return np.where((asked > self.time[-1]) & ~ended, np.nan, alive)

    def at_risk_at(self, times: npt.ArrayLike) -> IntArray:
        """Return how many are followed up to each of the times, for the rows under a figure."""
        followed = np.append(self.at_risk, 0)
        return followed[np.searchsorted(self.time, np.asarray(times), side="left")]

    def median(self) -> Estimate:
        """Return the first time at which survival is 0.5 or less, with the band's own such times.

        NaN stands for a time that the follow-up does not reach.
        """
        return Estimate(
            value=_first_time(self.time, self.survival),
            low=_first_time(self.time, self.low),
            high=_first_time(self.time, self.high),
            level=self.level,
        )


def kaplan_meier(time: npt.ArrayLike, event: npt.ArrayLike, *, level: float = 0.95) -> KaplanMeier:
    """Estimate survival from (n,) times and events.

    The band is Greenwood's on the scale of log(−log S), so that it stays inside [0, 1]; it has no
    width before the first event.
    """
    check_level(level)
    times, happened = checked_survival(time, event)
    distinct, place = np.unique(times, return_inverse=True)
    leaving = np.bincount(place)
    events = np.bincount(place, weights=happened).astype(np.int64)
    at_risk = np.cumsum(leaving[::-1])[::-1]
    survival = np.cumprod(1 - events / at_risk, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        greenwood = np.sqrt(np.cumsum(events / (at_risk * (at_risk - events))))
        spread = stats.norm.ppf((1 + level) / 2) * greenwood / np.log(survival)
        low, high = survival ** np.exp(-spread), survival ** np.exp(spread)
    low[survival >= 1], high[survival >= 1] = 1.0, 1.0
    low[survival <= 0], high[survival <= 0] = np.nan, np.nan
    return KaplanMeier(
        time=distinct,
        at_risk=at_risk,
        events=events,
        censored=leaving - events,
        survival=survival,
        low=low,
        high=high,
        level=level,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRank:
    """A log-rank test of k groups.

    Attributes:
        groups: their names, sorted.
        cases: of each group.
        observed: events of each group.
        expected: events of each group if survival were the same.
        statistic: χ² with `degrees` degrees of freedom.
        p_value: two-sided.
    """

    groups: tuple[str, ...]
    cases: tuple[int, ...]
    observed: tuple[int, ...]
    expected: tuple[float, ...]
    statistic: float
    degrees: int
    p_value: float


def log_rank(time: npt.ArrayLike, event: npt.ArrayLike, group: npt.ArrayLike) -> LogRank:
    """Test whether survival is the same in all groups, given as (n,) of any sortable kind.

    The variance is hypergeometric. A group with nobody at risk at any event adds no degree of
    freedom.

    Raises:
        ValueError: with fewer than two groups, no event, or nobody to compare an event with.
    """
    times, happened = checked_survival(time, event)
    names, member = np.unique(np.asarray(group), return_inverse=True)
    if len(member) != len(times):
        raise ValueError(
            f"group has {len(member)} values for {len(times)} cases; give one for each"
        )
    if len(names) < 2:
        raise ValueError(f"the log-rank test compares groups, and there is only {names[0]}")
    if not happened.any():
        raise ValueError("the log-rank test needs an event, and all cases are censored")
    in_group = np.eye(len(names), dtype=np.int64)[member]
    moments = np.unique(times[happened])
    # Those whose time is the moment or later, less those who died before: by sorting once.
    order = np.argsort(times, kind="stable")
    followed = np.cumsum(in_group[order][::-1], axis=0)[::-1]
    at_risk = followed[np.searchsorted(times[order], moments)].astype(np.float64)
    died = np.zeros((len(moments), len(names)))
    np.add.at(died, (np.searchsorted(moments, times[happened]), member[happened]), 1)
    total, deaths = at_risk.sum(axis=1), died.sum(axis=1)
    share = at_risk / total[:, None]
    expected = (share * deaths[:, None]).sum(axis=0)
    spread = deaths * (total - deaths) / np.maximum(total - 1, 1)
    covariance = np.diag(spread @ share) - np.einsum("g,gi,gj->ij", spread, share, share)
    used = np.flatnonzero(expected > 0)[1:]
    if len(used) == 0 or not spread.any():
        raise ValueError(
            "the log-rank test needs two groups at risk at an event, and there are none"
        )
    away = (died.sum(axis=0) - expected)[used]
    statistic = float(away @ np.linalg.pinv(covariance[np.ix_(used, used)]) @ away)
    return LogRank(
        groups=tuple(str(name) for name in names),
        cases=tuple(int(count) for count in in_group.sum(axis=0)),
        observed=tuple(int(count) for count in died.sum(axis=0)),
        expected=tuple(float(count) for count in expected),
        statistic=statistic,
        degrees=len(used),
        p_value=float(stats.chi2.sf(statistic, len(used))),
    )


def _first_time(time: FloatArray, survival: FloatArray) -> float:
    reached = np.flatnonzero(survival <= 0.5 + _ROUNDING)
    return float(time[reached[0]]) if len(reached) else float("nan")
