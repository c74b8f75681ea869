"""The demo: a synthetic cohort, run through every stage that there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bagscope.cohort.jobs import RunReport
from bagscope.cohort.progress import Reporter
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.extract import ExtractResult, extract_cohort
from bagscope.pipeline.study import available_cores, init_study, open_study
from bagscope.pipeline.tile import tile_cohort
from bagscope.pipeline.train import TrainRequest, TrainResult, train_run
from bagscope.wsi.tiling import tiling_name

STAGES = ("tile", "extract", "train")
TARGET = TargetSpec(column="label", positive="tumor")
FOLDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """How the demo ended: the report of each stage that it came to, and the page to look at."""

    tiled: RunReport
    extracted: ExtractResult | None
    trained: TrainResult | None
    sheet: Path

    @property
    def exit_code(self) -> int:
        """Return the exit code of the last stage."""
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
    study = open_study(
        folder / "study", {"run": {"workers": workers}, "splits": {"folds": FOLDS}}
    )
    tiled = tile_cohort(study, report)
    extracted, trained = None, None
    if until != "tile" and not tiled.exit_code:
        extracted = extract_cohort(study, report)
    if until == "train" and extracted is not None and not extracted.report.exit_code:
        trained = train_run(study, TrainRequest(targets=(TARGET,)), report)
    sheet = study.tiling_folder(tiling_name(study.spec.tiling)) / "contact_sheet.html"
    return DemoResult(tiled=tiled, extracted=extracted, trained=trained, sheet=sheet)
