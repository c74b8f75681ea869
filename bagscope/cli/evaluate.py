"""`bagscope evaluate`: a run, or a model on another cohort → numbers, and a report for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagscope.cli import console, options
from bagscope.errors import ConfigError

if TYPE_CHECKING:
    from bagscope.pipeline.evaluate import EvaluateResult


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="folder of a training run", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="external validation: a model.bagscope folder, or a run that has one",
            show_default=False,
        ),
    ] = None,
    cohort: Annotated[
        Path | None,
        typer.Option("--cohort", help="the other cohort's table of slides", show_default=False),
    ] = None,
    labels: options.Labels = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="of external validation: where it goes", show_default=False),
    ] = None,
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
            help="folder or URL of the run's or cohort's features; the study's if not set",
            show_default=False,
        ),
    ] = None,
    assume: Annotated[
        str | None,
        typer.Option(
            "--assume",
            metavar="ENCODER",
            help="vouch that an external cohort's features are of the model's encoder",
            show_default=False,
        ),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="leave slides without features out")
    ] = False,
    resamples: Annotated[
        int, typer.Option("--resamples", min=100, help="of each bootstrap")
    ] = 10_000,
    as_json: options.AsJson = False,
) -> None:
    """Say what a run, or a model on another cohort, can claim: numbers, rivals, a report."""
    if run is not None:
        external = (model, cohort, labels, out, assume)
        if any(value is not None for value in external) or skip_missing:
            raise ConfigError(
                "--model, --cohort, --labels, --out, --assume and --skip-missing belong to "
                "external validation, and a run is named; leave one of the two out"
            )
        from bagscope.pipeline.evaluate import EvaluateRequest, evaluate_run

        asked = EvaluateRequest(run=run, by=tuple(by or ()), features=features, resamples=resamples)
        print_evaluation(evaluate_run(asked), as_json=as_json)
        return
    if model is None or cohort is None or out is None:
        raise ConfigError("name a run, or --model, --cohort and --out for external validation")
    from bagscope.pipeline.evaluate_external import ExternalRequest, evaluate_external

    wanted = ExternalRequest(
        model=model,
        cohort=cohort,
        out=out,
        labels=labels,
        features=features,
        assume=assume,
        by=tuple(by or ()),
        skip_missing=skip_missing,
        resamples=resamples,
    )
    found = evaluate_external(wanted, console.reporter(as_json=as_json))
    print_evaluation(found, as_json=as_json)
    raise typer.Exit(1 if found.result.left_out and not skip_missing else 0)


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
