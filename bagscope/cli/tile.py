"""`bagscope tile`: slides → tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bagscope.cli import console, options
from bagscope.cohort.jobs import parse_shard
from bagscope.errors import ConfigError
from bagscope.pipeline.study import Study, init_study, open_study
from bagscope.pipeline.tile import Annotations, Export, tile_cohort
from bagscope.wsi.tiling import tiling_name

FRAMES = ("qupath", "openslide")
LAYOUTS = ("tar", "folder")


def tile(
    study: options.Study,
    slides: options.Slides = None,
    mpp: options.MppOption = None,
    tile_px: options.TilePx = None,
    overlap_px: options.OverlapPx = None,
    coarser_mpp: options.CoarserMpp = None,
    min_tissue: options.MinTissue = None,
    max_pen: options.MaxPen = None,
    max_fold: options.MaxFold = None,
    min_sharpness: options.MinSharpness = None,
    max_unreadable: options.MaxUnreadable = None,
    max_tiles: options.MaxTiles = None,
    seed: options.Seed = None,
    downscale: options.Downscale = None,
    allow_upsampling: options.AllowUpsampling = None,
    allow_estimated_mpp: options.AllowEstimatedMpp = None,
    roi: Annotated[
        Path | None,
        typer.Option(help="GeoJSON file, or a folder of <slide_id>.geojson, to tile inside of"),
    ] = None,
    roi_include: Annotated[
        list[str] | None,
        typer.Option(help="annotation class to tile inside of; may be repeated"),
    ] = None,
    roi_exclude: Annotated[
        list[str] | None,
        typer.Option(help="annotation class to keep away from; may be repeated"),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="folder of edited <slide_id>.geojson to use in place of segmentation"),
    ] = None,
    frame: Annotated[
        str, typer.Option(help="origin of annotation coordinates: qupath or openslide")
    ] = "qupath",
    export_png: Annotated[
        Path | None, typer.Option(help="also write the tiles as PNG into this folder")
    ] = None,
    export_layout: Annotated[str, typer.Option(help="tar (one per slide) or folder")] = "tar",
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
    """Find tissue and cut every slide of a study into tiles; resumes where it stopped."""
    tiling = {
        "mpp": mpp,
        "tile_px": tile_px,
        "overlap_px": overlap_px,
        "coarser_mpp": coarser_mpp,
        "min_tissue": min_tissue,
        "max_pen": max_pen,
        "max_fold": max_fold,
        "min_sharpness": min_sharpness,
        "max_unreadable": max_unreadable,
        "max_tiles": max_tiles,
        "seed": seed,
        "downscale": downscale,
        "allow_upsampling": allow_upsampling,
        "allow_estimated_mpp": allow_estimated_mpp,
        "roi": _roi(roi_include, roi_exclude),
    }
    run = {
        "workers": workers,
        "timeout_minutes": timeout_minutes,
        "memory_limit_gib": memory_limit_gib,
    }
    if slides is not None and not dry_run:
        init_study(study, slides)
    opened = open_study(study, {"tiling": tiling, "run": run})
    if tiling["roi"] and roi is None and not any(row.roi for row in opened.cohort().rows):
        raise ConfigError("--roi-include and --roi-exclude need annotations; pass --roi as well")
    if dry_run:
        _print_plan(opened, as_json=as_json)
        return
    report = tile_cohort(
        opened,
        console.reporter(as_json=as_json),
        annotations=Annotations(roi=roi, masks=masks, frame=_one_of(frame, FRAMES, "--frame")),
        backend=backend,
        export=_export(export_png, export_layout),
        overwrite=overwrite,
        shard=parse_shard(shard) if shard else None,
        executor=dask or "local",
    )
    console.print_report(report, as_json=as_json)
    raise typer.Exit(report.exit_code)


def _roi(include: list[str] | None, exclude: list[str] | None) -> dict[str, Any] | None:
    given = {"include": include or None, "exclude": exclude or None}
    return {name: value for name, value in given.items() if value} or None


def _export(folder: Path | None, layout: str) -> Export | None:
    return (
        Export(folder=folder, layout=_one_of(layout, LAYOUTS, "--export-layout"))
        if folder
        else None
    )


def _one_of(value: str, known: tuple[str, ...], option: str) -> Any:
    if value not in known:
        raise ConfigError(f"{option} is {value!r}; choose one of {', '.join(known)}")
    return value


def _print_plan(study: Study, *, as_json: bool) -> None:
    folder = study.tiling_folder(tiling_name(study.spec.tiling))
    rows = study.cohort().rows
    there = sum((folder / f"{row.slide_id}.h5").exists() for row in rows)
    if as_json:
        typer.echo(study.spec.tiling.model_dump_json())
        return
    typer.echo(f"{folder}: {there} of {len(rows)} slides have a tile file, which would be checked")
    typer.echo(study.spec.tiling.model_dump_json(indent=2))
