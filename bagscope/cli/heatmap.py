"""`bagscope heatmap`: what a model says of each tile, as pictures and files for viewers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bagscope.cli import console, options
from bagscope.cohort.jobs import parse_shard
from bagscope.errors import ConfigError
from bagscope.heatmaps.choices import (
    DEFAULT_FORMATS,
    FINE_PARTS,
    FORMATS,
    MAX_TILES,
    GalleryOptions,
    ScaleName,
    Shows,
)
from bagscope.wording import counted

if TYPE_CHECKING:
    from bagscope.pipeline.fine import FineRequest
    from bagscope.pipeline.heatmap import PlannedHeatmaps

_GALLERY = GalleryOptions()
_MOST_NAMED = 20
"""Slides in a closing line."""


def heatmap(
    place: options.Scored,
    slide: options.OnlySlides = None,
    scale: Annotated[
        ScaleName | None,
        typer.Option("--scale", help="of the scores; the usual one if not set", show_default=False),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class", help="whose scores, where each class has its own", show_default=False
        ),
    ] = None,
    shows: Annotated[
        Shows, typer.Option("--show", help="the scores, or how far the members are apart")
    ] = "score",
    formats: Annotated[
        str, typer.Option("--formats", help=f"separated by commas, of {', '.join(FORMATS)}")
    ] = ",".join(DEFAULT_FORMATS),
    frame: Annotated[
        Literal["qupath", "openslide"],
        typer.Option("--frame", help="origin: QuPath's (the scanned bounds) or OpenSlide's"),
    ] = "qupath",
    levels: Annotated[
        str | None,
        typer.Option(
            "--levels", help="scores from which a region is hot, as 2,4", show_default=False
        ),
    ] = None,
    max_tiles: Annotated[
        int, typer.Option("--max-tiles", min=0, help="GeoJSON of more tiles has regions only")
    ] = MAX_TILES,
    limits: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range",
            metavar="LOW HIGH",
            help="ends of the colours, as 0.5 4; they hold all slides if not set",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            min=1,
            help=f"gallery: tiles at either end (default: {_GALLERY.count})",
            show_default=False,
        ),
    ] = None,
    apart: Annotated[
        float | None,
        typer.Option(
            "--apart",
            min=0,
            help=f"gallery: least distance of two, in tile edges (default: {_GALLERY.apart:g})",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        float | None,
        typer.Option(
            "--context",
            min=0,
            max=4,
            help=f"gallery: surroundings, in tile edges (default: {_GALLERY.context:g})",
            show_default=False,
        ),
    ] = None,
    fine: Annotated[
        str | None,
        typer.Option(
            "--fine",
            metavar="X,Y,W,H|GEOJSON",
            help="look into a region of one slide with overlapping tiles instead",
            show_default=False,
        ),
    ] = None,
    fine_parts: Annotated[
        int | None,
        typer.Option(
            "--fine-parts",
            min=2,
            max=16,
            help=f"finer tiles along a tile's edge (default: {FINE_PARTS})",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="of --fine, where not beside the scores", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="(default: STUDY/heatmaps/RUN)", show_default=False),
    ] = None,
    workers: options.Workers = None,
    shard: options.Shard = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Draw every slide's scores, in colours that mean the same on all of them; resumes."""
    named = tuple(dict.fromkeys(name.strip() for name in formats.split(",") if name.strip()))
    _require_meaning({"--fine-parts": fine_parts, "--model": model}, fine is not None, "--fine")
    gallery = {"--top": top, "--apart": apart, "--context": context}
    _require_meaning(gallery, "gallery" in named, "gallery among --formats")
    if fine is not None:
        from bagscope.pipeline.fine import FineRequest

        kept = {
            "--formats": None if named == DEFAULT_FORMATS else named,
            "--show": None if shows == "score" else shows,
            "--levels": levels,
            "--max-tiles": None if max_tiles == MAX_TILES else max_tiles,
            "--workers": workers,
            "--shard": shard,
        }
        for option, value in kept.items():
            if value is not None:
                raise ConfigError(f"{option} has no meaning with --fine")
        _draw_finer(
            FineRequest(
                place=place,
                region=fine,
                slides=tuple(slide or ()),
                scale=scale,
                class_name=class_name,
                frame=frame,
                limits=limits,
                parts=FINE_PARTS if fine_parts is None else fine_parts,
                model=model,
                out=out,
                overwrite=overwrite,
                dry_run=dry_run,
            ),
            as_json=as_json,
        )
        return
    from bagscope.pipeline.heatmap import HeatmapRequest, draw_heatmaps, plan_heatmaps

    request = HeatmapRequest(
        place=place,
        slides=tuple(slide or ()),
        scale=scale,
        class_name=class_name,
        shows=shows,
        formats=named,
        frame=frame,
        levels=None if levels is None else _numbers(levels),
        max_tiles=max_tiles,
        limits=limits,
        out=out,
        workers=workers,
        overwrite=overwrite,
        shard=parse_shard(shard) if shard else None,
        gallery=GalleryOptions(
            count=_GALLERY.count if top is None else top,
            apart=_GALLERY.apart if apart is None else apart,
            context=_GALLERY.context if context is None else context,
        ),
    )
    planned = plan_heatmaps(request)
    _print_plan(planned, as_json=as_json)
    if dry_run:
        return
    report = draw_heatmaps(planned, request, console.reporter(as_json=as_json))
    console.print_report(report, as_json=as_json)
    if not as_json:
        typer.echo(f"heatmaps: {planned.folder / '*' / planned.drawn}")
        for line in _doubts(planned, len(planned.tasks) - len(report.failures)):
            typer.echo(line)
    raise typer.Exit(report.exit_code)


