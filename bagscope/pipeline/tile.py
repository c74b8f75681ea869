"""The tile stage over a cohort: what the command and the library call. Light to import."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bagscope import artifacts
from bagscope.cohort.jobs import Job, RunOptions, RunReport, StageResult
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.cohort.status import read_statuses
from bagscope.cohort.table import SlideRow
from bagscope.errors import ConfigError
from bagscope.pipeline.preload import WORKER_MODULES
from bagscope.pipeline.study import RunSpec, Study, available_cores
from bagscope.wsi import contact_sheet
from bagscope.wsi.contact_sheet import SheetEntry
from bagscope.wsi.opening import require_backend
from bagscope.wsi.tiling import NUMERICS, TilingSpec, tiling_name

STAGE = "tile"

_SCENE = re.compile(r"#(\d+)$")

Frame = Literal["qupath", "openslide"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """Where annotations come from: for all slides a file or folder, each slide's own beside it.

    `frame` is the origin of their coordinates: QuPath's (the scanned bounds) or OpenSlide's.
    """

    roi: Path | None = None
    masks: Path | None = None
    frame: Frame = "qupath"


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """Where tiles go as PNG files, and whether as one tar per slide or one folder."""

    folder: Path
    layout: Literal["tar", "folder"] = "tar"


@dataclass(frozen=True, kw_only=True, slots=True)
class TileTask:
    """All that a worker needs to tile one slide."""

    slide_id: str
    path: Path
    mpp: float | None
    spec: TilingSpec
    tilings_folder: Path
    annotations: Annotations
    backend: str | None
    export: Export | None
    overwrite: bool
    threads: int


def tile_cohort(
    study: Study,
    report: Reporter,
    *,
    annotations: Annotations | None = None,
    backend: str | None = None,
    export: Export | None = None,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    executor: str = "local",
    only: frozenset[str] | None = None,
) -> RunReport:
    """Tile every slide of a study; resumes where an earlier run stopped.

    Args:
        study: an opened study; its spec says how to tile.
        report: is told of progress.
        annotations: regions to tile inside of, and edited masks.
        backend: read with this one and not the one chosen automatically.
        export: write the tiles' pixels too.
        overwrite: replace tilings that were made differently.
        shard: (i, n), to work on the i-th of n parts of the cohort.
        executor: "local", or the address of a Dask scheduler.
        only: ids of the slides to tile; all of the cohort if None.

    Raises:
        ConfigError: the cohort table or an option does not fit.
        FingerprintMismatch: the tiling exists with another spec and `overwrite` is false.
    """
    cohort = study.cohort()
    spec = study.spec.tiling
    name = tiling_name(spec)
    annotations = annotations or Annotations()
    require_backend(backend)
    _require_existing(annotations.roi, "--roi")
    _require_existing(annotations.masks, "--masks")
    _require_known_classes(spec, cohort.rows, annotations)
    # Cores that no other slide keeps busy help to read.
    threads = max(1, available_cores() // min(study.spec.run.worker_count, len(cohort.rows)))
    jobs = [
        Job(
            slide_id=row.slide_id,
            payload=_task(study, row, annotations, backend, export, overwrite, threads),
            weight=size_weight(row.path),
        )
        for row in cohort.rows
        if only is None or row.slide_id in only
    ]
    _claim_tiling(study, spec, overwrite=overwrite)
    result = run_cohort(
        jobs,
        tile_one,
        stage=f"{STAGE}/{name}",
        status_dir=study.status_folder,
        options=run_options(
            study.spec.run,
            shard,
            executor,
            preload=WORKER_MODULES,
            sweep=_folders_written(study, spec, export),
        ),
        report=report,
    )
    write_sheet(study, [row.slide_id for row in cohort.rows])
    return result


def tile_one(job: Job) -> StageResult:
    """Tile one slide, in a worker."""
    from bagscope.pipeline.tile_worker import tile_task

    return tile_task(job.payload)


def scene_of(slide_id: str) -> int | None:
    """Return the scene that an id such as `case-7#2` asks for, None for the whole file."""
    found = _SCENE.search(slide_id)
    return int(found[1]) if found else None


def size_weight(path: Path) -> float:
    """Return how long a slide takes compared with others, by the size of its file."""
    try:
        return float(max(1, path.stat().st_size))
    except OSError:
        return 1.0  # it will fail, quickly and by itself


def run_options(
    run: RunSpec,
    shard: tuple[int, int] | None,
    executor: str,
    *,
    preload: tuple[str, ...],
    sweep: tuple[Path, ...] = (),
) -> RunOptions:
    """Return the runner's options for a study's settings."""
    return RunOptions(
        workers=run.worker_count,
        timeout_s=run.timeout_minutes * 60,
        memory_limit_mib=run.memory_limit_gib * 1024,
        stale_claim_s=run.stale_claim_minutes * 60,
        shard=shard,
        executor=executor,
        preload=preload,
        sweep=sweep,
    )


def _folders_written(study: Study, spec: TilingSpec, export: Export | None) -> tuple[Path, ...]:
    folders = [study.tiling_folder(tiling_name(spec, m)) for m in (spec.mpp, *spec.coarser_mpp)]
    return (*folders, folders[0] / "masks", *((export.folder,) if export else ()))


def _task(
    study: Study,
    row: SlideRow,
    annotations: Annotations,
    backend: str | None,
    export: Export | None,
    overwrite: bool,
    threads: int,
) -> TileTask:
    roi = row.roi or annotations.roi
    return TileTask(
        slide_id=row.slide_id,
        path=row.path,
        mpp=row.mpp,
        spec=study.spec.tiling,
        tilings_folder=study.folder / "tilings",
        annotations=Annotations(roi=roi, masks=annotations.masks, frame=annotations.frame),
        backend=backend,
        export=export,
        overwrite=overwrite,
        threads=threads,
    )


def _claim_tiling(study: Study, spec: TilingSpec, *, overwrite: bool) -> None:
    """Write the tiling's spec, or refuse to mix two specs in one folder."""
    requested = {"spec": spec.model_dump(mode="json"), "numerics": NUMERICS}
    for mpp in (spec.mpp, *spec.coarser_mpp):
        folder = study.tiling_folder(tiling_name(spec, mpp))
        path = folder / "spec.json"
        if path.exists() and not overwrite:
            artifacts.require_same(
                artifacts.read_json(path),
                requested,
                what=str(folder),
                remedy="choose another study folder, or replace the tiling with --overwrite",
            )
        elif not path.exists() or artifacts.read_json(path) != requested:
            artifacts.write_json(path, requested)


