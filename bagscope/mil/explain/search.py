"""Greedy search for the tiles that a prediction rests on, or that it can do without.

remaining = all; each round asks F(remaining without i) for every i that remains and takes out

    minimise              the i that leaves F lowest: a region of high effect
    maximise              the i that leaves it highest: what speaks against
    smallest_difference   the i that changes it least: a region of low effect

(HIPPO, Kaczmarzyk et al. 2024). A round is one pass over the tiles in the closed form of attention
pooling, and as many bags as tiles remain for any other model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from bagscope.mil.explain.effects import ROUNDING, Subject
from bagscope.mil.explain.pools import Pool, Rows
from bagscope.mil.explain.question import Array

Optimiser = Literal["minimise", "maximise", "smallest_difference"]
Constants = Literal["kept", "baseline_only"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What a search took out.

    Attributes:
        order: (R,) rows of the pool, in the order in which they were taken out.
        answers: (R + 1, A); row k is after the first k.
        column: of the answers that was optimised.
        tiles: of the bag before the search.
    """

    order: Rows
    answers: Array
    column: int
    optimiser: Optimiser
    tiles: int


def greedy_search(
    pool: Pool,
    rows: Rows,
    *,
    column: int,
    optimiser: Optimiser = "minimise",
    rounds: int | None = None,
    constant: Rows | None = None,
    constants: Constants = "kept",
) -> Search:
    """Take tiles out one after another.

    Args:
        pool: that the tiles are in.
        rows: that may be taken out, all different.
        column: of the answers that is optimised.
        optimiser: what is looked for.
        rounds: tiles to take out; None for all but one.
        constant: rows that are in the bag and never taken out.
        constants: "baseline_only" has them in the first answer alone, as the reference code does.

    Raises:
        ValueError: options out of their range.
    """
    fixed = np.zeros(0, np.int64) if constant is None else constant
    kept = fixed if constants == "kept" else fixed[:0]
    rounds = len(rows) - 1 if rounds is None else rounds
    most = len(rows) if len(kept) else len(rows) - 1
    if optimiser not in get_args(Optimiser):
        known = ", ".join(get_args(Optimiser))
        raise ValueError(f"optimiser is {optimiser!r}; choose one of {known}")
    if not 0 <= rounds <= most:
        raise ValueError(f"rounds is {rounds}; of {len(rows)} tiles 0 to {most} can be taken out")
    remaining = rows
    answers = [pool.answers([np.concatenate([rows, fixed])])[0]]
    order = []
    for _ in range(rounds):
        found = pool.without_each(np.concatenate([remaining, kept]), len(remaining))
        place = _best(found[:, column], answers[-1][column], optimiser)
        order.append(remaining[place])
        answers.append(found[place])
        remaining = np.delete(remaining, place)
    return Search(
        order=np.array(order, np.int64),
        answers=np.stack(answers),
        column=column,
        optimiser=optimiser,
        tiles=len(rows) + len(fixed),
    )


def search_table(subject: Subject, search: Search) -> dict[str, list[Any]]:
    """Return the search as a table: a row for the whole bag, then one per tile taken out."""
    places = subject.places(search.order)
    removed = range(len(search.answers))
    xy = places.coords_l0
    table: dict[str, list[Any]] = {
        "removed": list(removed),
        "removed_share": [count / search.tiles for count in removed],
        "slide_id": [subject.bags.bag_ids[0], *places.slide_ids],
        "tile_row": ["", *places.rows.tolist()],
        "x_l0": ["", *([""] * len(places) if xy is None else xy[:, 0].tolist())],
        "y_l0": ["", *([""] * len(places) if xy is None else xy[:, 1].tolist())],
    }
    for place, name in enumerate(subject.pool.question.columns):
        table[name] = search.answers[:, place].tolist()
    return table


def _best(found: Array, baseline: float, optimiser: Optimiser) -> int:
    """Return the place of the lowest cost, the first of equals: rounding is not to choose."""
    if optimiser == "minimise":
        costs = found
    elif optimiser == "maximise":
        costs = -found
    else:
        costs = np.abs(found - baseline)
    return int(np.argmax(costs <= costs.min() + ROUNDING))
