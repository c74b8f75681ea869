"""Subjects of trained models: a case's tiles as each member sees them, asked about together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bagscope.errors import ArtifactError
from bagscope.mil.aggregators.registry import aggregator_entry
from bagscope.mil.bags import Bags
from bagscope.mil.explain.effects import Subject
from bagscope.mil.explain.pools import BUDGET_TILES, MeanPool, Pool, pool_of, with_donors
from bagscope.mil.explain.question import Array, member_question
from bagscope.mil.explain.rollout import mean_ratios, tile_rollout
from bagscope.mil.inference import DTYPES
from bagscope.mil.loading import Presentation, load_batch
from bagscope.mil.member import Member
from bagscope.mil.sources import BagSource


def member_bags(member: Member, source: BagSource, cases: Sequence[int]) -> Bags:
    """Return cases as a member sees them, in full and standardised as in its training.

    The first is the subject; the others' lattices lie beside its own.

    Raises:
        ArtifactError: features that are no finite numbers.
    """
    how = Presentation(
        spec=member.recipe.bags,
        dtype=DTYPES[member.recipe.training.precision],
        scale=member.scale,
    )
    subject, *donors = (load_batch(source, (case,), how) for case in cases)
    for bag in (subject, *donors):
        if not bool(torch.isfinite(bag.features).all()):
            raise ArtifactError(
                f"{bag.bag_ids[0]}: has features that are no finite numbers; extract them anew"
            )
    return with_donors(subject, *donors)


def member_subject(
    members: Sequence[Member],
    source: BagSource,
    case: int,
    *,
    donors: Sequence[int] = (),
    target: str | None = None,
    model_id: str = "",
    device: torch.device | str = "cpu",
    budget_tiles: int = BUDGET_TILES,
) -> Subject:
    """Return a case to be asked about; several members answer by their mean.

    The threshold is then the mean of theirs.

    Args:
        members: one or more.
        source: of the cases.
        case: place of the subject.
        donors: places of the cases that tiles may be taken from.
        target: what is asked; the first one where not given.
        model_id: for tables.
        device: that the models run on.
        budget_tiles: shown to a model at a time, where it has no closed form.
    """
    name = members[0].targets[0].name if target is None else target
    threshold = joint_threshold(members, name)
    pools: list[Pool] = []
    for member in members:
        bags = member_bags(member, source, (case, *donors)).to(device)
        question = member_question(member, name, threshold=threshold)
        budget = tiles_at_a_time(member, budget_tiles)
        pools.append(pool_of(member.model(device), bags, question, budget_tiles=budget))
    return Subject(bags=bags.to("cpu"), pool=joint_pool(pools), model_id=model_id)


def joint_threshold(members: Sequence[Member], target: str) -> float | None:
    """Return the mean of members' thresholds; None where one has none."""
    limits = [member.thresholds[target] for member in members if target in member.thresholds]
    return sum(limits) / len(limits) if len(limits) == len(members) else None


def tiles_at_a_time(member: Member, budget_tiles: int = BUDGET_TILES) -> int:
    """Return how many tiles a packed pool may show a member; 1 shows it every bag alone."""
    return 1 if aggregator_entry(member.recipe.aggregator.name).mixes_bags else budget_tiles


def joint_pool(pools: Sequence[Pool]) -> Pool:
    """Return the pool that answers by the mean of several."""
    return pools[0] if len(pools) == 1 else MeanPool(pools)


def member_scores(
    members: Sequence[Member],
    source: BagSource,
    case: int,
    *,
    device: torch.device | str = "cpu",
) -> list[Array]:
    """Return each member's own scores (n, K) of a case's tiles, for `faithfulness.agreement`."""
    found = []
    for member in members:
        bags = member_bags(member, source, (case,)).to(device)
        with torch.inference_mode():
            scores = member.model(device)(bags).scores
        found.append(np.asarray(scores.double().cpu().numpy()))
    return found


def member_rollout(
    members: Sequence[Member],
    source: BagSource,
    case: int,
    *,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32] | None:
    """Return the members' mean rollout of a case's tiles (n,), 1 what all would have alike.

    None where a member has none.
    """
    found = []
    for member in members:
        bags = member_bags(member, source, (case,)).to(device)
        found.append(tile_rollout(member.model(device), bags))
    return mean_ratios(found)
