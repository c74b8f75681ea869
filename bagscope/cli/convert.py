"""`bagscope convert`: other tools' feature files to ours, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bagscope.cli import console, options
from bagscope.pipeline.convert import LAYOUTS, OURS, ConvertRequest, plan_conversion
from bagscope.pipeline.convert import convert as run_conversion
from bagscope.wording import counted


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="a file or folder of features; its layout is found out"),
    ],
    dest: Annotated[Path, typer.Argument(help="the folder to write into")],
    to: Annotated[
        str, typer.Option("--to", help=f"{OURS} to import; else {', '.join(LAYOUTS[1:])}")
    ] = OURS,
    encoder: Annotated[
        str | None,
        typer.Option(help="name of the encoder, over what the files say", show_default=False),
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(
            help="micrometres per level-0 pixel of all slides, over what the slides say",
            show_default=False,
        ),
    ] = None,
    slides: Annotated[
        Path | None,
        typer.Option(
            help="cohort table: pixel sizes come from its slides, labels from its column label",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float16 or float32 (default: float16)", show_default=False),
    ] = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Import features of CLAM, TRIDENT, STAMP and others, or write ours for them."""
    stored: Any = dtype
    request = ConvertRequest(
        source=source,
        dest=dest,
        to=to,
        encoder=encoder,
        mpp=mpp,
        slides=slides,
        dtype=stored,
        overwrite=overwrite,
    )
    if dry_run:
        _print_plan(request, as_json=as_json)
        return
    done = run_conversion(request, console.reporter(as_json=as_json))
    console.print_report(done.run, as_json=as_json)
    for note in done.notes:
        typer.echo(json.dumps({"event": "note", "note": note}) if as_json else f"note: {note}")
    raise typer.Exit(done.run.exit_code)


def _print_plan(request: ConvertRequest, *, as_json: bool) -> None:
    planned = plan_conversion(request)
    if as_json:
        facts = {"layout": planned.layout, "to": request.to, "slides": planned.slide_ids}
        typer.echo(json.dumps({"event": "plan", **facts, "notes": planned.notes}))
        return
    slides = counted(len(planned.slide_ids), "slide")
    typer.echo(
        f"{request.source}: {slides} of {planned.layout}, to be written as {request.to} "
        f"into {request.dest}"
    )
    for note in planned.notes:
        typer.echo(f"note: {note}")
