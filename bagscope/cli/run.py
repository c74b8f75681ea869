"""`bagscope run`: the whole line from study.yaml."""

from __future__ import annotations

from typing import Annotated

import typer

from bagscope.cli import console, options
from bagscope.cohort.jobs import parse_shard
from bagscope.pipeline.extract import ExtractOptions, extract_cohort
from bagscope.pipeline.study import open_study
from bagscope.pipeline.tile import tile_cohort


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
    raise typer.Exit(extracted.report.exit_code or tiled.exit_code)


def _pairs(given: list[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, _, value = text.partition("=")
        pairs[name.lstrip("-")] = value
    return pairs
