"""A cohort of synthetic slides with its table."""

from __future__ import annotations

import csv
import io
import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from bagscope.artifacts import write_text
from bagscope.wsi.synthetic.spec import SyntheticSpec, SyntheticTruth

POSITIVE, NEGATIVE = "tumor", "normal"
TABLE_NAME = "cohort.csv"
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
    tumor_fractions: tuple[float, float] = TUMOR_FRACTIONS,
    base: SyntheticSpec | None = None,
) -> list[CohortSlide]:
    """Plan a cohort: labels and sites independent, some patients with two slides of one label.

    Args:
        slides: how many.
        positives: how many of them hold tumour.
        seed: of the slides and of their order.
        sites: how many sites the patients come from.
        tumor_fractions: least and most of the tissue area that is tumour on those, evenly spread
            on a logarithmic scale.
        base: everything else about the slides.

    Raises:
        ValueError: more positives than slides, none to make, or fractions out of order.
    """
    import numpy as np

    if not 0 <= positives <= slides or slides < 1 or sites < 1:
        raise ValueError(
            f"{positives} positives among {slides} slides of {sites} sites can't be made; "
            "ask for at least one slide and one site, and for no more positives than slides"
        )
    if not 0 < tumor_fractions[0] <= tumor_fractions[1]:
        raise ValueError(
            f"tumor_fractions are {tumor_fractions}; give the least, above 0, and then the most"
        )
    base = base or SyntheticSpec()
    rng = np.random.default_rng([9, seed])
    low, high = np.log(tumor_fractions)
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
    tumor_fractions: tuple[float, float] = TUMOR_FRACTIONS,
    workers: int = 2,
    base: SyntheticSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a cohort of slides with their truth, and its table last.

    Args:
        folder: where to; made where it is missing.
        slides: how many.
        positives: how many of them hold tumour.
        size_px: edge of the slides' level 0.
        mpp: of level 0.
        seed: of the slides and of their order.
        sites: how many sites the patients come from.
        tumor_fractions: least and most of the tissue area that is tumour on those.
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
    planned = plan_cohort(
        slides=slides,
        positives=positives,
        seed=seed,
        sites=sites,
        tumor_fractions=tumor_fractions,
        base=base,
    )
    jobs = [(folder / f"{row.slide_id}.svs", row.spec) for row in planned]
    workers = min(workers, slides)
    if workers <= 1:
        for done, job in enumerate(jobs, start=1):
            write_alone(*job)
            _tell(progress, done, slides)
    else:
        # Not fork: the parent may hold threads and open slides.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            try:
                waiting = as_completed([pool.submit(write_alone, *job) for job in jobs])
                for done, finished in enumerate(waiting, start=1):
                    finished.result()
                    _tell(progress, done, slides)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    path = folder / TABLE_NAME
    write_table(path, planned)
    return path


def write_table(path: Path, planned: Sequence[CohortSlide]) -> None:
    """Write the table of a planned cohort, whose slides lie beside it."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in planned:
        name = f"{row.slide_id}.svs"
        writer.writerow([row.slide_id, name, row.patient_id, row.label, f"site_{row.site}"])
    write_text(path, table.getvalue())


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def write_alone(path: Path, spec: SyntheticSpec) -> SyntheticTruth:
    """Write a slide (see `write_slide`) on one core, as other processes write others."""
    import cv2
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from bagscope.wsi.synthetic.slide import write_slide

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        # Of BLAS too: threads would spend their time waiting for the next small product.
        with threadpool_limits(1):
            return write_slide(path, spec)
    finally:
        cv2.setNumThreads(threads)
