"""PackMIL's hyperslides: one label of several bags together, and what it costs to miss it.

P packs of B bags; `pack` (B,) int64 says whose each bag is, `weights` (B,) how much it counts (its
tiles, or 1).

classes    y = Σ weight · onehot, divided by its largest (a soft multi-hot) or by its sum
grade      ISUP as Gleason's patterns, merged by weighted means, and back to ISUP
survival   the earliest bin of time, and the share of the bags that are censored
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bagscope.mil.objectives.discrete_time import discrete_time_nll

Benign = Literal["alone", "zero", "published"]
"""How slides without cancer count: as 2 + 2, but grade 0 where all are (`alone`); as 0 + 0
(`zero`); as 2 + 2, which makes grade 1 of nothing but benign slides (`published`)."""
GRADES = 6
"""ISUP 0 to 5."""
_MAJOR = (2.0, 3.0, 3.0, 4.0, 4.0, 5.0)
_MINOR = (2.0, 3.0, 4.0, 3.0, 4.0, 5.0)


class Survived(NamedTuple):
    """The label of a hyperslide for survival.

    Attributes:
        event_bin: (P,) int64, where the event is counted.
        censored_bin: (P,) int64, up to where the censored share is followed.
        censored: (P,) share.
    """

    event_bin: Tensor
    censored_bin: Tensor
    censored: Tensor


def merged_classes(
    labels: Tensor, pack: Tensor, weights: Tensor, *, by: Literal["largest", "sum"] = "largest"
) -> Tensor:
    """Return the labels (P, C) of labels (B, C), 0 or 1; a row of zeros stays one."""
    summed = _summed(labels * weights[:, None], pack)
    whole = summed.amax(1, keepdim=True) if by == "largest" else summed.sum(1, keepdim=True)
    return summed / torch.where(whole > 0, whole, 1.0)


def merged_grades(
    grades: Tensor, pack: Tensor, weights: Tensor, benign: Benign = "alone"
) -> Tensor:
    """Return the grade of each pack, (P, 6), shared out between the two next to it.

    With the means M, m of major and minor pattern and s = M + m, the grade is s / 6 below 6, and
    then rises to 1, g₇, 4 and 5 at s = 6, 7, 8 and 9, with g₇ = 2 if m ≥ M, else 3.

    Args:
        grades: (B,) int64, ISUP 0 to 5.
        pack: (B,) int64.
        weights: (B,).
        benign: how grade 0 counts.
    """
    patterns = weights.new_tensor([_MAJOR, _MINOR])
    if benign == "zero":
        patterns[:, 0] = 0.0
    whole = _summed(weights[:, None], pack)
    means = _summed(patterns[:, grades].T * weights[:, None], pack) / whole
    major, minor = means.unbind(1)
    total = major + minor
    if benign == "alone":
        has_cancer = _summed((grades > 0).to(weights.dtype)[:, None], pack)[:, 0] > 0
        total = torch.where(has_cancer, total, 0.0)
    at_seven = torch.where(minor >= major, 2.0, 3.0).to(total.dtype)
    grade = torch.full_like(total, 5.0)
    for below, value in (
        (9.0, 4 + (total - 8)),
        (8.0, at_seven + (total - 7) * (4 - at_seven)),
        (7.0, 1 + (total - 6) * (at_seven - 1)),
        (6.0, total / 6),
    ):
        grade = torch.where(total < below, value, grade)
    lower = grade.floor().clamp(max=GRADES - 1)
    above = grade - lower
    upper = (lower + 1).clamp(max=GRADES - 1)
    shares = grade.new_zeros(len(grade), GRADES)
    shares.scatter_add_(1, lower.long()[:, None], (1 - above)[:, None])
    return shares.scatter_add_(1, upper.long()[:, None], above[:, None])


def merged_survival(bins: Tensor, censored: Tensor, pack: Tensor, weights: Tensor) -> Survived:
    """Return the label of each pack.

    The bag with the earliest bin decides, the first in the pack of several. Where its time is an
    event's, that is the label. Where it is censored, the hyperslide is followed up to there, and
    its event is the earliest of the pack, counted by the share of bags that are not censored.

    Args:
        bins: (B,) int64.
        censored: (B,) bool.
        pack: (B,) int64.
        weights: (B,).
    """
    packs, bags = int(pack.max()) + 1, len(bins)
    place = torch.arange(bags, device=bins.device)

    def earliest(rank: Tensor) -> Tensor:
        lowest = rank.new_full((packs,), torch.iinfo(rank.dtype).max)
        return lowest.scatter_reduce(0, pack, rank, "amin")

    first = earliest(bins * bags + place) % bags
    never = int(bins.max()) + 1
    event = earliest(torch.where(censored, never, bins))
    own, is_censored = bins[first], censored[first]
    share = _summed(torch.stack([weights * censored, weights], 1), pack)
    return Survived(
        event_bin=torch.where(is_censored & (event < never), event, own),
        censored_bin=own,
        censored=torch.where(is_censored, share[:, 0] / share[:, 1], 0.0),
    )


def focal(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return α (1 − p)^γ of the binary cross-entropy (P,), the mean over classes; p = exp(−it)."""
    each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (alpha * (-torch.expm1(-each)) ** gamma * each).mean(1)


def binary(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy (P,), the mean over classes."""
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy (P,) of labels that are shares and add up to one."""
    return -(labels * logits.log_softmax(1)).sum(1)


def asymmetric(
    logits: Tensor,
    index: Tensor,
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 4.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the asymmetric loss of a single label (P,), of classes `index` (P,).

    −Σ_c t_c w_c log p_c, w = (1 − p)^γ₊ of the class itself and p^γ₋ of the others; without
    smoothing of t, only the class itself is there.
    """
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    is_own = functional.one_hot(index, logits.shape[1]).bool()
    weights = torch.where(is_own, (1 - p) ** gamma_positive, p**gamma_negative)
    targets = is_own.to(p.dtype) * (1 - smoothing) + smoothing / logits.shape[1]
    return -(targets * weights * log_p).sum(1)


def survival_nll(logits: Tensor, label: Survived, *, alpha: float = 0.0) -> Tensor:
    """Return the likelihood (P,) of an event at its bin and of no event up to the censored one."""
    observed = discrete_time_nll(logits, label.event_bin, torch.ones_like(label.censored))
    followed = discrete_time_nll(
        logits, label.censored_bin, torch.zeros_like(label.censored), alpha=alpha
    )
    return (1 - label.censored) * observed + label.censored * followed


def log_probabilities(steps: Tensor) -> Tensor:
    """Return the logarithms (P, k) of the classes' probabilities, of an ordinal target's steps."""
    classes = steps.shape[1] + 1
    # By sums, as torch's cumsum is not deterministic on CUDA.
    is_passed = torch.ones(classes, classes - 1, device=steps.device).tril(-1).bool()
    reached = torch.where(is_passed, functional.logsigmoid(steps)[:, None], 0.0).sum(2)
    return reached + functional.pad(functional.logsigmoid(-steps), (0, 1))


def _summed(values: Tensor, pack: Tensor) -> Tensor:
    """Return the sums (P, C) of values (B, C) over the bags of each pack."""
    return values.new_zeros(int(pack.max()) + 1, values.shape[1]).index_add(0, pack, values)
