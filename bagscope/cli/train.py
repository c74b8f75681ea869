"""`bagscope train`: features and labels → models, each tested on patients that it never saw."""

from __future__ import annotations

from typing import Annotated

import typer

from bagscope.cli import console, options, target_options
from bagscope.cli.target_options import targets_of
from bagscope.cohort.jobs import parse_shard
from bagscope.pipeline.recipes import laid_over, parse_settings
from bagscope.pipeline.study import open_study
from bagscope.pipeline.train import PlannedRun, TrainRequest, plan_training, train_run


def train(
    study: options.Study,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="name of a recipe, or a YAML file", show_default=False),
    ] = None,
    target: target_options.Target = None,
    task: target_options.TaskName = None,
    classes: target_options.Classes = None,
    positive: target_options.Positive = None,
    time: target_options.Time = None,
    event: target_options.Event = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="BLOCK.OPTION=VALUE", help="over the recipe", show_default=False
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="name of the splits; made where they are missing")
    ] = "default",
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", help="one model per fold and seed: 0,1,2", show_default=False),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="of the run; the recipe's if not set", show_default=False)
    ] = "",
    features: Annotated[
        str | None,
        typer.Option(
            "--features", help="folder or URL; the study's own if not set", show_default=False
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", "-e", help="where there are several", show_default=False),
    ] = None,
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
    """Train a model per fold and seed, and test each on its fold; resumes at the epoch."""
    opened = open_study(study, {"run": {"workers": workers}})
    plan = opened.spec.train
    settings = laid_over(plan.options if recipe is None else {}, parse_settings(set_ or []))
    request = TrainRequest(
        targets=targets_of(target, task, classes, positive, time, event) or opened.spec.targets,
        recipe=recipe or plan.recipe,
        settings=settings,
        split=split,
        name=name,
        features=features,
        encoder=encoder,
        seeds=_seeds(seeds) or plan.seeds,
        skip_missing=skip_missing,
        device=device,
        overwrite=overwrite,
        shard=parse_shard(shard) if shard else None,
    )
    if dry_run:
        _print_plan(plan_training(opened, request), as_json=as_json)
        return
    result = train_run(opened, request, console.reporter(as_json=as_json))
    console.print_training(result, as_json=as_json)
    raise typer.Exit(result.exit_code)


def _seeds(text: str | None) -> tuple[int, ...]:
    if not text:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r}: write whole numbers separated by commas")
    return tuple(map(int, parts))


def _print_plan(planned: PlannedRun, *, as_json: bool) -> None:
    if as_json:
        console.print_json("plan", planned.config)
        return
    for note in planned.notes:
        typer.echo(f"  note: {note}")
    typer.echo(f"{planned.folder}: {len(planned.members)} members")
    for name, task in planned.members.items():
        test = planned.tests[name]
        typer.echo(
            f"  {name}: {len(task.train)} to learn from, {len(task.inner)} to choose by, "
            f"{len(test.cases)} to test on"
        )
