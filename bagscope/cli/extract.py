"""`bagscope extract`: tiles → features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bagscope.cli import console, options
from bagscope.cohort.jobs import parse_shard
from bagscope.features.extraction import ExtractSpec
from bagscope.pipeline.extract import ExtractOptions, extract_cohort
from bagscope.pipeline.study import Study, init_study, open_study
from bagscope.wsi.tiling import tiling_name


def extract(
    study: options.Study,
    slides: options.Slides = None,
    encoder: Annotated[
        list[str] | None, options.of(ExtractSpec, "encoders", "--encoder", "-e")
    ] = None,
    stain: Annotated[str | None, options.of(ExtractSpec, "stain", "--stain")] = None,
    stored_dtype: Annotated[
        str | None, options.of(ExtractSpec, "stored_dtype", "--stored-dtype")
    ] = None,
    device: Annotated[str | None, options.of(ExtractSpec, "device", "--device")] = None,
    precision: Annotated[str | None, options.of(ExtractSpec, "precision", "--precision")] = None,
    batch_size: Annotated[int | None, options.of(ExtractSpec, "batch_size", "--batch-size")] = None,
    compile_: Annotated[str | None, options.of(ExtractSpec, "compile", "--compile")] = None,
    weights: Annotated[str | None, options.of(ExtractSpec, "weights", "--weights")] = None,
    trust_remote_code: Annotated[
        bool | None,
        options.of(
            ExtractSpec,
            "trust_remote_code",
            "--trust-remote-code/--no-trust-remote-code",
        ),
    ] = None,
    mpp: options.MppOption = None,
    tile_px: options.TilePx = None,
    tiling: Annotated[
        str | None,
        typer.Option(help="folder under tilings/; the study's own if not set", show_default=False),
    ] = None,
    backend: options.Backend = None,
    workers: options.Workers = None,
    timeout_minutes: options.TimeoutMinutes = None,
    memory_limit_gib: options.MemoryLimitGib = None,
    shard: options.Shard = None,
    dask: options.Dask = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a vector of every tile of a study, tiling first where needed; resumes."""
    features = {
        "encoders": _names(encoder),
        "stain": stain,
        "stored_dtype": stored_dtype,
        "device": device,
        "precision": precision,
        "batch_size": batch_size,
        "compile": compile_,
        "weights": weights,
        "trust_remote_code": trust_remote_code,
    }
    run = {
        "workers": workers,
        "timeout_minutes": timeout_minutes,
        "memory_limit_gib": memory_limit_gib,
    }
    if slides is not None and not dry_run:
        init_study(study, slides)
    opened = open_study(
        study, {"tiling": {"mpp": mpp, "tile_px": tile_px}, "features": features, "run": run}
    )
    if dry_run:
        _print_plan(opened, tiling, as_json=as_json)
        return
    result = extract_cohort(
        opened,
        console.reporter(as_json=as_json),
        ExtractOptions(
            tiling=tiling,
            backend=backend,
            overwrite=overwrite,
            shard=parse_shard(shard) if shard else None,
            executor=dask or "local",
        ),
    )
    console.print_extraction(result, as_json=as_json)
    raise typer.Exit(result.report.exit_code)


def _names(given: list[str] | None) -> list[str] | None:
    """Return names given one by one or separated by commas."""
    if not given:
        return None
    return [name.strip() for text in given for name in text.split(",") if name.strip()]


def _print_plan(study: Study, tiling: str | None, *, as_json: bool) -> None:
    spec = study.spec.features
    if as_json:
        typer.echo(spec.model_dump_json())
        return
    name = tiling or tiling_name(study.spec.tiling)
    rows = study.cohort().rows
    tiled = sum(_exists(study.tiling_folder(name), row.slide_id) for row in rows)
    typer.echo(f"{name}: {tiled} of {len(rows)} slides are tiled; the others would be")
    typer.echo(spec.model_dump_json(indent=2))


def _exists(folder: Path, slide_id: str) -> bool:
    return (folder / f"{slide_id}.h5").exists()
