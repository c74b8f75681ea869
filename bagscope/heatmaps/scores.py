"""Scores of tiles on one scale with one meaning.

Letters: n tiles of a slide, N tiles of its bag (more than n where a patient has several slides),
K columns of scores, C classes; a_i the weight of tile i, which add up to 1 over the bag.

    ratio         N · a_i: 1 is what a tile would weigh if all weighed the same
    logit         the model's own number: log a_i of attention, else the tile's logit
    percentile    the share of the slide's tiles below a tile, in percent; ties share their middle
    probability   of a class for a tile alone
    contribution  what a tile adds to a class's logit: Σ_k a_ik v_ikc; negative speaks against it
    rollout       N · r_i: like the ratio, of the weight that came from the tile through all layers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import ArtifactError, ConfigError
from bagscope.heatmaps.choices import ScaleName
from bagscope.specs import did_you_mean

if TYPE_CHECKING:
    from bagscope.mil.bags import ScoreKind

Array = NDArray[np.float64]

Task = Literal["classes", "multilabel"]
"""Of which targets a logit has a probability: one class of several, or each class by itself."""

MEANINGS: dict[ScaleName, str] = {
    "ratio": "Attention relative to uniform",
    "logit": "The model's own number",
    "percentile": "Percentile within the slide",
    "probability": "Probability, each tile alone",
    "contribution": "Contribution to the logit",
    "rollout": "Attention through all layers relative to uniform",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """Which scores of a tile are shown: those of a class, or the mean of all columns."""

    name: str
    index: int | None


def scales_for(
    kind: ScoreKind, task: str | None, *, contributions: bool = False, rollout: bool = False
) -> tuple[ScaleName, ...]:
    """Return the scales that scores of a kind can be shown on, the usual one first.

    Args:
        kind: what a score is.
        task: of the model's target; None where it is not known or there are several.
        contributions: whether it is known what tiles add to the logits.
        rollout: whether it is known where the weight came from through all layers.
    """
    added: tuple[ScaleName, ...] = ("contribution",) if contributions else ()
    added += ("rollout",) if rollout else ()
    if kind == "log_weight":
        return ("ratio", "logit", "percentile", *added)
    if kind == "instance_logit" and task in ("classes", "multilabel"):
        return ("probability", "logit", "percentile", *added)
    return ("logit", "percentile", *added)


def require_scale(
    scale: ScaleName | None,
    kind: ScoreKind,
    task: str | None,
    *,
    contributions: bool = False,
    rollout: bool = False,
) -> ScaleName:
    """Return the scale to show, the usual one if None.

    Raises:
        ConfigError: scores of this kind can't be shown on it; says why and on which they can.
    """
    possible = scales_for(kind, task, contributions=contributions, rollout=rollout)
    if scale is None or scale in possible:
        return scale or possible[0]
    why = {
        "ratio": "has no attention weights",
        "probability": "does not score each tile as one of several classes",
        "contribution": "states no contributions in its score files: its logits are no sum over "
        "tiles, or the scores are of an older bagscope (predict anew)",
        "rollout": "states no rollout in its score files: it has no layers of attention to roll "
        "out, or the scores are of an older bagscope (predict anew)",
    }[scale]
    raise ConfigError(
        f"--scale {scale}: the model {why} (its scores are of kind {kind}); choose one of "
        f"{', '.join(possible)}"
    )


def pick_column(names: Sequence[str], wanted: str | None, predicted: str | None = None) -> Column:
    """Return which column to show.

    Without a wish it is, of two classes, the last (the one that a threshold is about); of more,
    the predicted one; and of columns that are no classes, the mean of all.

    Raises:
        ConfigError: no column of the wanted name.
    """
    if wanted is not None:
        if wanted not in names and all(name.isdigit() for name in names):
            raise ConfigError(
                f"--class {wanted!r}: the model's scores are the same for all classes; leave it out"
            )
        if wanted not in names:
            raise ConfigError(f"--class {wanted!r}: no such column{did_you_mean(wanted, names)}")
        return Column(name=wanted, index=list(names).index(wanted))
    if len(names) == 1:
        return Column(name="", index=0)
    if all(name.isdigit() for name in names):
        return Column(name="", index=None)
    if len(names) == 2 or predicted is None or predicted not in names:
        return Column(name=names[-1], index=len(names) - 1)
    return Column(name=predicted, index=list(names).index(predicted))


def on_scale(
    scores: NDArray[np.floating],
    kind: ScoreKind,
    scale: ScaleName,
    column: Column,
    *,
    bag_scores: NDArray[np.floating] | None = None,
    task: str | None = None,
) -> Array:
    """Return one number per tile (n,) on a scale.

    Args:
        scores: (n, K) of the slide's tiles.
        kind: what a score is.
        scale: to show them on.
        column: of the scores.
        bag_scores: (N, K) of all tiles of the bag; the slide's own if None.
        task: of the model's target, for probabilities.

    Raises:
        ConfigError: the scale is not for this kind.
        ArtifactError: scores that are no finite numbers, or no tile at all.
    """
    require_scale(scale, kind, task)
    bag_scores = scores if bag_scores is None else bag_scores
    for array in (scores, bag_scores):
        bad = int((~np.isfinite(array)).any(axis=1).sum())
        if bad or not len(array):
            what = f"{bad} of {len(array)} tiles have scores that are" if bad else "there are"
            raise ArtifactError(f"{what} no finite numbers; ask the model again with --overwrite")
    if scale == "probability":
        return _probabilities(np.asarray(scores, np.float64), column, task)
    own, bag = _column_of(scores, kind, column), _column_of(bag_scores, kind, column)
    if scale == "ratio":
        top = bag.max()
        # In this order equal scores give exactly 1.
        ratios: Array = np.exp(own - top) * len(bag) / np.exp(bag - top).sum()
        return ratios
    return percentiles(own) if scale == "percentile" else own


def percentiles(values: NDArray[np.floating]) -> Array:
    """Return the share of values (n,) below each, in percent; equal values share their middle."""
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, "left")
    through = np.searchsorted(ordered, values, "right")
    return np.asarray((below + through) * (50.0 / len(values)), np.float64)


def disagreement(each: NDArray[np.floating]) -> Array:
    """Return how far members (M, n), each on the same scale, are apart on every tile.

    It is the standard deviation over the members (M - 1), NaN of a single one.
    """
    members = np.asarray(each, np.float64)
    if len(members) == 1:
        return np.full(members.shape[1], np.nan)
    spread: Array = members.std(axis=0, ddof=1)
    return spread


def _column_of(scores: NDArray[np.floating], kind: ScoreKind, column: Column) -> Array:
    numbers = np.asarray(scores, np.float64)
    if column.index is not None:
        return numbers[:, column.index]
    if kind != "log_weight":
        mean: Array = numbers.mean(axis=1)
        return mean
    # Each column's weights add up to 1 over the bag, and so do their means.
    top = numbers.max(axis=1, keepdims=True)
    mean_log: Array = top[:, 0] + np.log(np.exp(numbers - top).mean(axis=1))
    return mean_log


def _probabilities(logits: Array, column: Column, task: str | None) -> Array:
    if task == "multilabel":
        each = 1 / (1 + np.exp(-logits))
    else:
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        each = odds / odds.sum(axis=1, keepdims=True)
    found: Array = each[:, -1 if column.index is None else column.index]
    return found
