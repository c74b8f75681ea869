"""`bagscope evaluate`: a finished run → numbers for programs, a report for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagscope.cli import console, options

if TYPE_CHECKING:
    from bagscope.pipeline.evaluate import EvaluateResult


def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a training run", show_default=False)],
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by", help="subgroups by a column of the cohort table; repeat", show_default=False
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            help="folder or URL of the run's features, for the baselines; the study's if not set",
            show_default=False,
        ),
    ] = None,
    resamples: Annotated[
        int, typer.Option("--resamples", min=100, help="of each bootstrap")
    ] = 10_000,
    as_json: options.AsJson = False,
) -> None:
    """Say what a run can claim: metrics with intervals, baselines, figures, a report."""
    from bagscope.pipeline.evaluate import EvaluateRequest, evaluate_run

    found = evaluate_run(
        EvaluateRequest(run=run, by=tuple(by or ()), features=features, resamples=resamples)
    )
    print_evaluation(found, as_json=as_json)


def print_evaluation(found: EvaluateResult, *, as_json: bool) -> None:
    """Print what a run can claim, and where the report lies."""
    if as_json:
        console.print_json("evaluated", found.result.to_json())
        return
    for own in found.claims.values():
        for claim in own:
            mark = {"warning": "caution: ", "good": "good: "}.get(claim.tone, "")
            typer.echo(f"{'' if claim.tone == 'finding' else '  '}{mark}{claim.text}")
    typer.echo(f"report: {found.report}")
    typer.echo(f"numbers: {found.metrics}")
