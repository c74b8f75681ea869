"""Predictions of several members together: their mean, how far they are apart, and what is unlike.

The ensemble's prediction is the mean of the members' calibrated predictions, its threshold the mean
of theirs; the spread is the standard deviation over the members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from bagscope.errors import ArtifactError
from bagscope.mil.bags import ScoreKind
from bagscope.mil.cases import Case
from bagscope.mil.inference import outputs
from bagscope.mil.member import Member
from bagscope.mil.ood import moments_of, ood_distance
from bagscope.mil.prediction_table import target_columns
from bagscope.mil.sources import BagSource, CaseBag, Rows
from bagscope.mil.targets import TargetSpec

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What members say of one case.

    Attributes:
        logits: (members, C).
        embedding: (members, E); NaN beyond the width of a member that was tuned to a smaller one.
        ood_distance: (members,) in units of each member's limit; NaN where unknown.
        scores: (n, K) float32, the mean over the members (see `mean_scores`).
        tile_slide: (n,) index into the case's slides.
    """

    logits: Array
    embedding: NDArray[np.float32]
    ood_distance: Array
    scores: NDArray[np.float32]
    score_kind: ScoreKind
    tile_slide: NDArray[np.int32]


class Panel:
    """Members with their models built once, to be asked about one case after another."""

    def __init__(self, members: Sequence[Member], device: torch.device | str = "cpu") -> None:
        self.members = tuple(members)
        self._device = device
        self._models = [member.model(device) for member in self.members]

    def ask(self, source: BagSource) -> Answer:
        """Return what the members say of a source's only case.

        Raises:
            ArtifactError: features that are no finite numbers.
        """
        bag = source.read(0)
        if not np.isfinite(bag.features).all():
            raise ArtifactError(
                f"{bag.case.case_id}: has features that are no finite numbers; extract them anew"
            )
        moments = moments_of(bag.features)
        kept = _Kept(bag)
        found = []
        for member, model in zip(self.members, self._models, strict=True):
            recipe = member.recipe
            ((_, output),) = outputs(
                model,
                kept,
                recipe.bags,
                device=self._device,
                precision=recipe.training.precision,
                scale=member.scale,
            )
            found.append(output)
        kinds = sorted({output.score_kind for output in found})
        if len(kinds) > 1:
            raise ArtifactError(
                f"{bag.case.case_id}: members give scores of kinds {' and '.join(kinds)}, which "
                "have no mean; ask them one by one, or the final model"
            )
        return Answer(
            logits=np.stack([output.logits[0].double().cpu().numpy() for output in found]),
            embedding=_side_by_side(
                [output.embedding[0].float().cpu().numpy() for output in found]
            ),
            ood_distance=np.array(
                [
                    math.nan
                    if member.ood is None
                    else ood_distance(moments, member.statistics, member.ood)
                    for member in self.members
                ]
            ),
            scores=mean_scores(
                [output.scores.double().cpu().numpy() for output in found], found[0].score_kind
            ),
            score_kind=found[0].score_kind,
            tile_slide=bag.tile_slide,
        )


class _Kept:
    """A source of one bag that was read before, so that each member does not read it again."""

    def __init__(self, bag: CaseBag) -> None:
        self._bag = bag
        self.cases = (bag.case,)
        self.lengths = np.array([len(bag.features)], np.int64)
        self.dimension = int(bag.features.shape[1])

    def grid(self, index: int) -> NDArray[np.int32] | None:
        return self._bag.grid

    def read(self, index: int, rows: Rows | None = None) -> CaseBag:
        assert rows is None, "members are asked about whole bags"
        return self._bag


def mean_scores(scores: Sequence[Array], kind: ScoreKind) -> NDArray[np.float32]:
    """Return the members' mean scores (n, K) of one bag's tiles.

    Of log weights, which each member states up to a constant, it is the log of the mean weight: the
    weights of a column add up to 1 over the bag. Of logits it is their mean. Where members have
    numbers of columns of their own, each member's columns are averaged first.
    """
    if len({one.shape[1] for one in scores}) > 1:
        return mean_scores([mean_scores(_columns(one), kind).astype(float) for one in scores], kind)
    if kind == "log_weight":
        weights = [special.log_softmax(one, axis=0) for one in scores]
        mean = special.logsumexp(np.stack(weights), axis=0) - math.log(len(scores))
    else:
        mean = np.mean(np.stack(scores), axis=0)
    return np.asarray(mean, np.float32)


