"""The demo: a synthetic cohort, run through every stage that there is."""

from __future__ import annotations

from pathlib import Path

from bagscope.cohort.jobs import RunReport
from bagscope.cohort.progress import Reporter
from bagscope.pipeline.study import available_cores, init_study, open_study
from bagscope.pipeline.tile import tile_cohort
from bagscope.wsi.tiling import tiling_name

STAGES = ("tile",)


def run_demo(
    folder: Path,
    report: Reporter,
    *,
    slides: int,
    size_px: int,
    seed: int,
    workers: int | None,
) -> tuple[RunReport, Path]:
    """Write synthetic slides where they are missing, and tile them.

    Returns:
        The run's report and the contact sheet's path.
    """
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
    study = open_study(folder / "study", {"run": {"workers": workers}})
    result = tile_cohort(study, report)
    sheet = study.tiling_folder(tiling_name(study.spec.tiling)) / "contact_sheet.html"
    return result, sheet
