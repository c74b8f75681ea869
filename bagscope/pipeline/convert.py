"""Foreign feature files to ours and back: one run over all slides of a folder. Light to import."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.artifacts import sweep_temporaries
from bagscope.cohort.jobs import Failure, RunReport
from bagscope.cohort.progress import Progress, Reporter, RunFinished, RunStarted, SlideFinished
from bagscope.cohort.table import SlideRow, load_cohort
from bagscope.errors import ConfigError
from bagscope.specs import did_you_mean

if TYPE_CHECKING:
    from bagscope.features.feature_file import StoredDtype
    from bagscope.features.interop.conversion import ConversionReport, OnSlide, SlideOutcome

STAGE = "convert"
OURS = "bagscope"
LAYOUTS = (OURS, "anndata", "anndata-zarr", "clam", "stamp", "torchmil", "trident")
DTYPES = ("float16", "float32")
LABEL_COLUMN = "label"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertRequest:
    """What is to be converted, as asked on the command line.

    Attributes:
        source: a file or folder of features.
        dest: the folder to write into.
        to: "bagscope" to import, else the layout to write.
        encoder: its name, over what the files say.
        mpp: micrometres per level-0 pixel of all slides; for imports.
        slides: a cohort table, for pixel sizes (imports) and labels (exports).
        dtype: to store; for imports.
        overwrite: replace what was made differently.
    """

    source: Path
    dest: Path
    to: str = OURS
    encoder: str | None = None
    mpp: float | None = None
    slides: Path | None = None
    dtype: StoredDtype | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What a conversion would do: from which layout, and which slides."""

    layout: str
    slide_ids: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """How a conversion ended; `notes` concern no single slide."""

    run: RunReport
    layout: str
    notes: tuple[str, ...]


def plan_conversion(request: ConvertRequest) -> Planned:
    """Look at the source and say what would be converted; write nothing.

    Raises:
        ConfigError: an option that does not fit, or a source that can't be converted.
    """
    from bagscope.features.interop import find_feature_files, recognise

    _check(request)
    if request.to != OURS:
        files = find_feature_files(request.source)
        return Planned(layout=OURS, slide_ids=tuple(path.stem for path in files))
    found = recognise(request.source)
    ids = tuple(source.slide_id for source in found.sources)
    return Planned(layout=found.layout, slide_ids=ids, notes=found.notes)


def convert(request: ConvertRequest, report: Reporter) -> Converted:
    """Convert every slide; one that fails stops no other.

    Raises:
        ConfigError: an option that does not fit, or a source that can't be converted.
    """
    from bagscope.features.interop import (
        export_features,
        find_feature_files,
        import_features,
        recognise,
    )

    _check(request)
    sweep_temporaries(request.dest)
    rows = _rows(request.slides)
    if request.to == OURS:
        found = recognise(request.source)
        return _run(
            len(found.sources),
            report,
            lambda on_slide: import_features(
                found,
                request.dest,
                encoder=request.encoder,
                mpp=request.mpp,
                slides=rows,
                dtype=request.dtype,
                overwrite=request.overwrite,
                on_slide=on_slide,
            ),
        )
    files = find_feature_files(request.source)
    labels = {
        slide_id: row.columns[LABEL_COLUMN]
        for slide_id, row in (rows or {}).items()
        if row.columns.get(LABEL_COLUMN)
    }
    return _run(
        len(files),
        report,
        lambda on_slide: export_features(
            files,
            request.dest,
            to=request.to,  # type: ignore[arg-type]  # checked against LAYOUTS
            encoder=request.encoder,
            labels=labels,
            overwrite=request.overwrite,
            on_slide=on_slide,
        ),
    )


def _check(request: ConvertRequest) -> None:
    if request.to not in LAYOUTS:
        raise ConfigError(f"--to is {request.to!r}{did_you_mean(request.to, LAYOUTS)}")
    if request.dtype is not None and request.dtype not in DTYPES:
        raise ConfigError(f"--dtype is {request.dtype!r}; choose one of {', '.join(DTYPES)}")
    if request.to != OURS:
        for option, value in (("--mpp", request.mpp), ("--dtype", request.dtype)):
            if value is not None:
                raise ConfigError(f"{option} is for imports; leave it out with --to {request.to}")
    source, dest = request.source.resolve(), request.dest.resolve()
    if dest == source or source in dest.parents:
        raise ConfigError(
            f"{request.dest}: lies in the source {request.source}; choose a folder outside of it"
        )


def _rows(table: Path | None) -> Mapping[str, SlideRow] | None:
    return None if table is None else {row.slide_id: row for row in load_cohort(table).rows}


def _run(total: int, report: Reporter, work: Callable[[OnSlide], ConversionReport]) -> Converted:
    """Run a conversion and tell of it as of any other run."""
    started = time.perf_counter()
    finished = failed = tiles = 0
    report.emit(RunStarted(stage=STAGE, total=total, workers=1))

    def on_slide(outcome: SlideOutcome) -> None:
        nonlocal finished, failed, tiles
        finished += 1
        failed += outcome.outcome == "failed"
        tiles += outcome.tiles
        seconds = time.perf_counter() - started
        progress = Progress(
            finished=finished,
            total=total,
            failed=failed,
            tiles=tiles,
            seconds=seconds,
            tiles_per_s=tiles / seconds if seconds else 0.0,
            left_s=seconds / finished * (total - finished),
        )
        report.emit(
            SlideFinished(
                stage=STAGE,
                slide_id=outcome.slide_id,
                outcome=outcome.outcome,
                seconds=outcome.seconds,
                progress=progress,
                facts={"tiles": outcome.tiles} if outcome.outcome == "done" else {},
                warnings=outcome.warnings,
                error_class=outcome.error_class,
                message=outcome.message,
            )
        )

    result = work(on_slide)
    run = RunReport(
        stage=STAGE,
        total=total,
        counts=result.counts,
        failures=tuple(
            Failure(slide_id=one.slide_id, error_class=one.error_class, message=one.message)
            for one in result.failures
        ),
        seconds=time.perf_counter() - started,
        tiles=tiles,
        warnings=tuple((one.slide_id, said) for one in result.outcomes for said in one.warnings),
    )
    report.emit(RunFinished(report=run))
    return Converted(run=run, layout=result.layout, notes=result.notes)
