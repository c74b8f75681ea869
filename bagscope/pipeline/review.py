"""The review stage: a run or a prediction → one folder of static files for a pathologist.

Every slide's part is a folder of its own, made by a worker and kept by its fingerprint, so that a
killed review goes on where it stopped. What is said of the run as a whole is written anew each
time (`pipeline.review_folder`), `complete.json` last.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.cohort.jobs import Job, RunReport, StageResult
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.errors import ConfigError, FingerprintMismatch, SchemaError
from bagscope.heatmaps.review.choices import GALLERY_TILES, MAX_PX, QUALITY
from bagscope.heatmaps.review.folder import ROOT_NAMES, SLIDE_SCRIPT_NAME, SLIDES_NAME
from bagscope.pipeline.study import RunSpec
from bagscope.pipeline.tile import run_options
from bagscope.wording import counted

if TYPE_CHECKING:
    from bagscope.heatmaps.colours import ColourScale
    from bagscope.heatmaps.layers import LayerKind
    from bagscope.heatmaps.review.pseudonyms import Pseudonyms
    from bagscope.heatmaps.review.verdicts import Verdict
    from bagscope.pipeline.review_folder import ReviewResult
    from bagscope.pipeline.review_run import ReviewedRun, ReviewedSlide

STAGE = "review"
WORKER_MODULES = ("bagscope.pipeline.review_worker",)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewRequest:
    """Which review is wanted.

    Attributes:
        place: a run, or a folder of predictions.
        out: the review's folder; `review/<run>` of the study if None.
        max_px: the longer edge of a slide's picture, at most.
        quality: of JPEG.
        annotations: GeoJSON files, one for each slide, to show.
        pseudonyms: the table that ids are mapped through; they stay as they are if None.
        workers: processes; the study's setting if None.
        shard: (i, n), to make the i-th of n parts of the slides.
    """

    place: Path
    out: Path | None = None
    max_px: int = MAX_PX
    quality: int = QUALITY
    annotations: Path | None = None
    pseudonyms: Path | None = None
    workers: int | None = None
    overwrite: bool = False
    shard: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewTask:
    """All that a worker needs to make one slide's part.

    Attributes:
        key: its folder's name: its id, or its pseudonym.
        target: the folder to make.
        colours: of the run's layers.
        task: of the model's only target.
        annotation: GeoJSON, None for none.
        pseudonyms: where ids must not appear.
        tilings: folder of the study's tilings.
    """

    slide: ReviewedSlide
    key: str
    target: Path
    colours: Mapping[LayerKind, ColourScale]
    task: str | None
    settings: Mapping[str, Json]
    annotation: Path | None
    pseudonyms: Pseudonyms | None
    tilings: Path | None
    overwrite: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedReview:
    """A review before it is made.

    Attributes:
        folder: of the review.
        run: whose it is.
        settings: that all its slides share.
        tasks: by slide id, in the order of the table.
        verdicts: of reviewers, imported earlier, the newest last.
        verdicts_path: where they are kept: beside the review, as it may be handed on.
        notes: sentences that the user should see.
    """

    folder: Path
    run: ReviewedRun
    settings: Mapping[str, Json]
    tasks: Mapping[str, ReviewTask]
    pseudonyms: Pseudonyms | None
    verdicts: tuple[Verdict, ...]
    verdicts_path: Path
    notes: tuple[str, ...]

    @property
    def run_spec(self) -> RunSpec:
        """Return how the cohort is worked through."""
        return self.run.study.spec.run if self.run.study else RunSpec()

    @property
    def status_dir(self) -> Path:
        """Return where status and claims are kept: never in the review."""
        study = self.run.study
        return study.status_folder if study else self.folder.with_name(f"{self.folder.name}.status")


def plan_review(request: ReviewRequest) -> PlannedReview:
    """Open the run and say what would be made of it; writes nothing.

    Raises:
        ConfigError: no scores there, or options that do not fit them.
        FingerprintMismatch: the review is there, made with other settings.
    """
    from bagscope.heatmaps.review.pseudonyms import extended, require_outside
    from bagscope.heatmaps.review.verdicts import kept_verdicts
    from bagscope.pipeline.review_run import open_run

    _require_sensible(request)
    run = open_run(request.place, request.workers)
    home = run.study.folder / "review" if run.study else None
    name = run.name if request.pseudonyms is None else f"{run.name}-pseudonymised"
    folder = request.out or (home / name if home else None)
    if folder is None:
        raise ConfigError(f"{request.place}: in no study; name where the output goes with --out")
    _require_own(folder, request)
    pseudonyms = None
    if request.pseudonyms is not None:
        require_outside(request.pseudonyms, folder)
        pseudonyms = extended(
            request.pseudonyms,
            [slide.slide_id for slide in run.slides],
            [slide.patient_id for slide in run.slides],
        )
    verdicts_path = (home / f"{run.name}.verdicts.csv") if home else beside(folder, "verdicts.csv")
    settings: dict[str, Json] = {
        "max_px": request.max_px,
        "quality": request.quality,
        "gallery": GALLERY_TILES,
        "pseudonymised": pseudonyms is not None,
    }
    _require_same_settings(folder, settings, overwrite=request.overwrite)
    annotations = _annotations(request, run)
    tasks = {}
    for slide in run.slides:
        key = slide.slide_id if pseudonyms is None else pseudonyms.slides[slide.slide_id]
        tasks[slide.slide_id] = ReviewTask(
            slide=slide,
            key=key,
            target=folder / SLIDES_NAME / key,
            colours=run.colours,
            task=run.task,
            settings=settings,
            annotation=annotations.get(slide.slide_id),
            pseudonyms=pseudonyms,
            tilings=run.study.folder / "tilings" if run.study else None,
            overwrite=request.overwrite,
        )
    if pseudonyms is not None:
        # The cohort's order may say who is who.
        tasks = dict(sorted(tasks.items(), key=lambda item: item[1].key))
    if not request.overwrite:
        _require_same_scores(folder, tasks, request.place)
    return PlannedReview(
        folder=folder,
        run=run,
        settings=settings,
        tasks=tasks,
        pseudonyms=pseudonyms,
        verdicts=kept_verdicts(verdicts_path),
        verdicts_path=verdicts_path,
        notes=_notes(run),
    )


def write_review(request: ReviewRequest, report: Reporter) -> ReviewResult:
    """Plan a review and make it; resumes where an earlier call stopped.

    Raises:
        ConfigError, FingerprintMismatch: as of `plan_review`.
        ArtifactError: something can't be written.
    """
    from bagscope.pipeline.review_folder import make_review

    return make_review(plan_review(request), request, report)


def make_slides(planned: PlannedReview, request: ReviewRequest, report: Reporter) -> RunReport:
    """Make the slides' parts; resumes where an earlier call stopped."""
    options = run_options(planned.run_spec, request.shard, "local", preload=WORKER_MODULES)
    slides = planned.folder / SLIDES_NAME
    return run_cohort(
        [Job(slide_id=slide_id, payload=task) for slide_id, task in planned.tasks.items()],
        review_one,
        stage=f"{STAGE}/{planned.folder.name}",
        status_dir=planned.status_dir,
        options=dataclasses.replace(options, sweep=(planned.folder, slides)),
        report=report,
    )


