"""A cohort of synthetic slides with its table."""

from __future__ import annotations

import csv
import io
import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from bagscope.artifacts import write_text
from bagscope.wsi.synthetic.spec import SyntheticSpec

POSITIVE, NEGATIVE = "tumor", "normal"
COLUMNS = ("slide_id", "path", "patient_id", "label", "site")
TUMOR_FRACTIONS = (0.01, 0.30)

_SLIDES_PER_PAIR = 6
"""Of so many slides of one label, two come from one patient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CohortSlide:
    """One row of the table, and the slide that it stands for."""

    slide_id: str
    patient_id: str
    label: str
    site: int
    spec: SyntheticSpec


def plan_cohort(
    *,
    slides: int,
    positives: int,
    seed: int,
    sites: int = 2,
    base: SyntheticSpec | None = None,
) -> list[CohortSlide]:
    """Plan a cohort: labels and sites independent, some patients with two slides of one label.

    Args:
        slides: how many.
        positives: how many of them hold tumour, 1 to 30 % of the tissue area, evenly spread on a
            logarithmic scale.
        seed: of the slides and of their order.
        sites: how many sites the patients come from.
        base: everything else about the slides.

    Raises:
        ValueError: more positives than slides, or none to make.
    """
    import numpy as np

    if not 0 <= positives <= slides or slides < 1 or sites < 1:
        raise ValueError(
            f"{positives} positives among {slides} slides of {sites} sites can't be made; "
            "ask for at least one slide and one site, and for no more positives than slides"
        )
    base = base or SyntheticSpec()
    rng = np.random.default_rng([9, seed])
    low, high = np.log(TUMOR_FRACTIONS)
    steps = (np.arange(positives) + 0.5) / max(positives, 1)
    fractions = np.concatenate([np.exp(low + (high - low) * steps), np.zeros(slides - positives)])
    owners = [*_owners(positives), *(positives + o for o in _owners(slides - positives))]
    order = rng.permutation(slides)
    # Patients are numbered as they come up in the table, so that the number tells nothing.
    number: dict[int, int] = {}
    planned = []
    for position, i in enumerate(order.tolist()):
        patient = number.setdefault(owners[i], len(number))
        positive = i < positives
        # Within each label the sites take turns, so that the site says nothing of the label.
        site = (owners[i] - (0 if positive else positives)) % sites
        planned.append(
            CohortSlide(
                slide_id=f"slide_{position:03d}",
                patient_id=f"patient_{patient:03d}",
                label=POSITIVE if positive else NEGATIVE,
                site=site,
                spec=replace(
                    base,
                    seed=seed * 100_003 + position,
                    site=site,
                    tumor_fraction=round(float(fractions[i]), 4),
                ),
            )
        )
    return planned


def _owners(slides: int) -> list[int]:
    """Return whose each of some slides is: every so often the same patient's as the one before."""
    again = (i % _SLIDES_PER_PAIR == 1 for i in range(slides))
    return [owner - 1 for owner in itertools.accumulate(0 if same else 1 for same in again)]


def write_cohort(
    folder: Path,
    *,
    slides: int = 40,
    positives: int = 20,
    size_px: int = 8000,
    mpp: float = 0.25,
    seed: int = 0,
    sites: int = 2,
    workers: int = 2,
    base: SyntheticSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a cohort of slides with their truth, and its table last.

    Args:
        folder: where to; made where it is missing.
        slides: how many.
        positives: how many of them hold tumour, 1 to 30 % of the tissue area.
        size_px: edge of the slides' level 0.
        mpp: of level 0.
        seed: of the slides and of their order.
        sites: how many sites the patients come from.
        base: everything else about the slides.
        workers: processes; 1 works in this one. More are started afresh, so that a script that
            asks for them needs the usual `if __name__ == "__main__":`.
        progress: called with (slides done, slides in all) after each.

    Returns:
        The table `cohort.csv`: slide_id, path, patient_id, label, site.

    Raises:
        ArtifactError: a file could not be written.
        ValueError: a cohort that can't be made.
    """
    base = replace(base or SyntheticSpec(), width_px=size_px, height_px=size_px, mpp=mpp)
    planned = plan_cohort(slides=slides, positives=positives, seed=seed, sites=sites, base=base)
    jobs = [(folder / f"{row.slide_id}.svs", row.spec) for row in planned]
    workers = min(workers, slides)
    if workers <= 1:
        for done, job in enumerate(jobs, start=1):
            _write(*job)
            _tell(progress, done, slides)
    else:
        # Not fork: the parent may hold threads and open slides.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
            try:
                waiting = as_completed([pool.submit(_write, *job) for job in jobs])
                for done, finished in enumerate(waiting, start=1):
                    finished.result()
                    _tell(progress, done, slides)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in planned:
        name = f"{row.slide_id}.svs"
        writer.writerow([row.slide_id, name, row.patient_id, row.label, f"site_{row.site}"])
    path = folder / "cohort.csv"
    write_text(path, table.getvalue())
    return path


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _write(path: Path, spec: SyntheticSpec) -> None:
    from bagscope.wsi.synthetic.slide import write_slide

    write_slide(path, spec)


def _one_thread() -> None:
    """Keep OpenCV from starting threads of its own in every process."""
    import cv2

    cv2.setNumThreads(1)
