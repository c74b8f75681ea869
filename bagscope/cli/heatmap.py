"""`bagscope heatmap`: what a model says of each tile, as pictures and files for viewers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bagscope.cli import console, options
from bagscope.cohort.jobs import parse_shard
from bagscope.errors import ConfigError
from bagscope.heatmaps.choices import DEFAULT_FORMATS, FORMATS, MAX_TILES, ScaleName, Shows

if TYPE_CHECKING:
    from bagscope.pipeline.heatmap import PlannedHeatmaps

_MOST_NAMED = 20
"""Slides in a closing line."""


def heatmap(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|PREDICTIONS", help="a run, or a folder of predictions", show_default=False
        ),
    ],
    slide: Annotated[
        list[str] | None,
        typer.Option("--slide", help="only this one; may be repeated", show_default=False),
    ] = None,
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
            "--range", help="of the colours; holds all slides if not set", show_default=False
        ),
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
    from bagscope.pipeline.heatmap import HeatmapRequest, draw_heatmaps, plan_heatmaps

    request = HeatmapRequest(
        place=place,
        slides=tuple(slide or ()),
        scale=scale,
        class_name=class_name,
        shows=shows,
        formats=tuple(dict.fromkeys(name.strip() for name in formats.split(",") if name.strip())),
        frame=frame,
        levels=None if levels is None else _numbers(levels),
        max_tiles=max_tiles,
        limits=limits,
        out=out,
        workers=workers,
        overwrite=overwrite,
        shard=parse_shard(shard) if shard else None,
    )
    planned = plan_heatmaps(request)
    _print_plan(planned, as_json=as_json)
    if dry_run:
        return
    report = draw_heatmaps(planned, request, console.reporter(as_json=as_json))
    console.print_report(report, as_json=as_json)
    if not as_json:
        typer.echo(f"heatmaps: {planned.folder / '*' / planned.drawn}")
        for line in _doubts(planned):
            typer.echo(line)
    raise typer.Exit(report.exit_code)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--levels is {text!r}; write numbers separated by commas") from None


def _doubts(planned: PlannedHeatmaps) -> list[str]:
    """Return which heatmaps are not to be believed, in lines."""
    doubted = planned.doubted
    if not doubted:
        return []
    more = len(doubted) - _MOST_NAMED
    names = ", ".join(doubted[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    what = f"{len(doubted)} of {len(planned.tasks)} heatmaps are not to be believed"
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
        f"{len(planned.tasks)} slides, {what}{colours.scale}{of}; "
        f"colours from {colours.low:g} to {colours.high:g} on all of them"
    )