def _require_meaning(given: Mapping[str, object], has_meaning: bool, what: str) -> None:
    for option, value in given.items():
        if value is not None and not has_meaning:
            raise ConfigError(f"{option} has no meaning without {what}")


def _draw_finer(request: FineRequest, *, as_json: bool) -> None:
    from bagscope.pipeline.fine import draw_finer

    found = draw_finer(request, lambda said: typer.echo(said, err=True))
    if as_json:
        facts = {
            "tiles": found.tiles,
            "folder": str(found.folder),
            "is_new": found.is_new,
            "warnings": list(found.warnings),
        }
        console.print_json("fine", facts)
        return
    for warning in found.warnings:
        typer.echo(f"  warning: {warning}")
    if request.dry_run and found.tiles:
        typer.echo(f"{found.tiles:,} finer tiles would be scored into {found.folder}")
    else:
        done = f"{found.tiles:,} finer tiles" if found.is_new else "there already"
        typer.echo(f"{done}: {found.folder}")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"--levels is {text!r}; write numbers separated by commas")
    return numbers


def _doubts(planned: PlannedHeatmaps, drawn: int) -> list[str]:
    """Return which of the heatmaps drawn are not to be believed, in lines."""
    doubted = planned.doubted
    if not doubted:
        return []
    more = len(doubted) - _MOST_NAMED
    names = ", ".join(doubted[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    what = f"{len(doubted)} of {drawn} heatmaps are not to be believed"
    return [f"warning: {what} (each says why): {names}"]


def _print_plan(planned: PlannedHeatmaps, *, as_json: bool) -> None:
    colours = planned.colours
    if as_json:
        facts = {
            "scale": colours.scale,
            "of": planned.of,
            "low": colours.low,
            "high": colours.high,
            "slides": len(planned.tasks),
            "folder": str(planned.folder),
            "shows": colours.shows,
            "doubted": list(planned.doubted),
            "notes": list(planned.notes),
        }
        console.print_json("plan", facts)
        return
    for note in planned.notes:
        typer.echo(f"  note: {note}")
    of = f" of {planned.of}" if planned.of else ""
    what = "disagreement on " if colours.shows == "disagreement" else ""
    typer.echo(
        f"{counted(len(planned.tasks), 'slide')}, {what}{colours.scale}{of}; "
        f"colours from {colours.low:g} to {colours.high:g} on all of them"
    )
