"""The demo's slides: few tumour tiles decide the label, and a slide's means don't give it away.

Tumour has the mean colour of the tissue around it, sites differ in stain, and every slide has its
own share of glands, fat and lymphocytes; a positive slide has tumour on a few hundredths of its
tissue.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope import artifacts
from bagscope.cohort.jobs import Job, RunOptions, RunReport, StageResult
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.wsi.synthetic.cohort import TABLE_NAME, plan_cohort, write_alone, write_table
from bagscope.wsi.synthetic.spec import SyntheticSpec

if TYPE_CHECKING:
    from bagscope.wsi.synthetic.cohort import CohortSlide

STAGE = "slides"
PLAN_NAME = "slides.json"
TRUTH_NAME = "truth"
MPP = 0.5
TISSUE_FRACTION = 0.5
TUMOR_FRACTIONS = (0.02, 0.06)
VARIETY = 2.0
"""Slides differ so much in their tissue that a little tumour is lost in their means."""
WORKER_MODULES = ("bagscope.wsi.synthetic.painter", "bagscope.wsi.synthetic.slide", "cv2", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlidesSpec:
    """Which slides are wanted; half of them have tumour.

    Attributes:
        slides: how many.
        size_px: edge of level 0, at `MPP`.
        seed: of everything drawn.
    """

    slides: int = 40
    size_px: int = 4000
    seed: int = 0

    def planned(self) -> list[CohortSlide]:
        """Return the slides in the table's order."""
        base = SyntheticSpec(
            width_px=self.size_px,
            height_px=self.size_px,
            mpp=MPP,
            objective=20,
            tissue_fraction=TISSUE_FRACTION,
            variety=VARIETY,
        )
        return plan_cohort(
            slides=self.slides,
            positives=self.slides // 2,
            seed=self.seed,
            tumor_fractions=TUMOR_FRACTIONS,
            base=base,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideTask:
    """All that a worker needs to write one slide.

    Attributes:
        path: of the slide.
        truth: of its tumour outlines, called as other programs look for annotations.
    """

    path: Path
    truth: Path
    spec: SyntheticSpec


def write_slides(
    folder: Path, spec: SlidesSpec, report: Reporter, *, workers: int, status_dir: Path
) -> RunReport:
    """Write the slides that are missing, and last their table; resumes.

    Args:
        folder: of the demo; `slides/` and `truth/` come to lie in it.
        spec: which slides.
        report: is told of progress.
        workers: processes.
        status_dir: where status and claims are kept.

    Raises:
        FingerprintMismatch: the folder holds other slides.
    """
    planned = spec.planned()
    slides, truth = folder / "slides", folder / TRUTH_NAME
    _claim(folder / PLAN_NAME, planned)
    jobs = [
        Job(
            slide_id=row.slide_id,
            payload=SlideTask(
                path=slides / f"{row.slide_id}.svs",
                truth=truth / f"{row.slide_id}.geojson",
                spec=row.spec,
            ),
            # The tumour's colour is matched to that of the tissue, which takes its time.
            weight=2.0 if row.spec.tumor_fraction else 1.0,
        )
        for row in planned
    ]
    options = RunOptions(workers=workers, preload=WORKER_MODULES, sweep=(folder, slides, truth))
    made = run_cohort(
        jobs, write_one, stage=STAGE, status_dir=status_dir, options=options, report=report
    )
    if not made.exit_code:
        write_table(slides / TABLE_NAME, planned)
    return made


def write_one(job: Job) -> StageResult:
    """Write one slide, in a worker; its outlines come last, and say that it is whole."""
    task: SlideTask = job.payload
    fingerprint = artifacts.fingerprint({"spec": repr(task.spec)})
    if task.truth.exists():
        return StageResult(outcome="skipped", fingerprint=fingerprint)
    made = write_alone(task.path, task.spec)
    artifacts.write_bytes(task.truth, made.geojson.read_bytes())
    share = made.tumor_area_um2 / made.tissue_area_um2
    return StageResult(
        outcome="done", fingerprint=fingerprint, facts={"tumor_share": round(share, 4)}
    )


def _claim(path: Path, planned: list[CohortSlide]) -> None:
    """Write which slides the folder is for, or refuse to mix them with others."""
    first = planned[0].spec
    asked = {
        "slides": len(planned),
        "size_px": first.width_px,
        "mpp": first.mpp,
        "specs": artifacts.fingerprint({row.slide_id: repr(row.spec) for row in planned}),
    }
    if path.exists():
        artifacts.require_same(
            artifacts.read_json(path),
            asked,
            what=str(path.parent),
            remedy="name another folder, or remove this one",
        )
    else:
        artifacts.write_json(path, asked)
