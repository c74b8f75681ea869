"""The whole line from study.yaml: slides → tiles → features → models → report → heatmaps → review.

Each stage resumes by itself, so that the line does: what is there is found and left as it is. A
slide that fails is missing in what follows, and the line goes on with the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from bagscope.cohort.jobs import RunReport
from bagscope.cohort.progress import Reporter
from bagscope.errors import CohortError, ConfigError
from bagscope.pipeline.extract import ExtractOptions, ExtractResult, extract_cohort
from bagscope.pipeline.scan import CohortScan, scan_cohort, write_scan_csv
from bagscope.pipeline.study import Study
from bagscope.pipeline.tile import tile_cohort
from bagscope.pipeline.train import TrainRequest, TrainResult, train_run
from bagscope.specs import did_you_mean
from bagscope.wording import counted
from bagscope.wsi.tiling import tiling_name

if TYPE_CHECKING:
    from bagscope.pipeline.evaluate import EvaluateResult
    from bagscope.pipeline.review_folder import ReviewResult

Stage = Literal["scan", "tile", "extract", "train", "evaluate", "heatmap", "review"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SCAN_NAME = "scan.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class LineRequest:
    """How far the line goes, and on which part of it.

    Attributes:
        until: the last stage.
        overwrite: replace what was made with other settings.
        shard: (i, n), to tile and extract the i-th of n parts of the slides; what follows needs
            them all and is left to a run without it.
        executor: "local", or the address of a Dask scheduler.
    """

    until: Stage = STAGES[-1]
    overwrite: bool = False
    shard: tuple[int, int] | None = None
    executor: str = "local"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages that are asked for."""
        return STAGES[: STAGES.index(self.until) + 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageDone:
    """A stage that came to its end, well or not.

    Attributes:
        result: what the stage's own function returned.
        exit_code: 1 where slides or members failed, 130 where interrupted.
        page: to open; None where the stage makes none.
    """

    stage: Stage
    result: CohortScan | RunReport | ExtractResult | TrainResult | EvaluateResult | ReviewResult
    exit_code: int
    page: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStage:
    """A stage before it starts: what it would make, where, and how much of that is there."""

    stage: Stage
    what: str
    place: Path


def parse_stage(text: str) -> Stage:
    """Read the name of a stage.

    Raises:
        ConfigError: no such stage.
    """
    for stage in STAGES:
        if stage == text:
            return stage
    raise ConfigError(f"--until {text!r}: no such stage{did_you_mean(text, STAGES)}")


def work_through(study: Study, request: LineRequest, report: Reporter) -> Iterator[StageDone]:
    """Do stage after stage, and tell of each as it ends; nothing follows an interrupted one.

    Raises:
        ConfigError: settings, labels or encoders that do not fit, before any slide is touched.
    """
    _require_ready(study, request)
    for done in _slides_to_features(study, request, report):
        yield done
        if done.exit_code > 1:
            return
    if request.shard is not None:
        return
    for wanted in training_requests(study, overwrite=request.overwrite, skip_missing=True):
        for done in _features_to_review(study, wanted, request, report):
            yield done
            if done.exit_code > 1:
                return


def training_requests(
    study: Study, *, overwrite: bool = False, skip_missing: bool = False
) -> list[TrainRequest]:
    """Return the runs that study.yaml asks for, one per encoder; none where it names no target.

    A run is called as its recipe, with several encoders as recipe and encoder.
    """
    if not study.spec.targets:
        return []
    plan = study.spec.train
    names = _run_names(study, study.extracted_encoders())
    return [
        TrainRequest(
            targets=study.spec.targets,
            recipe=plan.recipe,
            settings=plan.options,
            seeds=plan.seeds,
            encoder=encoder,
            name=name,
            overwrite=overwrite,
            skip_missing=skip_missing,
        )
        for encoder, name in names.items()
    ]


def plan_line(study: Study, request: LineRequest) -> list[PlannedStage]:
    """Say what each stage would make; write nothing.

    Raises:
        ConfigError: settings, labels or encoders that do not fit.
    """
    from bagscope.features.encoders.registry import find_encoder

    _require_ready(study, request)
    spec, rows = study.spec, study.cohort().rows
    tiling = tiling_name(spec.tiling)
    encoders = [find_encoder(name).spec.folder for name in spec.features.encoders]

    def there(folder: Path) -> str:
        count = sum((folder / f"{row.slide_id}.h5").exists() for row in rows)
        return f"{counted(len(rows), 'slide')}, {count} there"

    planned = []
    if _is_first(study, request):
        table = study.folder / SCAN_NAME
        planned.append(PlannedStage(stage="scan", what=counted(len(rows), "slide"), place=table))
    folder = study.tiling_folder(tiling)
    planned.append(PlannedStage(stage="tile", what=there(folder), place=folder))
    for encoder in encoders:
        folder = study.features_folder(tiling) / encoder
        planned.append(PlannedStage(stage="extract", what=there(folder), place=folder))
    names = _run_names(study, sorted({*encoders, *study.extracted_encoders()}))
    if spec.targets and request.shard is None:
        aims = ", ".join(target.name for target in spec.targets)
        how = f"{aims}, recipe {spec.train.recipe}, {spec.splits.method} splits"
        for name in names.values():
            run, maps = study.folder / "runs" / name, study.folder / "heatmaps" / name
            page = study.folder / "review" / name / "index.html"
            planned += [
                PlannedStage(stage="train", what=how, place=run),
                PlannedStage(stage="evaluate", what=aims, place=run / "report.html"),
                PlannedStage(stage="heatmap", what="of held-out folds", place=maps),
                PlannedStage(stage="review", what="slides, heatmaps, answers", place=page),
            ]
    return [stage for stage in planned if stage.stage in request.stages]


def _slides_to_features(
    study: Study, request: LineRequest, report: Reporter
) -> Iterator[StageDone]:
    if "scan" in request.stages and _is_first(study, request):
        scanned = scan_cohort(study.cohort(), study.spec.tiling, study.spec.run, report)
        write_scan_csv(scanned, study.folder / SCAN_NAME)
        # What it warns of, such as twins, fails nothing; what can't be read fails again below.
        yield StageDone(stage="scan", result=scanned, exit_code=scanned.run.exit_code)
    if "tile" in request.stages:
        tiled = tile_cohort(
            study,
            report,
            overwrite=request.overwrite,
            shard=request.shard,
            executor=request.executor,
        )
        sheet = study.tiling_folder(tiling_name(study.spec.tiling)) / "contact_sheet.html"
        yield StageDone(stage="tile", result=tiled, exit_code=tiled.exit_code, page=sheet)
    if "extract" in request.stages:
        options = ExtractOptions(
            overwrite=request.overwrite, shard=request.shard, executor=request.executor
        )
        extracted = extract_cohort(study, report, options)
        yield StageDone(stage="extract", result=extracted, exit_code=extracted.report.exit_code)


def _features_to_review(
    study: Study, wanted: TrainRequest, request: LineRequest, report: Reporter
) -> Iterator[StageDone]:
    if "train" not in request.stages:
        return
    trained = train_run(study, wanted, report)
    yield StageDone(stage="train", result=trained, exit_code=trained.exit_code)
    if not trained.is_complete:
        return
    if "evaluate" in request.stages:
        from bagscope.pipeline.evaluate import EvaluateRequest, evaluate_run

        evaluated = evaluate_run(EvaluateRequest(run=trained.folder))
        yield StageDone(stage="evaluate", result=evaluated, exit_code=0, page=evaluated.report)
    if "heatmap" in request.stages:
        from bagscope.pipeline.heatmap import HeatmapRequest, draw_heatmaps, plan_heatmaps

        asked = HeatmapRequest(place=trained.folder, overwrite=request.overwrite)
        planned = plan_heatmaps(asked)
        drawn = draw_heatmaps(planned, asked, report)
        yield StageDone(
            stage="heatmap", result=drawn, exit_code=drawn.exit_code, page=planned.folder
        )
    if "review" in request.stages:
        from bagscope.pipeline.review import ReviewRequest, write_review

        reviewed = write_review(
            ReviewRequest(place=trained.folder, overwrite=request.overwrite), report
        )
        yield StageDone(
            stage="review",
            result=reviewed,
            exit_code=reviewed.exit_code,
            page=reviewed.index,
        )


def _is_first(study: Study, request: LineRequest) -> bool:
    """Return whether nothing of the tiling is there: the time to say what lies ahead."""
    is_whole = request.shard is None and request.executor == "local"
    return is_whole and not study.tiling_folder(tiling_name(study.spec.tiling)).exists()


def _require_ready(study: Study, request: LineRequest) -> None:
    """Refuse what would stop the line hours later, before any slide is touched."""
    spec = study.spec
    if "train" in request.stages and spec.targets:
        from bagscope.mil.cases import cases_of
        from bagscope.pipeline.recipes import load_recipe

        recipe = load_recipe(spec.train.recipe, spec.train.options)
        try:
            cases_of(study.cohort(), spec.targets, per=recipe.bags.per)
        except CohortError as error:
            raise CohortError(f"{study.cohort_path}, read for its targets: {error}") from error
    if "extract" in request.stages and _is_first(study, request):
        from bagscope.pipeline.extract import load_encoders

        load_encoders(spec.features)


def _run_names(study: Study, encoders: list[str]) -> Mapping[str, str]:
    """Return the name of each encoder's run."""
    recipe = Path(study.spec.train.recipe).stem
    return {
        encoder: recipe if len(encoders) == 1 else f"{recipe}_{encoder}" for encoder in encoders
    }
