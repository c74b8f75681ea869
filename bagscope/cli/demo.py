"""`bagscope demo`: synthetic slides through the line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bagscope.cli import console, options
from bagscope.cli.evaluate import print_evaluation
from bagscope.errors import ConfigError
from bagscope.pipeline.demo import STAGES, run_demo


def demo(
    folder: Annotated[Path, typer.Argument(help="where to", show_default=True)] = Path("demo"),
    until: Annotated[str, typer.Option(help=f"last stage: {', '.join(STAGES)}")] = STAGES[-1],
    slides: Annotated[int, typer.Option(min=2, help="how many slides")] = 12,
    size_px: Annotated[int, typer.Option(min=1024, help="edge of a slide in pixels")] = 6000,
    seed: Annotated[int, typer.Option(min=0, help="of the slides")] = 0,
    workers: options.Workers = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a small synthetic cohort and run it through the line."""
    if until not in STAGES:
        raise ConfigError(f"--until is {until!r}; choose one of {', '.join(STAGES)}")
    result = run_demo(
        folder,
        console.reporter(as_json=as_json),
        slides=slides,
        size_px=size_px,
        seed=seed,
        workers=workers,
        until=until,
    )
    console.print_report(result.tiled, as_json=as_json)
    if result.extracted is not None:
        console.print_extraction(result.extracted, as_json=as_json)
    if result.trained is not None:
        console.print_training(result.trained, as_json=as_json)
    if result.evaluated is not None:
        print_evaluation(result.evaluated, as_json=as_json)
    if result.drawn is not None:
        console.print_report(result.drawn, as_json=as_json)
    if not as_json:
        for page in result.pages:
            typer.echo(f"look at {page}")
    raise typer.Exit(result.exit_code)