def review_one(job: Job) -> StageResult:
    """Make one slide's part, in a worker."""
    from bagscope.pipeline.review_worker import review_task

    return review_task(job.payload)


def beside(folder: Path, ending: str) -> Path:
    """Return the path of what belongs to a review and must not be handed on with it."""
    return folder.with_name(f"{folder.name}.{ending}")


def _require_sensible(request: ReviewRequest) -> None:
    if request.max_px < 256:
        raise ConfigError(f"--max-px is {request.max_px}; it must be 256 or more")
    if not 1 <= request.quality <= 100:
        raise ConfigError(f"--quality is {request.quality}; it must be from 1 to 100")


def _require_own(folder: Path, request: ReviewRequest) -> None:
    """Refuse a folder of something else: what does not belong to the review is removed from it."""
    place, own = request.place.resolve(), folder.resolve()
    if place.is_relative_to(own) or own.is_relative_to(place):
        raise ConfigError(
            f"{folder}: lies in, or around, what is to be reviewed; name another --out"
        )
    if not folder.is_dir():
        return
    foreign = [path for path in folder.iterdir() if path.name not in ROOT_NAMES]
    if (folder / SLIDES_NAME).is_dir():
        parts = (folder / SLIDES_NAME).iterdir()
        foreign += [path for path in parts if not (path / SLIDE_SCRIPT_NAME).is_file()]
    foreign = [path for path in foreign if not path.name.startswith(".")]
    if foreign:
        raise ConfigError(
            f"{folder}: holds something else than a review ({foreign[0].name}); name another --out"
        )


def _require_same_settings(folder: Path, settings: Mapping[str, Json], *, overwrite: bool) -> None:
    """Refuse a review of other settings at once, not slide by slide."""
    if overwrite or not (folder / SLIDES_NAME).is_dir():
        return
    for slide in sorted((folder / SLIDES_NAME).glob("[!.]*")):
        if artifacts.is_complete(slide):
            stored = artifacts.read_complete(slide)["fields"].get("settings", {})
            artifacts.require_same(
                stored, settings, what=str(folder), remedy="replace it with --overwrite"
            )
            return


def _require_same_scores(folder: Path, tasks: Mapping[str, ReviewTask], place: Path) -> None:
    """Refuse a review of other scores than those of now at once, not slide by slide."""
    from bagscope.pipeline.review_worker import digest_of_scores

    outdated = 0
    for task in tasks.values():
        with contextlib.suppress(SchemaError):
            fields = artifacts.read_complete(task.target)["fields"]
            outdated += not fields.get("failed") and fields.get("scores") != digest_of_scores(task)
    if outdated:
        raise FingerprintMismatch(
            f"{folder}: shows other scores than those of now ({outdated} of "
            f"{counted(len(tasks), 'slide')}; a newer bagscope, or another training, made the "
            f"scores anew); make the review again with: bagscope review {place} --overwrite"
        )


def _annotations(request: ReviewRequest, run: ReviewedRun) -> Mapping[str, Path]:
    if request.annotations is None:
        return {}
    from bagscope.pipeline.explain_annotations import annotation_files

    return annotation_files(request.annotations, [slide.slide_id for slide in run.slides])


def _notes(run: ReviewedRun) -> tuple[str, ...]:
    damaged = tuple(f"No heatmap: {said}" for said in run.damaged.values())
    if not run.unpredicted:
        return damaged
    from bagscope.wording import listed

    return (
        *damaged,
        f"Not shown for want of a prediction: {len(run.unpredicted)} of the cohort's slides "
        f"({listed(run.unpredicted)}).",
    )