def _require_known_classes(
    spec: TilingSpec, rows: Sequence[SlideRow], annotations: Annotations
) -> None:
    """Refuse a misspelt class before a whole cohort comes out empty."""
    if spec.roi.include is None and not spec.roi.exclude:
        return
    from bagscope.wsi import roi

    sources = ((row.roi or annotations.roi, row.slide_id) for row in rows)
    files = (roi.load(source, slide_id) for source, slide_id in sources if source is not None)
    roi.require_known_classes(
        (file for file in files if file is not None),
        roi.RoiSelection(include=spec.roi.include, exclude=spec.roi.exclude),
    )


def _require_existing(path: Path | None, option: str) -> None:
    if path is not None and not path.exists():
        raise ConfigError(f"{option} {path}: no such file or folder")


def write_sheet(study: Study, slide_ids: list[str]) -> Path:
    """Write the tiling's contact sheet from what the status files say; return its path."""
    name = tiling_name(study.spec.tiling)
    folder = study.tiling_folder(name)
    statuses = read_statuses(study.status_folder, f"{STAGE}/{name}")
    entries = []
    for slide_id in slide_ids:
        status = statuses.get(slide_id)
        if status is None:
            continue
        facts = status.facts
        picture = folder / "masks" / f"{slide_id}.jpg"
        entries.append(
            SheetEntry(
                slide_id=slide_id,
                picture=picture if picture.is_file() else None,
                tiles=int(facts.get("tiles", 0)),
                tissue_fraction=float(facts.get("tissue_fraction", 0)),
                pen_fraction=float(facts.get("pen_fraction", 0)),
                fold_fraction=float(facts.get("fold_fraction", 0)),
                blurred_fraction=float(facts.get("blurred_fraction", 0)),
                fragments=int(facts.get("fragments", 0)),
                # Found made or made just now: the page is the same.
                status="failed" if status.outcome == "failed" else "done",
                message=status.message,
                warnings=tuple(status.warnings),
            )
        )
    path = folder / "contact_sheet.html"
    contact_sheet.write(path, entries, title=name)
    return path
