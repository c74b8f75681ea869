"""Scores of finer tiles, on the scale of the slide's own bag.

N tiles of the bag that the slide was predicted from, as they are stored; x a finer tile that is no
part of it; m a member of M; e a logit of attention.

    log weight      log a(x) = log mean_m exp(e_m(x) - log Z_m),   Z_m = Σ_i exp(e_m(i)) over the N
    ratio           N · a(x)
    contribution    mean_m Σ_k a_mk(x) v_mk(x)
    tile's logit    mean_m of its own; its probability is that of a tile alone, as ever
    percentile      of the slide's stored tiles, the share below x

The normaliser Z is that of the stored bag and does not change: a finer tile has the weight that it
would have in the place of a stored tile that scores the same. One that coincides with a stored tile
has its score. All this needs a score that is the tile's own, which is checked: the stored tiles,
shown beside the finer ones, must score as they did by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from bagscope.errors import ArtifactError, ConfigError
from bagscope.heatmaps.choices import ScaleName
from bagscope.heatmaps.scores import Column, on_scale
from bagscope.mil.bags import Bags, PoolingTerms, ScoreKind
from bagscope.mil.explain.members import member_bags
from bagscope.mil.explain.pools import attention_terms, packed
from bagscope.mil.member import Member
from bagscope.mil.sources import CaseBag, Rows

Array = NDArray[np.float64]

_TOLERANCE = {"float32": 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1
"""Of a score, in units of its own: rounding alone does more where members compute in 16 bits."""
_SAME = 1e-5
"""Of the range of a slide's scores: nearer ones count as equal in a percentile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FineScores:
    """Scores of finer tiles: the mean over the members.

    Attributes:
        kind: what a score is.
        scores: (n, K); weights count as if the tile stood in the bag.
        contributions: (n, C) to each logit; None where not asked for.
    """

    kind: ScoreKind
    scores: Array
    contributions: Array | None


def fine_scores(
    members: Sequence[Member],
    stored: CaseBag,
    fine: CaseBag,
    known: NDArray[np.floating[Any]],
    *,
    wants_contributions: bool = False,
    device: torch.device | str = "cpu",
) -> FineScores:
    """Ask members about finer tiles beside the stored ones.

    Args:
        members: those that the stored scores are of.
        stored: the bag that the slide was predicted from.
        fine: the finer tiles.
        known: (N, K) the stored bag's scores, the mean over the members.
        wants_contributions: to the logits.
        device: that the models run on.

    Raises:
        ArtifactError: members or features are not those of the stored scores, or a member's score
            of a tile is not the tile's own.
        ConfigError: contributions of a model whose logits are no sum over tiles.
    """
    count = len(stored.features)
    source = _TwoBags((stored, fine))
    beside, own, added = [], [], []
    kind: ScoreKind = "logit"
    for member in members:
        bag = _joint(member_bags(member, source, (0, 1)).to(device))
        model = member.model(device)
        with torch.inference_mode():
            output = model(bag)
        scores = output.scores.double().cpu().numpy()
        kind = output.score_kind
        weighs = kind == "log_weight"
        terms = attention_terms(model, bag) if weighs or wants_contributions else None
        if weighs:
            scores = _log_weights(scores, terms, count, _tolerance([member]))
        beside.append(scores[:count])
        own.append(scores[count:])
        if wants_contributions:
            added.append(_contributions(terms, count))
    _require_own(_mean(beside, kind), known, members, kind)
    return FineScores(
        kind=kind,
        scores=_mean(own, kind),
        contributions=np.mean(added, axis=0) if added else None,
    )


def on_the_slide_s_scale(
    fine: FineScores,
    scale: ScaleName,
    column: Column,
    *,
    slide: NDArray[np.floating[Any]],
    bag: NDArray[np.floating[Any]],
    task: str | None = None,
) -> Array:
    """Return one number (n,) per finer tile on a scale.

    Args:
        fine: of the finer tiles.
        scale: to show them on.
        column: of the scores, or of the contributions.
        slide: (n', K) scores of the slide's stored tiles, which a percentile is among.
        bag: (N, K) scores of all tiles of the stored bag.
        task: of the model's target, for probabilities.

    Raises:
        ArtifactError: scores that are no finite numbers.
        ConfigError: the scale is not for this kind.
    """
    if scale == "contribution":
        assert fine.contributions is not None, "asked for together with the scores"
        assert column.index is not None, "contributions have no mean over classes"
        found: Array = fine.contributions[:, column.index]
        return found
    if scale == "percentile":
        among = on_scale(slide, fine.kind, "logit", column, bag_scores=bag)
        return _percentiles(on_scale(fine.scores, fine.kind, "logit", column), among)
    return on_scale(fine.scores, fine.kind, scale, column, bag_scores=bag, task=task)


# --- members --------------------------------------------------------------------------------


