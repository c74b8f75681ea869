"""A whole review: its slides' parts, the table of them, the page, and the record written last."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.cohort.jobs import Failure, RunReport
from bagscope.cohort.progress import Reporter
from bagscope.errors import FingerprintMismatch
from bagscope.heatmaps.review.folder import (
    ASSETS_NAME,
    COHORT_NAME,
    FACTS_NAME,
    INDEX_NAME,
    SLIDE_SCRIPT_NAME,
    SLIDES_NAME,
    THUMB_NAME,
    page_files,
)
from bagscope.pipeline.review import PlannedReview, ReviewRequest, ReviewTask, make_slides

if TYPE_CHECKING:
    from bagscope.heatmaps.review.verdicts import Merged, Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewResult:
    """How a review ended.

    Attributes:
        report: of the slides' parts.
        index: the page to open; None where the review is not complete.
        missing: slides whose part another shard is to make.
        pictures: slides that have one.
        longest_px: of the largest picture.
        finest_um: size of a pixel of the finest picture, None where it is not known.
        coarsest_um: of the coarsest.
        size_bytes: of the whole folder.
        agreement: of reviewers with the model, in sentences.
    """

    report: RunReport
    index: Path | None
    missing: int = 0
    pictures: int = 0
    longest_px: int = 0
    finest_um: float | None = None
    coarsest_um: float | None = None
    size_bytes: int = 0
    agreement: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """Return 0 where every slide's part was made, else 1, 130 where interrupted."""
        return self.report.exit_code


def make_review(planned: PlannedReview, request: ReviewRequest, report: Reporter) -> ReviewResult:
    """Make a planned review; resumes where an earlier call stopped.

    Raises:
        ConfigError: the table of pseudonyms was written by another process meanwhile.
        ArtifactError: something can't be written.
    """
    if planned.pseudonyms is not None and request.pseudonyms is not None:
        from bagscope.heatmaps.review.pseudonyms import write_pseudonyms

        # First of all: what nobody can map back must not be handed on.
        write_pseudonyms(request.pseudonyms, planned.pseudonyms)
    # From here on, and until its end, it is not to be trusted.
    record = planned.folder / artifacts.COMPLETE_NAME
    before = record.read_bytes() if record.is_file() else None
    record.unlink(missing_ok=True)
    made = make_slides(planned, request, report)
    if _refused(made.failures) and not made.counts["done"] and before is not None:
        artifacts.write_bytes(record, before)  # nothing was touched
    if made.interrupted or _refused(made.failures):
        return ReviewResult(report=made, index=None)
    for failure in made.failures:
        _stand_in(planned.tasks[failure.slide_id], failure)
    tasks = list(planned.tasks.values())
    missing = [task for task in tasks if not _is_made(task)]
    if missing:
        return ReviewResult(report=made, index=None, missing=len(missing))
    page = page_files()
    _remove_strays(planned.folder, {task.key for task in tasks}, page)
    for name, path in page.items():
        artifacts.write_bytes(planned.folder / name, path.read_bytes())
    artifacts.write_bytes(planned.folder / COHORT_NAME, cohort_bytes(planned))
    artifacts.complete_folder(
        planned.folder,
        {"stage": "review", "run": planned.run.name, "settings": dict(planned.settings)},
    )
    return _result(planned, made)


def cohort_bytes(planned: PlannedReview, *, live: bool = False) -> bytes:
    """Return `data/cohort.js`.

    Args:
        planned: the review; when it is live no part of it need be made.
        live: served from the original slides.
    """
    from bagscope.heatmaps.review.cohort_data import ReviewRow, cohort_data
    from bagscope.heatmaps.review.scripts import script
    from bagscope.heatmaps.review.verdicts import agreement

    run, names = planned.run, planned.pseudonyms
    rows = []
    for slide_id, task in planned.tasks.items():
        slide = task.slide
        facts = {} if live else _facts(task.target)
        own = [one for one in planned.verdicts if one.slide_id == slide_id]
        rows.append(
            ReviewRow(
                key=task.key,
                slide=task.key,
                patient=names.patients[slide.patient_id] if names else slide.patient_id,
                case=run.cases.get(slide.case_id),
                tiles=slide.tiles,
                ood=slide.ood,
                faithfulness=slide.faithfulness,
                has_thumb=slide.path is not None and slide.path.exists()
                if live
                else (task.target / THUMB_NAME).is_file(),
                verdicts=[_scrubbed(one, planned) for one in own],
                notes=facts.get("notes", ()),
            )
        )
    said = agreement(_shown_verdicts(planned))
    data = cohort_data(
        run=run.name,
        title=f"Review of {run.name}",
        targets=run.targets,
        rows=rows,
        headline=(*run.headline, *said),
        notes=(*run.notes, *_public_notes(planned)),
        live=live,
        pseudonymised=names is not None,
    )
    return script("cohort", data)


