"""Survival in bins of time: a logit of the hazard for each (discrete-time likelihood).

h_k = σ(z_k), the probability of the event in bin k for who has come so far
S_k = Π_{j ≤ k} (1 - h_j), S_{-1} = 1;  c = 1 where censored, Y the bin of the time

observed = -(1 - c) [log S_{Y-1} + log h_Y]
nll      = (1 - α) (observed - c log S_Y) + α observed
ce_surv  = (1 - α) (-(1 - c) log(1 - S_Y) - c log S_Y) + α observed
risk     = -Σ_k S_k, higher is worse

All of it is made of log h_k = logsigmoid(z_k) and log(1 - h_k) = logsigmoid(-z_k), so nothing
overflows; log(1 - S_Y) is the log-sum-exp over k ≤ Y of log S_{k-1} + log h_k. The originals clamp
h and S from below at 1e-7; of ce_surv only S_Y, which ends in inf or NaN once it rounds to 1.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_expit
from torch import Tensor
from torch.nn import functional

from bagscope.errors import CohortError
from bagscope.mil.objectives.criterion import Array, Criterion
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec

STRETCH = 1e-6
"""By how much the outer edges lie beyond the training times, in the unit of the times."""


class DiscreteTimeCriterion(Criterion):
    """Hazards in bins.

    Attributes:
        form: of the loss.
        alpha: extra weight of observed events.
        edges: (bins + 1,) of the bins, in the unit of the times.
    """

    kind: Literal["discrete_time"] = "discrete_time"
    form: Literal["nll", "ce_surv"]
    alpha: float
    edges: tuple[float, ...]

    @staticmethod
    def outputs_of(target: TargetSpec, spec: ObjectiveSpec) -> int:
        """Return the number of bins."""
        return spec.bins

    @classmethod
    def fit(cls, target: TargetSpec, spec: ObjectiveSpec, rows: Array) -> Self:
        """Learn the bins' edges from rows (n, 2) of time and event."""
        assert spec.survival != "cox"
        require_events(target, rows)
        edges = bin_edges(rows[:, 0], rows[:, 1], spec.bins)
        events = rows[rows[:, 1] == 1, 0]
        if not np.bincount(time_bins(events, edges), minlength=spec.bins).all():
            raise CohortError(
                f"{target.name}: the {len(events)} events of the training cases fall on "
                f"{len(np.unique(events))} different times, too few to have one in each of "
                f"{spec.bins} bins; set objective.bins lower, or survival: cox"
            )
        return cls(form=spec.survival, alpha=spec.nll_alpha, edges=tuple(edges.tolist()))

    def loss(self, logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """Return the loss (B,) of logits (B, bins)."""
        compute = discrete_time_nll if self.form == "nll" else discrete_time_ce
        event = labels[:, 1].to(logits.dtype)
        return compute(logits, self.bins_of(labels), event, alpha=self.alpha)

    def bins_of(self, labels: Tensor) -> Tensor:
        """Return the bin (B,) int64 of the time of each label (B, 2)."""
        inner = torch.tensor(self.edges[1:-1], dtype=labels.dtype, device=labels.device)
        return torch.bucketize(labels[:, 0].contiguous(), inner, right=True)

    def predict(self, logits: Array) -> Array:
        """Return (n, 1 + bins): risk, then the survival at the upper edge of each bin."""
        survival = np.exp(log_expit(-logits).cumsum(1))
        return np.concatenate([-survival.sum(1, keepdims=True), survival], axis=1)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return "risk", and the time of each survival."""
        return ("risk", *(f"survival at {edge:.6g}" for edge in self.edges[1:]))


def discrete_time_nll(
    logits: Tensor,
    bins: Tensor,
    event: Tensor,
    *,
    alpha: float = 0.0,
    clamp: float | None = None,
) -> Tensor:
    """Return the negative log-likelihood (B,).

    Args:
        logits: (B, K) of the hazards.
        bins: (B,) int64, the bin of each time.
        event: (B,) 1 for an event, 0 for a censored time; a share is weighted as such.
        alpha: extra weight of observed events.
        clamp: smallest hazard and survival, as in the originals (1e-7), for comparing with them;
            beyond it they give no gradient.
    """
    log_hazard, log_before, log_after = _at_bin(logits, bins)
    if clamp is not None:
        floor = math.log(clamp)
        log_hazard, log_before, log_after = (
            part.clamp(min=floor) for part in (log_hazard, log_before, log_after)
        )
    observed = -event * (log_before + log_hazard)
    return observed - (1 - alpha) * (1 - event) * log_after


def discrete_time_ce(
    logits: Tensor,
    bins: Tensor,
    event: Tensor,
    *,
    alpha: float = 0.0,
    clamp: float | None = None,
) -> Tensor:
    """Return the cross-entropy (B,) of being dead or alive at the end of bin Y.

    Arguments as of `discrete_time_nll`, but for `clamp`: the original takes it as the smallest
    S_Y, and in the observed part adds it to the hazard and the survival.
    """
    log_hazard, log_before, log_after = _at_bin(logits, bins)
    if clamp is not None:
        floor = log_after.new_tensor(math.log(clamp))
        log_hazard, log_before = log_hazard.logaddexp(floor), log_before.logaddexp(floor)
        log_after = log_after.clamp(min=floor)
    steps = functional.logsigmoid(logits) + _log_survival_before(logits)
    seen = torch.arange(logits.shape[1], device=logits.device) <= bins[:, None]
    log_dead = steps.masked_fill(~seen, -torch.inf).logsumexp(1)
    crossed = -event * log_dead - (1 - event) * log_after
    return (1 - alpha) * crossed - alpha * event * (log_before + log_hazard)


def bin_edges(times: Array, event: Array, bins: int) -> Array:
    """Return the edges (bins + 1,): quantiles of the times of events.

    The outer ones are moved to the first and the last of all times, and a little beyond.

    Args:
        times: (n,) of training cases only.
        event: (n,) 1 for an event, 0 for a censored time; at least one event.
        bins: number of bins.
    """
    edges: Array = np.quantile(times[event == 1], np.linspace(0, 1, bins + 1))
    edges[0] = times.min() - STRETCH
    edges[-1] = times.max() + STRETCH
    return edges


def time_bins(times: Array, edges: Array) -> NDArray[np.int64]:
    """Return the bin (n,) of each time; a bin holds its lower edge and not its upper one.

    Times beyond the outer edges, which training never saw, are of the outer bins.
    """
    bins: NDArray[np.int64] = np.searchsorted(edges[1:-1], times, side="right").astype(np.int64)
    return bins


def require_events(target: TargetSpec, rows: Array) -> None:
    """Refuse training cases (n, 2) without an event."""
    if not rows[:, 1].any():
        raise CohortError(
            f"{target.name}: none of the {len(rows)} training cases has an event (column "
            f"{target.event!r} is 0 for all); survival can't be learned from censored times alone"
        )


def _at_bin(logits: Tensor, bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log h_Y, log S_{Y-1} and log S_Y, (B,) each."""
    step = torch.arange(logits.shape[1], device=logits.device)
    here = step == bins[:, None]
    survived = functional.logsigmoid(-logits)
    log_hazard = torch.where(here, functional.logsigmoid(logits), 0.0).sum(1)
    log_before = torch.where(step < bins[:, None], survived, 0.0).sum(1)
    return log_hazard, log_before, log_before + torch.where(here, survived, 0.0).sum(1)


def _log_survival_before(logits: Tensor) -> Tensor:
    """Return log S_{k-1} (B, K); by sums, as torch's cumsum is not deterministic on CUDA."""
    earlier = torch.ones(logits.shape[1], logits.shape[1], device=logits.device).tril(-1).bool()
    return torch.where(earlier, functional.logsigmoid(-logits)[:, None], 0.0).sum(2)
