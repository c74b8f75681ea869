"""Predictions of several members together: their mean, how far they are apart, and what is unlike.

The ensemble's prediction is the mean of the members' calibrated predictions, its threshold the mean
of theirs; the spread is the standard deviation over the members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from bagscope.errors import ArtifactError
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import Bags, ScoreKind
from bagscope.mil.cases import Case
from bagscope.mil.explain.contributions import contributions, whole_terms
from bagscope.mil.explain.members import joint_pool, joint_threshold, tiles_at_a_time
from bagscope.mil.explain.pools import AttentionPool, PackedPool, Pool, attention_terms
from bagscope.mil.explain.question import member_question
from bagscope.mil.explain.rollout import mean_ratios, tile_rollout
from bagscope.mil.inference import outputs
from bagscope.mil.member import Member
from bagscope.mil.objectives.fitted import FittedObjective
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
        member_scores: (members, n, K) float32, what that is the mean of (see `alike_scores`).
        tile_slide: (n,) index into the case's slides.
        contributions: (n, C) float32, what a tile adds to each logit, the mean over the members;
            None where a member's logits are no sum over tiles.
        contribution_bias: (C,) the mean of the logits less all that tiles add.
        pool: of the tiles, to be asked about the members' only target; None of several targets.
        rollout: (n,) float32, the mean over the members of n times where the weight came from
            through all layers; None where a member has none.
    """

    logits: Array
    embedding: NDArray[np.float32]
    ood_distance: Array
    scores: NDArray[np.float32]
    member_scores: NDArray[np.float32]
    score_kind: ScoreKind
    tile_slide: NDArray[np.int32]
    contributions: NDArray[np.float32] | None
    contribution_bias: Array | None
    pool: Pool | None
    rollout: NDArray[np.float32] | None


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
        found, asked, rolled = [], [], []
        for member, model in zip(self.members, self._models, strict=True):
            recipe = member.recipe
            ((bags, output),) = outputs(
                model,
                kept,
                recipe.bags,
                device=self._device,
                precision=recipe.training.precision,
                scale=member.scale,
            )
            found.append(output)
            asked.append(self._explained(member, model, bags))
            rolled.append(tile_rollout(model, bags))
        kinds = sorted({output.score_kind for output in found})
        if len(kinds) > 1:
            raise ArtifactError(
                f"{bag.case.case_id}: members give scores of kinds {' and '.join(kinds)}, which "
                "have no mean; ask them one by one, or the final model"
            )
        kind = found[0].score_kind
        each = [output.scores.double().cpu().numpy() for output in found]
        added = [one.added for one in asked if one.added is not None]
        biases = [one.bias for one in asked if one.bias is not None]
        pools = [one.pool for one in asked if one.pool is not None]
        sums = len(added) == len(asked)
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
            scores=mean_scores(each, kind),
            member_scores=alike_scores(each, kind),
            score_kind=kind,
            tile_slide=bag.tile_slide,
            contributions=np.mean(added, axis=0).astype(np.float32) if sums else None,
            contribution_bias=np.mean(biases, axis=0) if sums else None,
            pool=joint_pool(pools) if pools else None,
            rollout=mean_ratios(rolled),
        )

    def _explained(self, member: Member, model: Aggregator, bags: Bags) -> _Explained:
        """Return what a member's logits are made of, and its tiles to be asked about."""
        # As exact as the answer itself, and at the cost of about another one, which float64 is not.
        terms = attention_terms(model, bags, torch.float32)
        pool: Pool | None = None
        if len(member.targets) == 1:
            (target,) = member.targets
            threshold = joint_threshold(self.members, target.name)
            question = member_question(member, threshold=threshold)
            budget = tiles_at_a_time(member)
            pool = (
                PackedPool(model, bags, question, budget_tiles=budget)
                if terms is None
                else AttentionPool(terms, question)
            )
        summed = whole_terms(model, bags, torch.float32) if terms is None else terms
        if summed is None:
            return _Explained(added=None, bias=None, pool=pool)
        return _Explained(
            added=contributions(summed, [len(bags.features)]),
            bias=summed.bias.detach().double().cpu().numpy(),
            pool=pool,
        )


class _Explained(NamedTuple):
    """What each tile adds to a member's logits (n, C), the bias (C,), and the tiles' pool."""

    added: Array | None
    bias: Array | None
    pool: Pool | None


class _Kept:
    """A source of one bag that was read before, so that each member does not read it again."""

    def __init__(self, bag: CaseBag) -> None:
        self._bag = bag
        self.cases = (bag.case,)
        self.lengths = np.array([len(bag.features)], np.int64)
        self.dimension = int(bag.features.shape[1])

    def grid(self, index: int) -> NDArray[np.int32] | None:
        return self._bag.grid

    def parent(self, index: int) -> NDArray[np.int64] | None:
        return self._bag.parent

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


def alike_scores(scores: Sequence[Array], kind: ScoreKind) -> NDArray[np.float32]:
    """Return each member's scores (members, n, K) as `mean_scores` takes them into the mean.

    Log weights are stated such that the weights of a column add up to 1 over the bag.
    """
    if len({one.shape[1] for one in scores}) > 1:
        return np.stack([mean_scores(_columns(one), kind) for one in scores])
    return np.stack([mean_scores([one], kind) for one in scores])


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


def logit_names(objective: FittedObjective) -> tuple[str, ...]:
    """Return what each logit (C,) is of: a class of the only target, else its target and number."""
    alone = len(objective.targets) == 1
    names: list[str] = []
    for target in objective.targets:
        where = objective.slices[target.name]
        width = where.stop - where.start
        if target.task == "ordinal":
            own = [f"above {name}" for name in target.classes[:-1]]
        elif len(target.classes) == width:
            own = list(target.classes)
        else:
            own = [target.name] if width == 1 else [f"{target.name}:{k}" for k in range(width)]
        names += own if alone else [f"{target.name}:{name}" for name in own]
    return tuple(names)


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