class _TwoBags:
    """A source of two bags that were read before."""

    def __init__(self, bags: tuple[CaseBag, CaseBag]) -> None:
        self._bags = bags
        self.cases = tuple(bag.case for bag in bags)
        self.lengths = np.array([len(bag.features) for bag in bags], np.int64)
        self.dimension = int(bags[0].features.shape[1])

    def grid(self, index: int) -> NDArray[np.int32] | None:
        return self._bags[index].grid

    def parent(self, index: int) -> NDArray[np.int64] | None:
        return self._bags[index].parent

    def read(self, index: int, rows: Rows | None = None) -> CaseBag:
        assert rows is None, "members are asked about whole bags"
        return self._bags[index]


def _joint(bags: Bags) -> Bags:
    """Return all tiles as one bag."""
    return packed(bags, [np.arange(len(bags.features))])


def _log_weights(scores: Array, terms: PoolingTerms | None, count: int, tolerance: float) -> Array:
    """Return scores such that the weights of the first `count` tiles add up to 1.

    A model with several branches may state their mean weight, which has no normaliser of its own:
    then the branches are normalised, where they are known to be what the mean is of.
    """
    if terms is not None:
        branches = terms.scores.double().cpu().numpy()
        width = scores.shape[1]
        stated = _as_stated(branches - special.logsumexp(branches, axis=0), width)
        said = scores - special.logsumexp(scores, axis=0)
        apart = np.abs(np.exp(stated) - np.exp(said)) if stated.shape == said.shape else np.inf
        if np.max(apart) * len(scores) <= tolerance:
            return _as_stated(branches - special.logsumexp(branches[:count], axis=0), width)
    return np.asarray(scores - special.logsumexp(scores[:count], axis=0))


def _as_stated(log_weights: Array, width: int) -> Array:
    """Return log weights (T, K) as a model states them: each column, or their mean."""
    if log_weights.shape[1] == width or width != 1:
        return log_weights
    mean = special.logsumexp(log_weights, axis=1, keepdims=True) - math.log(log_weights.shape[1])
    return np.asarray(mean)


def _contributions(terms: PoolingTerms | None, count: int) -> Array:
    """Return what the tiles behind the first `count` would add to each logit: (n, C)."""
    if terms is None:
        raise ConfigError(
            "--scale contribution: the model's logits are no sum of what tiles add by themselves, "
            "so a finer tile has no contribution; choose another scale"
        )
    scores = terms.scores.double().cpu().numpy()
    weights = np.exp(scores[count:] - special.logsumexp(scores[:count], axis=0))
    values = terms.values.double().cpu().numpy()[count:]
    return np.asarray(np.einsum("tk,tkc->tc", weights, values))


def _mean(scores: Sequence[Array], kind: ScoreKind) -> Array:
    """Return the mean over members (n, K); where their columns differ, the mean of all (n, 1)."""
    if len({one.shape[1] for one in scores}) > 1:
        scores = [_mean([column[:, None] for column in one.T], kind) for one in scores]
    stacked = np.stack(scores)
    if kind == "log_weight":
        return np.asarray(special.logsumexp(stacked, axis=0) - math.log(len(stacked)))
    return np.asarray(stacked.mean(axis=0))


def _require_own(
    beside: Array, known: NDArray[np.floating[Any]], members: Sequence[Member], kind: ScoreKind
) -> None:
    """Refuse where stored tiles score otherwise beside finer ones than they did by themselves."""
    expected = np.asarray(known, np.float64)
    if beside.shape == expected.shape:
        if kind == "log_weight":  # what has no weight has no exact logarithm either
            expected = expected - special.logsumexp(expected, axis=0)
            beside, expected = len(beside) * np.exp(beside), len(beside) * np.exp(expected)
        apart = float(np.abs(beside - expected).max() / max(1.0, np.abs(expected).max()))
        if apart <= _tolerance(members):
            return
        found = f"differ by {apart:.2g} of the highest"
    else:
        found = f"are {beside.shape} in place of {expected.shape} numbers"
    raise ArtifactError(
        f"the stored tiles' scores, asked for beside the finer ones, {found}: the model's score of "
        "a tile depends on the tiles beside it, or the stored scores are not of these features; a "
        "finer pass has no scale to be drawn on"
    )


def _tolerance(members: Sequence[Member]) -> float:
    precisions = {member.recipe.training.precision for member in members}
    return max(_TOLERANCE.get(one, _LOW_PRECISION_TOLERANCE) for one in precisions)


def _percentiles(values: Array, among: Array) -> Array:
    """Return the share of `among` below each value, in percent; equal ones share their middle."""
    ordered = np.sort(among)
    near = _SAME * max(1e-12, float(ordered[-1] - ordered[0]))
    below = np.searchsorted(ordered, values - near, "left")
    through = np.searchsorted(ordered, values + near, "right")
    return np.asarray((below + through) * (50.0 / len(ordered)), np.float64)
