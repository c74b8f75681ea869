"""A comparison of runs as one page."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bagscope.mil.evaluation.comparing import Compared, Pair
from bagscope.mil.evaluation.paired import Comparison
from bagscope.mil.report.claims import Claim, number_text
from bagscope.mil.report.figures import ForestRow, forest
from bagscope.mil.report.markup import (
    Markup,
    element,
    estimate_cell,
    figure,
    first_lines,
    page,
    table,
)

ALPHA = 0.05


def comparison_page(target: str, found: Compared) -> str:
    """Return the whole page."""
    label = found.metric.label
    rows = [ForestRow(label=name, estimate=one) for name, one in found.estimates.items()]
    body: list[str] = [
        element("h1", f"{target}: {len(found.estimates)} runs side by side"),
        element("p", f"{found.patients} test patients, the same for all; {label}.", "soft"),
        first_lines(comparison_claims(found)),
        element("h2", "Each by itself"),
        figure(forest(rows, metric=label, chance=found.metric.chance, models_alone=True)),
        table(
            ("Run", f"{label} (95 %)"),
            [(name, estimate_cell(one)) for name, one in found.estimates.items()],
        ),
        element("h2", "Pair by pair"),
        table(
            ("Pair", "Test", "Difference (95 %)", "p", "p (Holm)"),
            [row for pair in found.pairs for row in _rows(pair)],
            words=2,
        ),
        element(
            "p",
            f"{_holm_text(len(found.pairs))}Both sides of a difference are computed on the same "
            "draws of patients. That two runs are "
            "not told apart does not mean that they are equal: the interval says how far apart "
            "they may be.",
            "about",
        ),
    ]
    body += [element("p", f"{note[0].upper()}{note[1:]}.", "about") for note in found.notes]
    return page(f"{target} · comparison", body)


def comparison_claims(found: Compared) -> tuple[Claim, ...]:
    """Return the first lines: who differs from whom."""
    differing = [pair for pair in found.pairs if pair.holm_p < ALPHA]
    if not differing:
        pairs = [pair for pair in found.pairs if not math.isnan(pair.holm_p)]
        if not pairs:
            return (Claim(tone="finding", text="No pair could be tested."),)
        smallest = min(pair.holm_p for pair in pairs)
        text = f"No two runs differ beyond chance (smallest p after Holm {p_text(smallest)})."
        return (Claim(tone="finding", text=text),)
    return tuple(
        Claim(tone="finding", text=f"{better} is better than {worse} ({_told(pair)}).")
        for pair in differing
        for better, worse in [_better_first(pair)]
    )


def p_text(p: float) -> str:
    """Return a p-value as people write it."""
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _holm_text(pairs: int) -> str:
    return "" if pairs == 1 else f"Holm's rule raises p for the {pairs} pairs that were looked at. "


def _better_first(pair: Pair) -> tuple[str, str]:
    # Every headline is better when it is higher.
    ahead = pair.judged_by.difference > 0
    return (pair.first, pair.second) if ahead else (pair.second, pair.first)


def _told(pair: Pair) -> str:
    test = pair.judged_by
    return (
        f"{number_text(test.first, 3)} and {number_text(test.second, 3)}, "
        f"p after Holm {p_text(pair.holm_p)}"
    )


def _rows(pair: Pair) -> Iterator[tuple[str | Markup, ...]]:
    for place, test in enumerate(pair.tests):
        yield (
            f"{pair.first} − {pair.second}" if place == 0 else "",
            _method(test),
            Markup(
                f"{number_text(test.difference, 3)} <span class='i'>"
                f"({number_text(test.low, 3)} to {number_text(test.high, 3)})</span>"
            ),
            p_text(test.p_value),
            p_text(pair.holm_p) if place == 0 else "",
        )


def _method(test: Comparison) -> str:
    return {
        "DeLong": "DeLong",
        "paired bootstrap": "Bootstrap of patients",
        "corrected resampled t": "Corrected t over folds",
    }[test.method]
