"""What the page is told of the whole run: its targets, its headline and a row for each slide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.artifacts import Json, fingerprint
from bagscope.heatmaps.review.answers import INTERVAL_TEXT
from bagscope.heatmaps.review.choices import CSV_COLUMNS, VERDICTS
from bagscope.heatmaps.review.folder import THUMB_NAME, slide_url

if TYPE_CHECKING:
    from bagscope.heatmaps.review.answers import CaseFacts, TargetFacts
    from bagscope.heatmaps.review.verdicts import Verdict

SCHEMA = "bagscope.review"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewRow:
    """A slide in the table.

    Attributes:
        key: its folder's name.
        slide: what people call it.
        patient: whose it is.
        case: what the model says of it, None where it has no prediction.
        tiles: how many have scores.
        ood: whether its case is unlike the training bags, None where nobody knows.
        faithfulness: score and warning; None where it was not judged.
        has_thumb: whether there is a thumbnail.
        verdicts: of reviewers, the newest last.
        notes: sentences that a reader must know.
    """

    key: str
    slide: str
    patient: str
    case: CaseFacts | None
    tiles: int = 0
    ood: bool | None = None
    faithfulness: Json = None
    has_thumb: bool = False
    verdicts: Sequence[Verdict] = ()
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Json]:
        """Return what the page needs to know."""
        case = self.case
        verdicts = [one.to_json() for one in self.verdicts]
        return {
            "key": self.key,
            "slide": self.slide,
            "patient": self.patient,
            "fold": None if case is None else case.fold,
            "truth": {} if case is None else dict(case.truth),
            "predicted": {}
            if case is None
            else {name: one.to_json() for name, one in case.predicted.items()},
            "correct": None if case is None else case.correct,
            "ood": self.ood,
            "tiles": self.tiles,
            "faithfulness": self.faithfulness,
            "thumb": slide_url(self.key, THUMB_NAME) if self.has_thumb else None,
            "verdict": verdicts[-1] if verdicts else None,
            "verdicts": verdicts,
            "notes": list(self.notes),
        }


def cohort_data(
    *,
    run: str,
    title: str,
    targets: Sequence[TargetFacts],
    rows: Sequence[ReviewRow],
    headline: Sequence[str] = (),
    notes: Sequence[str] = (),
    live: bool = False,
    pseudonymised: bool = False,
) -> dict[str, Json]:
    """Return what the page is told of the run.

    Args:
        run: its name.
        title: of the page.
        targets: of the model.
        rows: of the slides.
        headline: sentences for the page's head.
        notes: sentences that hold for the whole run.
        live: served from the original slides.
        pseudonymised: keys, slides and patients are pseudonyms.
    """
    listed: list[Mapping[str, Json]] = [row.to_json() for row in rows]
    spread = any(one["low"] is not None for row in listed for one in row["predicted"].values())
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "run": run,
        "title": title,
        "live": live,
        "pseudonymised": pseudonymised,
        "reviewer_csv_columns": list(CSV_COLUMNS),
        "verdict_words": dict(VERDICTS),
        "interval_text": INTERVAL_TEXT if spread else "",
        "targets": [target.to_json() for target in targets],
        "headline": list(headline),
        "notes": list(notes),
        # Under which a browser keeps verdicts: those on other predictions are no longer meant.
        "fingerprint": fingerprint({"run": run, "predicted": _said(listed)}),
        "slides": listed,
    }


def _said(rows: Sequence[Mapping[str, Json]]) -> Json:
    """Return what was predicted of each slide, in words."""
    return {
        row["key"]: {name: one["text"] for name, one in row["predicted"].items()} for row in rows
    }
