"""`bagscope run`: the whole line from study.yaml."""

from __future__ import annotations

from typing import Annotated

import typer

from bagscope.cli import console, options
from bagscope.cli.evaluate import evaluate
from bagscope.cohort.jobs import parse_shard
from bagscope.cohort.progress import Reporter
from bagscope.pipeline.extract import ExtractOptions, extract_cohort
from bagscope.pipeline.study import Study, open_study
from bagscope.pipeline.tile import tile_cohort
from bagscope.pipeline.train import train_run


def run(
    study: options.Study,
    workers: options.Workers = None,
    shard: options.Shard = None,
    dask: options.Dask = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="print a Slurm array script in place of running")
    ] = False,
    shards: Annotated[
        int, typer.Option(min=1, help="array size of the Slurm script", show_default=True)
    ] = 8,
    slurm_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="further sbatch option, such as partition=cpu"),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Run every stage that study.yaml describes; resumes where it stopped."""
    opened = open_study(study, {"run": {"workers": workers}})
    if slurm:
        from bagscope.cohort.slurm import SlurmSpec, sbatch_script

        spec = SlurmSpec(
            shards=shards,
            cpus=opened.spec.run.worker_count,
            memory_mib=round(opened.spec.run.memory_limit_gib * 1024),
            options=_pairs(slurm_option or []),
        )
        command = ["bagscope", "run", str(study), *(["--overwrite"] if overwrite else [])]
        typer.echo(sbatch_script(command, spec), nl=False)
        return
    part = parse_shard(shard) if shard else None
    executor = dask or "local"
    listener = console.reporter(as_json=as_json)
    tiled = tile_cohort(opened, listener, overwrite=overwrite, shard=part, executor=executor)
    console.print_report(tiled, as_json=as_json)
    if tiled.interrupted:
        raise typer.Exit(tiled.exit_code)
    # A slide that could not be tiled fails here too; the others go on.
    extracted = extract_cohort(
        opened, listener, ExtractOptions(overwrite=overwrite, shard=part, executor=executor)
    )
    console.print_extraction(extracted, as_json=as_json)
    if code := extracted.report.exit_code or tiled.exit_code:
        if opened.spec.targets and not extracted.report.interrupted:
            typer.echo(
                "not trained: some slides have no features; correct them and run again, or leave "
                f"them out with: bagscope train {study} --skip-missing",
                err=True,
            )
        raise typer.Exit(code)
    if part is None:
        raise typer.Exit(_train(opened, listener, overwrite=overwrite, as_json=as_json))
    if opened.spec.targets:
        typer.echo(f"when all parts are done, go on with: bagscope train {study}", err=True)


def _train(study: Study, listener: Reporter, *, overwrite: bool, as_json: bool) -> int:
    """Train and evaluate what the study asks for; return the exit code."""
    from bagscope.pipeline.line import training_requests

    for request in training_requests(study, overwrite=overwrite):
        trained = train_run(study, request, listener)
        console.print_training(trained, as_json=as_json)
        if trained.exit_code:
            return trained.exit_code
        if trained.is_complete:
            evaluate(trained.folder, as_json=as_json)
    return 0


def _pairs(given: list[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, _, value = text.partition("=")
        pairs[name.lstrip("-")] = value
    return pairs
