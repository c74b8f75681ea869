"""`bagscope predict`: a model and slides or features → predictions, with what they stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bagscope.cli import console, options
from bagscope.cohort.jobs import parse_shard
from bagscope.pipeline.predict import (
    PlannedPrediction,
    PredictRequest,
    PredictResult,
    plan_prediction,
)
from bagscope.pipeline.predict import predict as predict_cohort
from bagscope.wording import counted

MAX_FLAGGED_SHOWN = 10


def predict(
    model: Annotated[
        Path, typer.Argument(help="a model.bagscope folder, or a run", show_default=False)
    ],
    place: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY|FOLDER", help="a study, or a folder of features", show_default=False
        ),
    ],
    slides: options.Slides = None,
    labels: options.Labels = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features", help="folder or URL; the study's own if not set", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="folder for the output (default: STUDY/predictions/RUN/NAME)",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str,
        typer.Option("--name", help="of the cohort; the folder's if not set", show_default=False),
    ] = "",
    members: Annotated[
        Literal["ensemble", "final", "all"] | None,
        typer.Option(
            "--members", help="who answers; as the bundle says if not set", show_default=False
        ),
    ] = None,
    assume: Annotated[
        str | None,
        typer.Option(
            "--assume",
            metavar="ENCODER",
            help="vouch that features of unknown origin are of the model's encoder",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="write each case's embedding too")
    ] = False,
    ignore_labels: Annotated[
        bool, typer.Option("--ignore-labels", help="predict without looking for labels")
    ] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="leave slides without features out")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    workers: options.Workers = None,
    shard: options.Shard = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Ask a model about every slide or patient; tiles and extracts first where needed; resumes."""
    request = PredictRequest(
        model=model,
        place=place,
        slides=slides,
        labels=labels,
        features=features,
        out=out,
        name=name,
        members=members,
        assume=assume,
        embeddings=embeddings,
        ignore_labels=ignore_labels,
        skip_missing=skip_missing,
        device=device,
        workers=workers,
        overwrite=overwrite,
        shard=parse_shard(shard) if shard else None,
    )
    if dry_run:
        _print_plan(plan_prediction(request, write=False), as_json=as_json)
        return
    result = predict_cohort(request, console.reporter(as_json=as_json))
    _print_result(result, as_json=as_json)
    raise typer.Exit(result.exit_code)


def _print_plan(planned: PlannedPrediction, *, as_json: bool) -> None:
    bundle, place = planned.bundle, planned.place
    members = [one.name for one in planned.chosen]
    facts = {
        "run": bundle.run,
        "members": members,
        "cases": len(planned.cases),
        "features": place.location,
        "out": str(place.folder),
    }
    if as_json:
        console.print_json("plan", facts)
        return
    for note in planned.notes:
        typer.echo(f"  note: {note}")
    typer.echo(f"{bundle.run}: {', '.join(members)}")
    where = place.location or f"made of the slides first, with {bundle.origin.name}"
    typer.echo(f"{counted(len(planned.cases), 'case')}; features: {where}")
    typer.echo(f"to {place.folder}")


def _print_result(result: PredictResult, *, as_json: bool) -> None:
    if as_json:
        facts = {"cases": result.cases, "flagged": list(result.flagged)}
        table = None if result.table is None else str(result.table)
        console.print_json("predicted", {**facts, "table": table, "notes": list(result.notes)})
        return
    for note in result.notes:
        typer.echo(f"  note: {note}")
    for report in (*result.made, result.report):
        console.print_report(report, as_json=as_json)
    if result.flagged:
        shown = ", ".join(result.flagged[:MAX_FLAGGED_SHOWN])
        more = len(result.flagged) - MAX_FLAGGED_SHOWN
        typer.echo(
            f"unlike the training slides: {shown}{f' and {more} more' if more > 0 else ''} "
            f"({len(result.flagged)} of {result.cases}); look at them before trusting these rows"
        )
    if result.table is not None:
        typer.echo(f"predictions: {result.table}")
