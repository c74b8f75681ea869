"""How well a risk orders survival: Harrell's C-index, and Uno's AUC at a time.

`time` is (n,) follow-up, `event` (n,) 1 for an event and 0 for censored, `risk` (n,), higher
meaning an earlier event. `weights` and undefined values: see `bagscope.mil.evaluation.inputs`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bagscope.mil.evaluation.inputs import (
    BoolArray,
    FloatArray,
    Value,
    as_finite,
    as_outcome,
    over_resamples,
)
from bagscope.mil.evaluation.ranking import weighted_auroc

TIED_RISK = 1e-8
_PAIRS_AT_ONCE = 1 << 22


def concordance(
    time: npt.ArrayLike,
    event: npt.ArrayLike,
    risk: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
) -> Value:
    """Return Harrell's C-index: the share of comparable pairs whose risks are in order.

    A pair (i, j) is comparable if i has an event and either time_i < time_j, or the times are equal
    and j is censored. It is in order if risk_i > risk_j; risks no more than 1e-8 apart count one
    half. It needs one comparable pair. All pairs are looked at: O(n²) time, in little memory.
    """
    times, events = checked_survival(time, event)
    risks = as_finite(risk, "risk", rows=len(times))
    return over_resamples(
        lambda counts: _concordance(times, events, risks, counts),
        weights,
        rows=len(times),
        undefined=(
            "the C-index is undefined: no pair can be compared, since nobody is known to have "
            "lived longer than a case with an event"
        ),
    )


def auc_at(
    time: npt.ArrayLike,
    event: npt.ArrayLike,
    risk: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    at: float,
) -> Value:
    """Return the cumulative/dynamic AUC at a time, weighted for censoring (Uno 2007).

    Cases had an event by `at`, controls were followed beyond it; a case weighs 1 / G(time−), G
    being the Kaplan–Meier estimate of not being censored yet, made from these rows (in each
    resample anew), with events before censorings of the same time. Censored cases up to `at` have
    no part but in G. Equal risks count one half.
    """
    times, events = checked_survival(time, event)
    risks = as_finite(risk, "risk", rows=len(times))
    cases = events & (times <= at)
    controls = times > at

    def of_counts(counts: FloatArray) -> FloatArray:
        followed = uncensored_before(times, events, counts)[:, cases]
        drawn = counts[:, cases]
        raised = np.divide(drawn, followed, out=np.zeros_like(drawn), where=drawn > 0)
        return weighted_auroc(risks[cases], risks[controls], raised, counts[:, controls])

    return over_resamples(
        of_counts,
        weights,
        rows=len(times),
        undefined=(
            f"the AUC at time {at:g} is undefined: it needs an event by then and a case followed "
            "for longer"
        ),
    )


def uncensored_before(times: FloatArray, events: BoolArray, counts: FloatArray) -> FloatArray:
    """Return the chance of not being censored before each row's time, (R, n), from (R, n) counts.

    Where an event and a censoring share a time, the event came first.
    """
    order = np.argsort(times, kind="stable")
    ranked = times[order]
    fresh = np.r_[True, ranked[1:] != ranked[:-1]]
    starts, moved = np.flatnonzero(fresh), counts[:, order]
    leaving = np.add.reduceat(moved, starts, axis=1)
    dying = np.add.reduceat(moved * events[order], starts, axis=1)
    at_risk = np.cumsum(leaving[:, ::-1], axis=1)[:, ::-1] - dying
    censored = leaving - dying
    kept = 1 - np.divide(censored, at_risk, out=np.zeros_like(censored), where=censored > 0)
    before = np.ones_like(kept)
    np.cumprod(kept[:, :-1], axis=1, out=before[:, 1:])
    place = np.empty(len(times), dtype=np.int64)
    place[order] = np.cumsum(fresh) - 1
    chance: FloatArray = before[:, place]
    return chance


def checked_survival(time: npt.ArrayLike, event: npt.ArrayLike) -> tuple[FloatArray, BoolArray]:
    """Return (n,) times and (n,) events.

    Raises:
        ValueError: on a time that is negative or not finite, or an event other than 0 and 1.
    """
    times = as_finite(time, "time")
    if times.min() < 0:
        raise ValueError(
            f"time holds {times.min():g} at position {int(np.argmin(times))}; follow-up cannot be "
            "negative"
        )
    return times, as_outcome(event, "event", rows=len(times))


def _concordance(
    times: FloatArray, events: BoolArray, risks: FloatArray, counts: FloatArray
) -> FloatArray:
    failed = np.flatnonzero(events)
    in_order, comparable = np.zeros(len(counts)), np.zeros(len(counts))
    step = max(1, _PAIRS_AT_ONCE // len(times))
    for start in range(0, len(failed), step):
        some = failed[start : start + step]
        later = times > times[some, None]
        later |= (times == times[some, None]) & ~events
        ahead = risks[some, None] - risks
        won = np.where(np.abs(ahead) <= TIED_RISK, 0.5, ahead > 0) * later
        drawn = counts[:, some]
        in_order += np.einsum("re,re->r", drawn, counts @ won.T)
        comparable += np.einsum("re,re->r", drawn, counts @ later.T.astype(np.float64))
    values: FloatArray = in_order / comparable
    return values
