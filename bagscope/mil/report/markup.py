"""Pieces of a page, escaped: paragraphs, tables, figures, first lines."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bagscope.mil.evaluation.bootstrap import Estimate
from bagscope.mil.report.claims import Claim, interval_text, number_text
from bagscope.mil.report.drawing import Picture

_TEMPLATE = Path(__file__).with_name("report.html")
_MARKS = {"warning": "Caution", "good": "Good", "finding": "", "note": ""}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Cell = str | Markup


def page(title: str, body: Sequence[str]) -> str:
    """Return a page that holds all that it shows."""
    content = {"title": html.escape(title), "body": "\n".join(body)}
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|body)\}\}", lambda place: content[place[1]], template)


def element(tag: str, content: Cell, kind: str = "") -> Markup:
    """Return an element; content that is not HTML yet is escaped."""
    attribute = f' class="{kind}"' if kind else ""
    return Markup(f"<{tag}{attribute}>{_escaped(content)}</{tag}>")


def first_lines(claims: Sequence[Claim]) -> Markup:
    """Return the first lines as a list."""
    items = []
    for claim in claims:
        mark = _MARKS[claim.tone]
        lead = f'<span class="mark">{mark}</span>' if mark else ""
        items.append(f'<li class="{claim.tone}">{lead}{html.escape(claim.text)}</li>')
    return Markup(f'<ul class="claims">{"".join(items)}</ul>')


def table(
    head: Sequence[str], rows: Sequence[Sequence[Cell]], *, words: int = 1, first: bool = False
) -> Markup:
    """Return a table.

    Args:
        head: of its columns.
        rows: of cells.
        words: columns from the left that hold words; the others hold numbers.
        first: whether the first row stands out.
    """
    kinds = ["" if place < words else ' class="n"' for place in range(len(head))]
    heads = "".join(
        f"<th{kind} scope='col'>{_escaped(cell)}</th>"
        for kind, cell in zip(kinds, head, strict=True)
    )
    lines = []
    for number, row in enumerate(rows):
        cells = [
            f"<th scope='row'>{_escaped(cell)}</th>"
            if place == 0
            else f"<td{kinds[place]}>{_escaped(cell)}</td>"
            for place, cell in enumerate(row)
        ]
        lines.append(f"<tr{' class=first' if first and number == 0 else ''}>{''.join(cells)}</tr>")
    return Markup(
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def figure(one: Picture) -> Markup:
    """Return a figure with its caption."""
    return Markup(
        f"<figure>{one.inline}<figcaption><b>{html.escape(one.title)}.</b> "
        f"{html.escape(one.caption)}</figcaption></figure>"
    )


def estimate_cell(estimate: Estimate | None, digits: int = 3) -> Cell:
    """Return a value with its interval beside it, "–" where there is none."""
    if estimate is None or math.isnan(estimate.value):
        return "–"
    value = number_text(estimate.value, digits)
    return Markup(f'{value} <span class="i">({interval_text(estimate, digits)})</span>')


def listing(values: Mapping[str, str]) -> Markup:
    """Return names and what is said of each as a table of two columns."""
    return table(("", ""), list(values.items()), words=2)


def details(summary: str, content: Markup) -> Markup:
    """Return what is shown when asked for."""
    return Markup(f"<details><summary>{html.escape(summary)}</summary>{content}</details>")


def _escaped(content: Cell) -> str:
    return content if isinstance(content, Markup) else html.escape(content)
