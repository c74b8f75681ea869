"""The parts of an explanation: a case, the scores of its tiles, and what becomes of its prediction.

"Hottest" is by the scores that the heatmap shows. Every effect stands beside those of as many
random tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bagscope.mil.explain.attribution import leave_one_out
from bagscope.mil.explain.effects import (
    Controlled,
    Intervention,
    Subject,
    addition,
    doses,
    keeping,
    removal,
    share_of,
    swap,
    with_controls,
)
from bagscope.mil.explain.faithfulness import Faithfulness, faithfulness, order_of
from bagscope.mil.explain.pools import Rows
from bagscope.mil.explain.question import Array
from bagscope.mil.explain.search import Search, greedy_search
from bagscope.pipeline.explain_options import (
    DOSES,
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    MOST_TILE_PASSES,
    SEARCH_SHARE,
    ExplainOptions,
    Method,
)

HIGH, LOW = "high effect", "low effect"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What an explanation is of.

    Attributes:
        subject: the case, its donor behind it.
        scores: (n,) of the case's tiles, higher is hotter.
        column: of the answers.
        is_closed: whether the model answers in closed form, so that leaving tiles out is cheap.
        unit: what an answer counts in, for the judgement of a heatmap.
        marked: rows of the case inside annotations, None where there are none to ask about.
        donated: rows of the pool that are transplanted, hottest first; None for no donor.
        donor: its name, and where its tiles come from.
    """

    subject: Subject
    scores: Array
    column: int
    is_closed: bool
    unit: float = 1.0
    marked: Rows | None = None
    donated: Rows | None = None
    donor: str = ""
    donor_region: bool = False


@dataclass(kw_only=True, slots=True)
class Parts:
    """What was found out about a case.

    Attributes:
        effects: with the experiment that each belongs to.
        searches: by what was looked for.
        per_tile: (n,) by name.
        left_out: a sentence for each part that is not there.
    """

    effects: list[tuple[str, Controlled]] = field(default_factory=list)
    searches: dict[str, Search] = field(default_factory=dict)
    per_tile: dict[str, Array] = field(default_factory=dict)
    faithfulness: Faithfulness | None = None
    left_out: list[str] = field(default_factory=list)


def parts_of(asked: Asked, options: ExplainOptions) -> Parts:
    """Do the experiments and the searches, leave each tile out, and judge the heatmap."""
    subject = asked.subject
    rows, pool = subject.rows, subject.pool
    found = Parts()
    if len(rows) == 1:
        found.left_out.append("The slide has a single tile: there is nothing to take out.")
        return found
    wanted = set(options.wanted)
    for experiment, intervention in interventions(asked, options, found.left_out):
        measured = with_controls(subject, intervention, draws=options.controls, seed=options.seed)
        found.effects.append((experiment, measured))
    rounds = rounds_of(len(rows), options)
    if "search" in wanted and _is_worth_it(asked, "search", 2 * rounds, options, found.left_out):
        for name, optimiser in ((HIGH, "minimise"), (LOW, "smallest_difference")):
            found.searches[name] = greedy_search(
                pool,
                rows,
                column=asked.column,
                optimiser=optimiser,  # type: ignore[arg-type]  # of the pairs above
                rounds=rounds,
            )
    if "leave-one-out" in wanted and _is_worth_it(
        asked, "leave-one-out", 1, options, found.left_out
    ):
        found.per_tile["leave_one_out"] = leave_one_out(pool, rows)[:, asked.column]
    if "faithfulness" in wanted:
        found.faithfulness = faithfulness(
            pool, rows, asked.scores, column=asked.column, seed=options.seed, unit=asked.unit
        )
    return found


def interventions(
    asked: Asked, options: ExplainOptions, left_out: list[str]
) -> list[tuple[str, Intervention]]:
    """Return the edits to measure, each with its experiment; `left_out` is told of the others."""
    subject, wanted = asked.subject, set(options.wanted)
    rows = subject.rows
    hottest = rows[order_of(asked.scores)]
    found: list[tuple[str, Intervention]] = []
    # On a small slide two shares may be as many tiles; over a cohort each needs all slides.
    counts = [
        (min(share_of(len(rows), share), len(rows) - 1), share) for share in sorted(options.shares)
    ]
    tops = [(hottest[:count], f"hottest {100 * share:.4g} %") for count, share in counts]
    marked = asked.marked
    if marked is not None and len(marked) in (0, len(rows)):
        which = "no" if not len(marked) else "every"
        left_out.append(f"Annotations: {which} tile of the case lies inside, nothing to compare.")
        marked = None
    if marked is not None:
        tops.append((marked, "annotated tiles"))
    for top, name in tops:
        if "necessity" in wanted:
            found.append(("necessity", removal(top, f"remove {name}")))
        if "sufficiency" in wanted:
            found.append(("sufficiency", keeping(subject, top, f"keep only {name}")))
    if "dose" in wanted:
        count = min(share_of(len(rows), options.dose_share), len(rows) - 1)
        repeated = [(hottest[:count], f"hottest {100 * options.dose_share:.4g} % ×")]
        repeated += [] if marked is None else [(marked, "annotated tiles ×")]
        for top, name in repeated:
            found += [("dose–response", one) for one in doses(top, DOSES, name)]
    if asked.donated is not None:
        found += [("transplant", one) for one in _transplants(asked, hottest, counts)]
    return found


def rounds_of(tiles: int, options: ExplainOptions) -> int:
    """Return how many tiles a search takes out: never all of them."""
    usual = min(max(share_of(tiles, SEARCH_SHARE), FEWEST_ROUNDS), MOST_ROUNDS)
    return min(usual if options.rounds is None else options.rounds, tiles - 1)


def _transplants(
    asked: Asked, hottest: Rows, counts: Sequence[tuple[int, float]]
) -> list[Intervention]:
    assert asked.donated is not None
    donated, donor = asked.donated, asked.donor
    if asked.donor_region:
        replaced = hottest[: min(len(donated), len(hottest))]
        return [
            addition(donated, f"add the region of {donor}"),
            swap(replaced, donated, f"replace as many hottest by the region of {donor}"),
        ]
    found = []
    for count, share in counts:
        given = donated[: share_of(len(donated), share)]
        name = f"hottest {100 * share:.4g} %"
        found.append(addition(given, f"add the {name} of {donor}"))
        found.append(swap(hottest[:count], given, f"replace the {name} by those of {donor}"))
    return found


def _is_worth_it(
    asked: Asked, method: Method, rounds: int, options: ExplainOptions, left_out: list[str]
) -> bool:
    """Say whether a method that shows a bag per tile is done; one that was named always is."""
    passes = rounds * len(asked.scores) ** 2
    named = options.methods is not None and method in options.methods
    if named or asked.is_closed or passes <= MOST_TILE_PASSES:
        return True
    left_out.append(
        f"{method}: this model has no closed form and would be shown {passes:,} tiles; "
        f"name it with --methods {method} to have it all the same, or lower --rounds."
    )
    return False