def import_verdicts(planned: PlannedReview, table: Path) -> tuple[PlannedReview, Merged]:
    """Lay exported verdicts over those that are kept, and keep them; of the newest one counts.

    Raises:
        CohortError: rows that are no verdicts on slides of this run.
        ArtifactError: they can't be kept.
    """
    from bagscope.heatmaps.review.verdicts import merged, read_verdicts, verdicts_csv

    meant = {slide_id: slide_id for slide_id in planned.tasks}
    if planned.pseudonyms is not None:
        meant |= {task.key: slide_id for slide_id, task in planned.tasks.items()}
    found = merged(planned.verdicts, read_verdicts(table, meant, run=planned.run.name))
    text = verdicts_csv(found.verdicts, run=planned.run.name)
    artifacts.write_text(planned.verdicts_path, text)
    return dataclasses.replace(planned, verdicts=found.verdicts), found


# --- parts ----------------------------------------------------------------------------------


def _refused(failures: Sequence[Failure]) -> bool:
    """Return whether a part is there that was made otherwise, which no page may be laid over."""
    return any(failure.error_class == FingerprintMismatch.__name__ for failure in failures)


def _stand_in(task: ReviewTask, failure: Failure) -> None:
    """Write the part of a slide whose worker came to a bad end; it is tried again next time."""
    if artifacts.is_complete(task.target):
        return  # of an earlier run, or made by another process
    from bagscope.pipeline.review_worker import scored_slide, slide_bytes
    from bagscope.wsi.contact_sheet import without_folders

    scored = scored_slide(task)
    why = "" if task.pseudonyms else f" ({without_folders(failure.message)})"
    notes = [*scored.notes, f"Its picture could not be made{why}."]
    with artifacts.atomic_folder(task.target, {"stage": "review", "failed": True}) as folder:
        content = slide_bytes(task, scored, picture=None, notes=notes)
        artifacts.write_bytes(folder / SLIDE_SCRIPT_NAME, content)
        artifacts.write_json(folder / FACTS_NAME, {"notes": notes, "picture": None, "um": None})


def _is_made(task: ReviewTask) -> bool:
    """Return whether a slide's part is there, made with these settings or standing in for it."""
    if not artifacts.is_complete(task.target):
        return False
    fields = artifacts.read_complete(task.target)["fields"]
    return bool(fields.get("failed") or fields.get("settings") == task.settings)


def _remove_strays(folder: Path, keys: Collection[str], page: Collection[str]) -> None:
    """Remove what is of no slide, or of no page, any more: what is handed on is what is listed."""
    for slide in (folder / SLIDES_NAME).iterdir():
        if slide.name not in keys:
            shutil.rmtree(slide)
    for asset in (folder / ASSETS_NAME).glob("*"):
        if f"{ASSETS_NAME}/{asset.name}" not in page:
            asset.unlink()


def _facts(target: Path) -> dict[str, Json]:
    facts: dict[str, Json] = artifacts.read_json(target / FACTS_NAME)
    return facts


# --- the table ------------------------------------------------------------------------------


def _shown_verdicts(planned: PlannedReview) -> list[Verdict]:
    """Return the verdicts on slides that are in the review; others are kept, and not shown."""
    return [one for one in planned.verdicts if one.slide_id in planned.tasks]


def _scrubbed(verdict: Verdict, planned: PlannedReview) -> Verdict:
    if planned.pseudonyms is None:
        return verdict
    return dataclasses.replace(verdict, comment=planned.pseudonyms.scrubbed(verdict.comment))


def _public_notes(planned: PlannedReview) -> tuple[str, ...]:
    """Return what may be told to whoever gets the review."""
    if planned.pseudonyms is None:
        return planned.notes
    count = len(planned.run.unpredicted)
    return (f"Not shown for want of a prediction: {count} of the slides.",) if count else ()


def _result(planned: PlannedReview, made: RunReport) -> ReviewResult:
    from bagscope.heatmaps.review.verdicts import agreement

    facts = [_facts(task.target) for task in planned.tasks.values()]
    pictures = [one["picture"] for one in facts if one["picture"] is not None]
    sizes_um = [one["um"] for one in facts if one["um"] is not None]
    return ReviewResult(
        report=made,
        index=planned.folder / INDEX_NAME,
        pictures=len(pictures),
        longest_px=max((max(one["width"], one["height"]) for one in pictures), default=0),
        finest_um=min(sizes_um, default=None),
        coarsest_um=max(sizes_um, default=None),
        size_bytes=sum(p.stat().st_size for p in planned.folder.rglob("*") if p.is_file()),
        agreement=tuple(agreement(_shown_verdicts(planned))),
    )
