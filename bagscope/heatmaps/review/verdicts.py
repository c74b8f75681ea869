"""What reviewers said of slides, as a table that people exchange.

Of each reviewer and slide the newest verdict counts: the one that was imported last, and of one
file the lower row. Different reviewers' verdicts stand beside each other.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bagscope.artifacts import Json
from bagscope.cohort.cells import read_cells, refuse
from bagscope.heatmaps.review.choices import CSV_COLUMNS, VERDICTS
from bagscope.heatmaps.review.spreadsheet import guarded, unguarded
from bagscope.specs import did_you_mean
from bagscope.wording import counted

UNNAMED = "A reviewer without a name"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one reviewer says of one slide."""

    slide_id: str
    verdict: str
    comment: str
    reviewer: str

    def to_json(self) -> dict[str, Json]:
        """Return it without the slide, beside which it is shown."""
        return {"verdict": self.verdict, "comment": self.comment, "reviewer": self.reviewer}


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """Verdicts after an import.

    Attributes:
        verdicts: all of them, the newest last.
        added: of reviewers who had said nothing of the slide.
        replaced: in place of other words of the same reviewer.
        withdrawn: taken back.
        same: said before.
    """

    verdicts: tuple[Verdict, ...]
    added: int
    replaced: int
    withdrawn: int
    same: int


def read_verdicts(path: Path, slide_ids: Mapping[str, str], *, run: str) -> tuple[Verdict, ...]:
    """Read verdicts that the page exported.

    Args:
        path: of the table.
        slide_ids: what may stand in the column `slide`, and which slide is meant by it.
        run: whose verdicts they must be, where the table says.

    Raises:
        CohortError: lists each row that is of no slide or another run, or has an unknown verdict.
    """
    table = read_cells(path)
    lacking = [name for name in CSV_COLUMNS[:2] if name not in table.columns]
    refuse(path, [f"has no column {name!r}; import what the page exported" for name in lacking])
    found, problems = [], []
    for row in table.rows:
        cells = {name: unguarded(row.cells.get(name, "").strip()) for name in CSV_COLUMNS}
        slide, word = cells["slide"], cells["verdict"].casefold()
        where = f"row {row.number}, column"
        if slide not in slide_ids:
            near = did_you_mean(slide, tuple(slide_ids))
            problems.append(f"{where} slide: {slide!r} is no slide of {run}{near}")
        if word and word not in VERDICTS:
            problems.append(
                f"{where} verdict: {cells['verdict']!r} is none of {', '.join(VERDICTS)}"
            )
        if cells["run"] and cells["run"] != run:
            problems.append(
                f"{where} run: {cells['run']!r}, and these are to be verdicts on {run!r}"
            )
        found.append(
            Verdict(
                slide_id=slide_ids.get(slide, ""),
                verdict=word,
                comment=cells["comment"],
                reviewer=cells["reviewer"],
            )
        )
    refuse(path, problems)
    return tuple(found)


def kept_verdicts(path: Path) -> tuple[Verdict, ...]:
    """Return the verdicts of a table that `verdicts_csv` made; none where there is no table.

    Raises:
        CohortError: it can't be read.
    """
    if not path.is_file():
        return ()
    rows = read_cells(path).rows
    names = {unguarded(row.cells.get("slide", "")) for row in rows}
    run = unguarded(rows[0].cells.get("run", "")) if rows else ""
    return read_verdicts(path, {name: name for name in names}, run=run)


def merged(before: Sequence[Verdict], imported: Sequence[Verdict]) -> Merged:
    """Lay imported verdicts over those that are there."""
    known = {(one.slide_id, one.reviewer): one for one in before}
    counts: Counter[str] = Counter()
    # Of one file the lower row counts, and only it is counted.
    for key, one in {(one.slide_id, one.reviewer): one for one in imported}.items():
        old = known.get(key)
        if not one.verdict and not one.comment:
            counts["withdrawn"] += known.pop(key, None) is not None
        elif old == one:
            counts["same"] += 1
        else:
            known.pop(key, None)
            known[key] = one
            counts["added" if old is None else "replaced"] += 1
    return Merged(
        verdicts=tuple(known.values()),
        added=counts["added"],
        replaced=counts["replaced"],
        withdrawn=counts["withdrawn"],
        same=counts["same"],
    )


def verdicts_csv(verdicts: Sequence[Verdict], *, run: str) -> str:
    """Return verdicts as the table that `read_verdicts` reads."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for one in verdicts:
        cells = (one.slide_id, one.verdict, one.comment, one.reviewer, run)
        writer.writerow([guarded(cell) for cell in cells])
    return text.getvalue()


def agreement(verdicts: Sequence[Verdict]) -> list[str]:
    """Return how far each reviewer agrees with the model, in sentences."""
    found = []
    for reviewer in sorted({one.reviewer for one in verdicts}, key=str.casefold):
        words = Counter(one.verdict for one in verdicts if one.reviewer == reviewer)
        judged = words["agree"] + words["disagree"]
        if not words.total() - words[""]:
            continue
        share = f"{words['agree']} of {counted(judged, 'slide')}"
        told = f"{reviewer or UNNAMED} agrees with the model on {share}"
        rest = [
            f"{words[word]} {word}"
            for word in VERDICTS
            if words[word] and word not in ("agree", "disagree")
        ]
        found.append(told + (f" ({', '.join(rest)})." if rest else "."))
    return found
