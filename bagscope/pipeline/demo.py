"""The demo: synthetic slides, taken through the whole line, and held against what was planted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from bagscope.cohort.jobs import RunReport
from bagscope.cohort.progress import Reporter
from bagscope.errors import ConfigError
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.demo_slides import TRUTH_NAME, SlidesSpec, write_slides
from bagscope.pipeline.line import LineRequest, StageDone, parse_stage, work_through
from bagscope.pipeline.study import Study, available_cores, init_study, open_study
from bagscope.specs import did_you_mean
from bagscope.wsi.synthetic.cohort import POSITIVE, TABLE_NAME

if TYPE_CHECKING:
    from bagscope.pipeline.demo_findings import DemoFindings

DemoStage = Literal["slides", "scan", "tile", "extract", "train", "evaluate", "heatmap", "review"]
STAGES: tuple[DemoStage, ...] = get_args(DemoStage)
RECIPE = "aem"
TARGET = TargetSpec(column="label", positive=POSITIVE)
SETTINGS: Mapping[str, Any] = {
    "targets": [TARGET.model_dump(mode="json", exclude_defaults=True)],
    # So few slides leave a handful to choose an epoch by, which is choosing by chance, and members
    # of different ages answer on different scales: all keep their last epoch, and as many slides as
    # can be are learnt from.
    "splits": {"folds": 5, "val_share": 0.1},
    "train": {
        "recipe": RECIPE,
        "options": {"training": {"checkpoint": "last"}},
    },
}
"""Of the demo's study.yaml."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRequest:
    """Which demo is wanted.

    Attributes:
        folder: `slides/`, `truth/` and `study/` come to lie in it.
        slides: to make.
        workers: processes; one per core if None.
        until: the last stage.
    """

    folder: Path
    slides: SlidesSpec = field(default_factory=SlidesSpec)
    workers: int | None = None
    until: DemoStage = STAGES[-1]

    @property
    def stages(self) -> tuple[DemoStage, ...]:
        """Return the stages that are asked for."""
        return STAGES[: STAGES.index(self.until) + 1]

    @property
    def study(self) -> Path:
        """Return the study's folder."""
        return self.folder / "study"

    @property
    def run(self) -> Path:
        """Return the run's folder."""
        return self.study / "runs" / RECIPE

    @property
    def truth(self) -> Path:
        """Return the folder of the planted tumours' outlines."""
        return self.folder / TRUTH_NAME


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoStageDone:
    """A stage that came to its end, well or not.

    Attributes:
        report: of its slides or members; None of the evaluation, which has none.
        exit_code: 1 where slides or members failed, 130 where interrupted.
        page: to open; None where the stage makes none.
    """

    stage: DemoStage
    report: RunReport | None
    exit_code: int
    page: Path | None = None


def parse_demo_stage(text: str) -> DemoStage:
    """Read the name of a stage.

    Raises:
        ConfigError: no such stage.
    """
    for stage in STAGES:
        if stage == text:
            return stage
    raise ConfigError(f"--until {text!r}: no such stage{did_you_mean(text, STAGES)}")


def run_demo(request: DemoRequest, report: Reporter) -> Iterator[DemoStageDone]:
    """Make what is missing, stage after stage, and tell of each as it ends; resumes.

    Nothing follows a stage that failed: of the demo's slides, none may be missing.

    Raises:
        ConfigError: the folder holds another study.
        FingerprintMismatch: it holds other slides.
    """
    workers = request.workers or available_cores()
    made = write_slides(
        request.folder,
        request.slides,
        report,
        workers=workers,
        status_dir=request.study / "status",
    )
    yield DemoStageDone(stage="slides", report=made, exit_code=made.exit_code)
    if made.exit_code or request.until == "slides":
        return
    init_study(request.study, str(request.folder / "slides" / TABLE_NAME), settings=SETTINGS)
    study = open_study(request.study, {"run": {"workers": workers}})
    # The review comes after it: the line knows nothing of outlines to show.
    last = "heatmap" if request.until == "review" else request.until
    for done in work_through(study, LineRequest(until=parse_stage(last)), report):
        yield _told(done)
        if done.exit_code:
            return
    if request.until == "review":
        yield _review(study, request, report)


def demo_findings(request: DemoRequest) -> DemoFindings:
    """Hold a demo that came to its evaluation against what was planted."""
    from bagscope.pipeline.demo_findings import findings_of

    return findings_of(request.run, request.truth)


def _review(study: Study, request: DemoRequest, report: Reporter) -> DemoStageDone:
    """Make the review, with the planted tumours to be seen in it."""
    from bagscope.pipeline.review import ReviewRequest, write_review

    asked = ReviewRequest(
        place=request.run, annotations=request.truth, workers=study.spec.run.workers
    )
    made = write_review(asked, report)
    code = made.report.exit_code
    return DemoStageDone(stage="review", report=made.report, exit_code=code, page=made.index)


def _told(done: StageDone) -> DemoStageDone:
    """Return what a stage of the line said, in short."""
    from bagscope.pipeline.extract import ExtractResult
    from bagscope.pipeline.scan import CohortScan
    from bagscope.pipeline.train import TrainResult

    result, report = done.result, None
    if isinstance(result, RunReport):
        report = result
    elif isinstance(result, ExtractResult):
        report = result.report
    elif isinstance(result, TrainResult):
        report = result.trained
    elif isinstance(result, CohortScan):
        report = result.run
    return DemoStageDone(stage=done.stage, report=report, exit_code=done.exit_code, page=done.page)
