"""`bagscope view`: a run's review page in the browser, straight from the original slides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bagscope.cli import console, options
from bagscope.pipeline.view import (
    CACHE_MIB,
    LOCAL,
    RANDOM_TOKEN,
    READERS,
    SHORTEST_TOKEN,
    ViewRequest,
    open_view,
    serve,
)


def view(
    study: options.Study,
    run: Annotated[
        str | None,
        typer.Argument(help="the only run to show; all that have scores if not set"),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="to listen at; others than this machine need a token")
    ] = LOCAL,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="to listen at; 0 for a free one")
    ] = 0,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            envvar="BAGSCOPE_VIEW_TOKEN",
            help=f"that every request must carry, {SHORTEST_TOKEN} letters and digits or more, or "
            f"{RANDOM_TOKEN!r}; a random one where --host is not this machine",
            show_default=False,
            show_envvar=False,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", "-j", min=1, help="processes that read slides")
    ] = READERS,
    cache_mib: Annotated[
        int, typer.Option("--cache-mib", min=1, help="MiB of pictures to keep in memory")
    ] = CACHE_MIB,
    annotations: Annotated[
        Path | None,
        typer.Option(
            "--annotations",
            help="what was drawn, <slide_id>.geojson each, to show",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Serve the review page from the original slides, to this machine only; Ctrl-C ends it."""
    opened = open_view(
        ViewRequest(
            study=study,
            run=run,
            host=host,
            port=port,
            token=token,
            workers=workers,
            cache_mib=cache_mib,
            annotations=annotations,
        )
    )
    if as_json:
        console.print_json("viewing", {"url": opened.url, "runs": [*opened.runs]})
    else:
        typer.echo(f"{', '.join(opened.runs)}: {opened.url}")
        typer.echo("Ctrl-C ends the viewer")
    serve(opened)
