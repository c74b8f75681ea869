"""Extraction on a Dask cluster: each slide goes whole to one engine beside a Dask worker.

The engine is kept for the slides that follow, so weights are loaded once per process. Its readers
are isolated as everywhere, and the process that it runs in is too (`cohort.executors.dask`).
"""

from __future__ import annotations

import multiprocessing.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope import errors
from bagscope.artifacts import canonical_json
from bagscope.cohort.jobs import Job, RunReport, StageResult
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.errors import SlideError
from bagscope.pipeline.extract import (
    ExtractOptions,
    features_folder,
    load_encoders,
    make_engine,
    make_sessions,
    make_targets,
    resolve_devices,
    slide_job,
    stage_name,
)
from bagscope.pipeline.preload import WORKER_MODULES
from bagscope.pipeline.study import Study, StudySpec
from bagscope.pipeline.tile import run_options

if TYPE_CHECKING:
    from bagscope.features.extract import ExtractExecutor, ExtractTask

_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteTask:
    """What the engine on the cluster needs to know of the study and of one slide."""

    study: Study
    tiling: str
    overwrite: bool
    task: ExtractTask


def extract_on_cluster(
    study: Study,
    tiling: str,
    folders: Sequence[Path],
    report: Reporter,
    options: ExtractOptions,
) -> RunReport:
    """Extract a study's features on the cluster that `options.executor` names."""
    jobs = []
    for row in study.cohort().rows:
        job = slide_job(study, tiling, row, options)
        payload = RemoteTask(
            study=study, tiling=tiling, overwrite=options.overwrite, task=job.payload
        )
        jobs.append(Job(slide_id=job.slide_id, payload=payload, weight=job.weight))
    return run_cohort(
        jobs,
        extract_one,
        stage=stage_name(tiling, folders),
        status_dir=study.status_folder,
        options=run_options(
            study.spec.run,
            options.shard,
            options.executor,
            preload=WORKER_MODULES,
            sweep=tuple(folders),
        ),
        report=report,
    )


def extract_one(job: Job) -> StageResult:
    """Extract one slide, in a process of its own on the cluster.

    Raises:
        BagscopeError: what the engine says of the slide.
    """
    remote: RemoteTask = job.payload
    # What was not set stays so: a split refuses options that its method makes no use of.
    spec = canonical_json(remote.study.spec.model_dump(mode="json", exclude_unset=True)).decode()
    engine = _engine(remote.study.folder, spec, remote.tiling, remote.overwrite)
    engine.start(Job(slide_id=job.slide_id, payload=remote.task))
    while not (ended := engine.wait(_WAIT_S)):
        pass
    record = ended[0].record
    if record["outcome"] == "failed":
        kind = getattr(errors, record["error_class"], SlideError)
        raise kind(record["message"])
    return StageResult(**{**record, "warnings": tuple(record["warnings"])})


@lru_cache(maxsize=1)
def _engine(folder: Path, spec: str, tiling: str, overwrite: bool) -> ExtractExecutor:
    """Return the engine of this process."""
    study = Study(folder=folder, spec=StudySpec.model_validate_json(spec))
    encoders = load_encoders(study.spec.features)
    folders = [features_folder(study, tiling, encoder) for encoder in encoders]
    device = resolve_devices(study.spec.features.device)[0]
    sessions = make_sessions(study, encoders, folders, device, tiling)
    targets = make_targets(study, sessions, folders)
    engine = make_engine(study, targets, readers=1, overwrite=overwrite)
    # multiprocessing waits for every child at exit; this runs before, or a reader would never end.
    multiprocessing.util.Finalize(None, engine.close, exitpriority=10)
    return engine
