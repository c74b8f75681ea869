"""`bagscope run`: the whole line from study.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagscope.cli import console, options
from bagscope.cohort.jobs import RunReport, parse_shard
from bagscope.errors import ConfigError
from bagscope.pipeline.extract import ExtractResult
from bagscope.pipeline.line import (
    SCAN_NAME,
    STAGES,
    LineRequest,
    StageDone,
    parse_stage,
    plan_line,
    work_through,
)
from bagscope.pipeline.scan import CohortScan
from bagscope.pipeline.study import STUDY_NAME, Study, open_study
from bagscope.pipeline.train import TrainResult
from bagscope.wording import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROBLEMS_SHOWN = 10


def run(
    study: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY", help="the study folder, or its study.yaml", show_default=False
        ),
    ],
    until: Annotated[
        str, typer.Option("--until", help=f"last stage: {', '.join(STAGES)}")
    ] = STAGES[-1],
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
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Do all that study.yaml describes, from slides to the review page; resumes."""
    opened = open_study(_folder_of(study), {"run": {"workers": workers}})
    request = LineRequest(
        until=parse_stage(until),
        overwrite=overwrite,
        shard=parse_shard(shard) if shard else None,
        executor=dask or "local",
    )
    if slurm:
        _print_slurm(opened, request, shards, slurm_option or [])
        return
    if dry_run:
        _print_plan(opened, request, as_json=as_json)
        return
    code, done = 0, []
    try:
        for stage in work_through(opened, request, console.reporter(as_json=as_json)):
            _print_stage(stage, opened, as_json=as_json)
            done.append(stage)
            code = max(code, stage.exit_code)
    finally:
        _print_closing(done, as_json=as_json)
    if not as_json and code <= 1:
        _print_next(opened, request, code)
    raise typer.Exit(code)


def _folder_of(place: Path) -> Path:
    if place.is_file() and place.name != STUDY_NAME:
        raise ConfigError(f"{place}: name a study folder, or the {STUDY_NAME} in it")
    return place.parent if place.is_file() else place


def _print_stage(done: StageDone, study: Study, *, as_json: bool) -> None:
    result = done.result
    if isinstance(result, CohortScan):
        _print_scan(result, study, as_json=as_json)
    elif isinstance(result, RunReport):
        console.print_report(result, as_json=as_json)
    elif isinstance(result, ExtractResult):
        console.print_extraction(result, as_json=as_json)
    elif isinstance(result, TrainResult):
        console.print_training(result, as_json=as_json)
    else:
        from bagscope.cli.evaluate import print_evaluation
        from bagscope.pipeline.evaluate import EvaluateResult

        if isinstance(result, EvaluateResult):
            print_evaluation(result, as_json=as_json)
        else:
            console.print_report(result.report, as_json=as_json)


def _print_scan(found: CohortScan, study: Study, *, as_json: bool) -> None:
    totals = found.totals()
    if as_json:
        console.print_json("scanned", totals)
        return
    typer.echo(
        f"scan: {counted(totals['slides'], 'slide')}, {totals['problems']} with a problem; "
        f"{counted(totals['tiles'], 'tile')}; reading about "
        f"{console.duration_text(totals['read_hours'] * 3600)} on one core; "
        f"all of it: {study.folder / SCAN_NAME}"
    )
    problems = [row for row in found.rows if row["problem"]]
    for row in problems[:_PROBLEMS_SHOWN]:
        typer.echo(f"  problem: {row['slide_id']}: {row['problem']}")
    if len(problems) > _PROBLEMS_SHOWN:
        typer.echo(f"  and {len(problems) - _PROBLEMS_SHOWN} more")


def _print_closing(done: Sequence[StageDone], *, as_json: bool) -> None:
    """Name what to open, also where a later stage was refused."""
    pages = [(stage.stage, stage.page) for stage in done if stage.page is not None]
    if as_json:
        console.print_json("pages", {stage: str(page) for stage, page in pages})
        return
    if pages:
        typer.echo("open:")
        for stage, page in reversed(pages):
            typer.echo(f"  {stage:<9} {console.from_here(page)}")


def _print_next(study: Study, request: LineRequest, code: int) -> None:
    """Say what is left to do."""
    if code:
        typer.echo("the line went on without what failed; correct it, and run again", err=True)
    if request.shard is not None and study.spec.targets:
        typer.echo(f"when all parts are done, go on with: bagscope run {study.folder}", err=True)
    elif not study.spec.targets and "train" in request.stages:
        typer.echo(
            f"no model was trained: {study.folder / STUDY_NAME} names no targets, the columns of "
            f"{study.cohort_path.name} to predict",
            err=True,
        )


def _print_plan(study: Study, request: LineRequest, *, as_json: bool) -> None:
    for planned in plan_line(study, request):
        if as_json:
            fields = {"stage": planned.stage, "what": planned.what, "place": str(planned.place)}
            console.print_json("plan", fields)
        else:
            typer.echo(f"{planned.stage:<9} {planned.what} → {planned.place}")


def _print_slurm(study: Study, request: LineRequest, shards: int, further: Sequence[str]) -> None:
    from bagscope.cohort.slurm import SlurmSpec, sbatch_script

    spec = SlurmSpec(
        shards=shards,
        cpus=study.spec.run.worker_count,
        memory_mib=round(study.spec.run.memory_limit_gib * 1024),
        options=_pairs(further),
    )
    command = ["bagscope", "run", str(study.folder)]
    if request.until != STAGES[-1]:
        command += ["--until", request.until]
    typer.echo(
        sbatch_script([*command, *(["--overwrite"] if request.overwrite else [])], spec), nl=False
    )


def _pairs(given: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, _, value = text.partition("=")
        pairs[name.lstrip("-")] = value
    return pairs