def _columns(scores: Array) -> list[Array]:
    return [scores[:, place, None] for place in range(scores.shape[1])]


def _side_by_side(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    found = np.full((len(rows), max(map(len, rows))), np.nan, np.float32)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


def score_names(targets: Sequence[TargetSpec], columns: int) -> tuple[str, ...]:
    """Return what each column of scores is of: a class where there is one each, else its number."""
    classes = targets[0].classes if len(targets) == 1 else ()
    return classes if len(classes) == columns else tuple(map(str, range(columns)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What members say together, by target.

    Attributes:
        values: mean of the members' calibrated predictions, shaped as the objective's.
        spread: standard deviation over the members (n - 1), NaN of a single one.
        columns: name of each column of the values.
        thresholds: of the last of two classes, the mean of the members'.
    """

    values: Mapping[str, Array]
    spread: Mapping[str, Array]
    columns: Mapping[str, tuple[str, ...]]
    thresholds: Mapping[str, float]


def combine(members: Sequence[Member], logits: Array) -> Predicted:
    """Return the joint prediction of members' logits (members, n, C).

    Of survival, columns that not all members have (their time bins are those of their own training
    patients) are left out.
    """
    values: dict[str, Array] = {}
    spread: dict[str, Array] = {}
    columns: dict[str, tuple[str, ...]] = {}
    thresholds: dict[str, float] = {}
    each = [member.predictions(one) for member, one in zip(members, logits, strict=True)]
    for target in members[0].targets:
        name = target.name
        names = [member.objective.columns[name] for member in members]
        found = [predicted[name] for predicted in each]
        columns[name] = names[0]
        if target.task == "survival":
            shared = [column for column in names[0] if all(column in one for one in names)]
            columns[name] = tuple(shared)
            found = [
                one[:, [own.index(column) for column in shared]]
                for one, own in zip(found, names, strict=True)
            ]
        stacked = np.stack(found)
        values[name] = stacked.mean(axis=0)
        alone = len(members) == 1
        spread[name] = np.full_like(values[name], np.nan) if alone else stacked.std(axis=0, ddof=1)
        limits = [member.thresholds[name] for member in members if name in member.thresholds]
        if len(limits) == len(members):
            thresholds[name] = float(np.mean(limits))
    return Predicted(values=values, spread=spread, columns=columns, thresholds=thresholds)


def prediction_columns(
    targets: Sequence[TargetSpec], cases: Sequence[Case], predicted: Predicted
) -> dict[str, list[Any]]:
    """Return the targets' columns of a table: labels, predictions and the members' spread."""
    table: dict[str, list[Any]] = {}
    for target in targets:
        name = target.name
        labels = [case.targets.get(name, (math.nan,)) for case in cases]
        own = predicted.columns[name]
        threshold = predicted.thresholds.get(name)
        table |= target_columns(target, labels, predicted.values[name], own, threshold)
        spread = predicted.spread[name]
        columns = spread[:, None] if spread.ndim == 1 else spread
        for place, column in enumerate(_spread_names(target, own)):
            table[column] = [_text(value) for value in columns[:, place]]
    return table


def ood_columns(distances: Array) -> dict[str, list[str]]:
    """Return the columns of the mean distance over the members (members, n), and of the flag."""
    mean = distances.mean(axis=0)
    return {
        "ood_distance": [_text(value) for value in mean],
        "ood": ["" if math.isnan(value) else str(int(value > 1)) for value in mean],
    }


def _spread_names(target: TargetSpec, columns: Sequence[str]) -> list[str]:
    if target.task == "regression":
        return [f"{target.name}_sd"]
    names = columns if target.task == "survival" else target.classes
    return [f"{target.name}_sd_{column}" for column in names]


def _text(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.6g}"
