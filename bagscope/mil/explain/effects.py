"""Counterfactual bags: what a prediction becomes when tiles are taken out, put in or repeated.

HIPPO's experiments (Kaczmarzyk et al. 2024) are interventions on a subject:

    necessity       `removal` of a region
    sufficiency     `keeping` a region alone; `addition` of it to another slide, whole or
                    `one_by_one`
    transplant      `swap` of a slide's tiles for a donor's
    dose–response   `doses`: a region left out, once, twice, ...

The number of tiles changes too, so every effect is to be held against as many random tiles
(`with_controls`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagscope.mil.bags import Bags, key_of
from bagscope.mil.explain.pools import Pool, Rows
from bagscope.mil.explain.question import NO_DECISION, Array

CONTROLS = 20
ROUNDING = 1e-12
"""What is nearer than this is equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A slide (or patient) that is asked about, with those that tiles are taken from.

    Attributes:
        bags: the subject's bag first, then the donors' (see `pools.with_donors`).
        pool: of all their tiles.
        model_id: of the model, seed or fold that answers.
    """

    bags: Bags
    pool: Pool
    model_id: str = ""

    @property
    def rows(self) -> Rows:
        """Return the subject's own rows in the pool."""
        return self.rows_of(0)

    def rows_of(self, bag: int) -> Rows:
        """Return the rows of a bag in the pool; those of the first donor are bag 1's."""
        start, stop = self.bags.cu_seqlens[bag : bag + 2].tolist()
        return np.arange(start, stop)

    def places(self, rows: Rows) -> Places:
        """Return where tiles of the pool come from."""
        bags = self.bags
        whose = np.searchsorted(bags.cu_seqlens.cpu().numpy(), rows, side="right") - 1
        names = np.array(bags.bag_ids)[whose]
        tile_row = rows - bags.cu_seqlens.cpu().numpy()[whose]
        if bags.tile_slide is not None and bags.tile_row is not None:
            names = np.array(bags.slide_ids)[bags.tile_slide.cpu().numpy()[rows]]
            tile_row = bags.tile_row.cpu().numpy()[rows].astype(np.int64)
        coords_l0 = None if bags.coords_l0 is None else bags.coords_l0.cpu().numpy()[rows]
        return Places(slide_ids=tuple(names.tolist()), rows=tile_row, coords_l0=coords_l0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where n tiles come from.

    Attributes:
        slide_ids: (n,) of each tile; its bag's name where slides are not known.
        rows: (n,) in that slide's feature file.
        coords_l0: (n, 2) level-0 (x, y), None where there are none.
    """

    slide_ids: tuple[str, ...]
    rows: Rows
    coords_l0: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervention:
    """An edit of the subject's bag, in rows of the pool.

    Attributes:
        name: such as "remove tumour".
        removed: of the subject's own rows.
        added: of any bag's; a row as often as it is added.
    """

    name: str
    removed: Rows
    added: Rows

    def selection(self, rows: Rows) -> Rows:
        """Return the edited bag of a subject with these rows."""
        return np.concatenate([np.setdiff1d(rows, self.removed), self.added])


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What an intervention did to a prediction.

    Attributes:
        slide_id: name of the subject's bag.
        intervention: its name.
        columns: (A,) of the answers.
        before: (A,) answers for the bag as it is.
        after: (A,) for the edited bag.
        decision_before: column decided for, -1 where nothing is decided.
        decision_after: likewise of the edited bag.
    """

    slide_id: str
    model_id: str
    intervention: str
    columns: tuple[str, ...]
    tiles_before: int
    tiles_after: int
    removed: Places
    added: Places
    before: Array
    after: Array
    decision_before: int
    decision_after: int

    @property
    def delta(self) -> Array:
        """Return (A,) what the edit added to each answer: after − before."""
        return self.after - self.before

    @property
    def removed_share(self) -> float:
        """Return the share of the bag's tiles that were taken out."""
        return len(self.removed) / self.tiles_before

    @property
    def flips(self) -> bool:
        """Return whether the decision changed."""
        return self.decision_before != self.decision_after


@dataclass(frozen=True, kw_only=True, slots=True)
class Controlled:
    """An effect beside those of as many random tiles.

    Attributes:
        controls: (draws, A) answers after the random edits.
    """

    effect: Effect
    controls: Array

    @property
    def excess(self) -> Array:
        """Return (A,) by how much the effect goes beyond the mean of the random ones."""
        return np.asarray(self.effect.after - self.controls.mean(axis=0))

    @property
    def p_value(self) -> Array:
        """Return (A,) how often random tiles change an answer at least as much, either way.

        (1 + those) / (1 + draws): never below 1 / (1 + draws).
        """
        least = np.abs(self.effect.delta) - ROUNDING
        reached = np.abs(self.controls - self.effect.before) >= least
        return np.asarray((1 + reached.sum(axis=0)) / (1 + len(reached)))


# --- interventions --------------------------------------------------------------------------


def removal(rows: Rows, name: str = "remove") -> Intervention:
    """Take the subject's rows out: are they necessary?"""
    return Intervention(name=name, removed=rows, added=_NONE)


def keeping(subject: Subject, rows: Rows, name: str = "keep only") -> Intervention:
    """Take all others out: do these rows suffice?"""
    return removal(np.setdiff1d(subject.rows, rows), name)


def addition(rows: Rows, name: str = "add") -> Intervention:
    """Put rows of a donor, or the subject's own once more, into its bag."""
    return Intervention(name=name, removed=_NONE, added=rows)


def one_by_one(rows: Rows, name: str = "add one") -> list[Intervention]:
    """Put each row in by itself: does a single tile suffice?"""
    return [addition(rows[place : place + 1], name) for place in range(len(rows))]


def swap(removed: Rows, added: Rows, name: str = "transplant") -> Intervention:
    """Take the subject's rows out and put a donor's in."""
    return Intervention(name=name, removed=removed, added=added)


def doses(
    rows: Rows, times: Sequence[int] = (0, 1, 2, 4, 8), name: str = "dose"
) -> list[Intervention]:
    """Have the subject's rows in its bag so many times; 0 leaves them out, 1 changes nothing."""
    return [
        removal(rows, f"{name} 0") if not n else addition(np.tile(rows, n - 1), f"{name} {n}")
        for n in times
    ]


def share_of(tiles: int, share: float) -> int:
    """Return how many tiles a share is, rounded up."""
    # Without the slack 0.07 of 100 were 8.
    return min(tiles, math.ceil(share * tiles - 1e-9))


def random_controls(
    subject: Subject, intervention: Intervention, *, draws: int = CONTROLS, seed: int = 0
) -> list[Intervention]:
    """Return edits of the same sizes with random tiles.

    As many of the subject's rows are removed. What is added is drawn from the bags that the added
    rows are of, as many from each, all different where they are.

    Args:
        subject: the slide.
        intervention: the edit to match.
        draws: how many.
        seed: with the slide's name and the intervention's it decides the draws.
    """
    key = key_of(f"{subject.bags.bag_ids[0]}\n{intervention.name}")
    generator = np.random.default_rng([seed, key])
    kinds, times = np.unique(intervention.added, return_counts=True)
    borders = subject.bags.cu_seqlens.cpu().numpy()
    whose = np.searchsorted(borders, kinds, side="right") - 1
    found = []
    for _ in range(draws):
        removed = generator.choice(subject.rows, len(intervention.removed), replace=False)
        added = [
            np.repeat(
                generator.choice(
                    subject.rows_of(int(bag)), int((whose == bag).sum()), replace=False
                ),
                times[whose == bag],
            )
            for bag in np.unique(whose)
        ]
        found.append(
            Intervention(
                name=f"{intervention.name} (random)",
                removed=np.sort(removed),
                added=np.concatenate([_NONE, *added]),
            )
        )
    return found


# --- measuring ------------------------------------------------------------------------------


def measure(subject: Subject, interventions: Sequence[Intervention]) -> list[Effect]:
    """Return the effect of each intervention, all asked together.

    Raises:
        ValueError: rows that are not there, or an edit that leaves no tile.
    """
    rows = subject.rows
    for intervention in interventions:
        _require(subject, intervention)
    edited = (intervention.selection(rows) for intervention in interventions)
    answers = subject.pool.answers(chain([rows], edited))
    question = subject.pool.question
    decided = question.decided(answers).tolist()
    return [
        Effect(
            slide_id=subject.bags.bag_ids[0],
            model_id=subject.model_id,
            intervention=intervention.name,
            columns=question.columns,
            tiles_before=len(rows),
            tiles_after=len(rows) - len(intervention.removed) + len(intervention.added),
            removed=subject.places(intervention.removed),
            added=subject.places(intervention.added),
            before=answers[0],
            after=answers[place],
            decision_before=decided[0],
            decision_after=decided[place],
        )
        for place, intervention in enumerate(interventions, start=1)
    ]


def with_controls(
    subject: Subject, intervention: Intervention, *, draws: int = CONTROLS, seed: int = 0
) -> Controlled:
    """Return an intervention's effect beside those of as many random tiles."""
    random = random_controls(subject, intervention, draws=draws, seed=seed)
    effect, *others = measure(subject, [intervention, *random])
    return Controlled(effect=effect, controls=np.stack([other.after for other in others]))


# --- tables ---------------------------------------------------------------------------------


def effect_table(effects: Sequence[Effect]) -> dict[str, list[Any]]:
    """Return a row per effect, by column; effects must answer the same question."""
    columns = effects[0].columns if effects else ()
    if any(effect.columns != columns for effect in effects):
        raise ValueError("effects of different targets belong into tables of their own")
    table: dict[str, list[Any]] = {
        "effect": list(range(len(effects))),
        "slide_id": [effect.slide_id for effect in effects],
        "model_id": [effect.model_id for effect in effects],
        "intervention": [effect.intervention for effect in effects],
        "tiles_before": [effect.tiles_before for effect in effects],
        "tiles_removed": [len(effect.removed) for effect in effects],
        "tiles_added": [len(effect.added) for effect in effects],
        "tiles_after": [effect.tiles_after for effect in effects],
        "removed_share": [effect.removed_share for effect in effects],
    }
    for place, column in enumerate(columns):
        table[f"before_{column}"] = [float(effect.before[place]) for effect in effects]
        table[f"after_{column}"] = [float(effect.after[place]) for effect in effects]
        table[f"delta_{column}"] = [float(effect.delta[place]) for effect in effects]
    for when in ("before", "after"):
        decided = [getattr(effect, f"decision_{when}") for effect in effects]
        table[f"decision_{when}"] = ["" if d == NO_DECISION else columns[d] for d in decided]
    table["flips"] = [int(effect.flips) for effect in effects]
    return table


def tile_table(effects: Sequence[Effect]) -> dict[str, list[Any]]:
    """Return a row per tile that was removed or added; `effect` is the row of `effect_table`."""
    table: dict[str, list[Any]] = {
        name: [] for name in ("effect", "role", "slide_id", "tile_row", "x_l0", "y_l0")
    }
    for number, effect in enumerate(effects):
        for role, places in (("removed", effect.removed), ("added", effect.added)):
            xy = places.coords_l0
            count = len(places)
            table["effect"] += [number] * count
            table["role"] += [role] * count
            table["slide_id"] += places.slide_ids
            table["tile_row"] += places.rows.tolist()
            table["x_l0"] += [""] * count if xy is None else xy[:, 0].tolist()
            table["y_l0"] += [""] * count if xy is None else xy[:, 1].tolist()
    return table


_NONE: Rows = np.zeros(0, np.int64)


def _require(subject: Subject, intervention: Intervention) -> None:
    own, removed, added = subject.rows, intervention.removed, intervention.added
    name = f"{subject.bags.bag_ids[0]}, {intervention.name}"
    if len(np.unique(removed)) < len(removed) or not np.isin(removed, own).all():
        raise ValueError(
            f"{name}: rows to remove must be the slide's own 0 to {len(own) - 1}, each once"
        )
    if len(added) and not (added.min() >= 0 and added.max() < subject.pool.tiles):
        raise ValueError(
            f"{name}: rows to add run from {added.min()} to {added.max()}; the pool has "
            f"{subject.pool.tiles} tiles"
        )
    if len(own) == len(removed) and not len(added):
        raise ValueError(
            f"{name}: takes out all {len(own)} tiles, and a bag without a tile has no prediction; "
            "leave this slide out"
        )
