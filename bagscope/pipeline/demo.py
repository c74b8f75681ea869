"""The demo: a synthetic cohort, run through every stage that there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.cohort.jobs import RunReport
from bagscope.cohort.progress import Reporter
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.extract import ExtractResult, extract_cohort
from bagscope.pipeline.study import available_cores, init_study, open_study
from bagscope.pipeline.tile import tile_cohort
from bagscope.pipeline.train import TrainRequest, TrainResult, train_run
from bagscope.wsi.tiling import tiling_name

if TYPE_CHECKING:
    from bagscope.pipeline.evaluate import EvaluateResult

STAGES = ("tile", "extract", "train", "evaluate", "heatmap")
TARGET = TargetSpec(column="label", positive="tumor")
FOLDS = 3


@dataclass(kw_only=True, slots=True)
class DemoResult:
    """How the demo ended: what each stage that it came to said, and the pages to look at."""

    tiled: RunReport
    extracted: ExtractResult | None = None
    trained: TrainResult | None = None
    evaluated: EvaluateResult | None = None
    drawn: RunReport | None = None
    pages: tuple[Path, ...] = ()

    @property
    def exit_code(self) -> int:
        """Return the exit code of the last stage."""
        if self.drawn is not None:
            return self.drawn.exit_code
        if self.trained is not None:
            return self.trained.exit_code
        return self.extracted.report.exit_code if self.extracted else self.tiled.exit_code


def run_demo(
    folder: Path,
    report: Reporter,
    *,
    slides: int,
    size_px: int,
    seed: int,
    workers: int | None,
    until: str = STAGES[-1],
) -> DemoResult:
    """Write synthetic slides where they are missing, and run the stages up to `until` on them."""
    from bagscope.wsi.synthetic import write_cohort

    table = folder / "slides" / "cohort.csv"
    if not table.exists():
        write_cohort(
            table.parent,
            slides=slides,
            positives=slides // 2,
            size_px=size_px,
            seed=seed,
            workers=workers or available_cores(),
        )
    init_study(folder / "study", str(table))
    study = open_study(folder / "study", {"run": {"workers": workers}, "splits": {"folds": FOLDS}})
    wanted = STAGES[: STAGES.index(until) + 1]
    found = DemoResult(tiled=tile_cohort(study, report))
    found.pages = (study.tiling_folder(tiling_name(study.spec.tiling)) / "contact_sheet.html",)
    if "extract" in wanted and not found.exit_code:
        found.extracted = extract_cohort(study, report)
    if "train" in wanted and not found.exit_code:
        found.trained = train_run(study, TrainRequest(targets=(TARGET,)), report)
    if "evaluate" in wanted and not found.exit_code and found.trained is not None:
        from bagscope.pipeline.evaluate import EvaluateRequest, evaluate_run

        found.evaluated = evaluate_run(EvaluateRequest(run=found.trained.folder))
        found.pages += (found.evaluated.report,)
    if "heatmap" in wanted and not found.exit_code and found.trained is not None:
        from bagscope.pipeline.heatmap import HeatmapRequest, draw_heatmaps, plan_heatmaps

        request = HeatmapRequest(place=found.trained.folder, workers=workers)
        planned = plan_heatmaps(request)
        found.drawn = draw_heatmaps(planned, request, report)
        found.pages += (planned.folder,)
    return found
