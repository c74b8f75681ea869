"""`bagscope train`: features and labels → models, each tested on patients that it never saw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bagscope.cli import console, options, target_options, train_options
from bagscope.cli.target_options import targets_of
from bagscope.cli.train_tasks import refuse_beside_tasks, train_tasks
from bagscope.cohort.jobs import parse_shard
from bagscope.errors import ConfigError
from bagscope.mil.training.tracking import TrackerName
from bagscope.pipeline.overfit import Overfit, overfit_study
from bagscope.pipeline.recipes import laid_over, parse_settings
from bagscope.pipeline.study import open_study
from bagscope.pipeline.train import PlannedRun, TrainRequest, plan_training, train_run
from bagscope.wording import counted


def train(
    study: options.Study,
    recipe: train_options.Recipe = None,
    target: target_options.Target = None,
    task: target_options.TaskName = None,
    classes: target_options.Classes = None,
    positive: target_options.Positive = None,
    time: target_options.Time = None,
    event: target_options.Event = None,
    set_: train_options.Settings = None,
    split: train_options.Split = "default",
    seeds: train_options.Seeds = None,
    name: Annotated[
        str, typer.Option("--name", help="of the run; the recipe's if not set", show_default=False)
    ] = "",
    features: train_options.Features = None,
    encoder: train_options.Encoder = None,
    skip_missing: train_options.SkipMissing = False,
    final: Annotated[
        bool, typer.Option("--final", help="train a model on all patients too, after the folds")
    ] = False,
    overfit: Annotated[
        int | None,
        typer.Option(
            "--overfit",
            metavar="N",
            help="sanity run: learn N cases by heart, and leave no run",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(
            "--tasks",
            metavar="FILE",
            help="YAML of tasks, which are learnt one after the other",
            show_default=False,
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            "--annotations",
            metavar="FOLDER",
            help="with --tasks: GeoJSON per slide, to judge where the models look",
            show_default=False,
        ),
    ] = None,
    track: Annotated[
        TrackerName | None,
        typer.Option("--track", help="write the epochs for this tracker too", show_default=False),
    ] = None,
    device: train_options.Device = "cpu",
    workers: options.Workers = None,
    shard: options.Shard = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a model per fold and seed, and test each on its fold; resumes at the epoch."""
    if overfit is not None:
        _refuse_beside_overfit(
            {
                "--dry-run": dry_run,
                "--final": final,
                "--name": name,
                "--overwrite": overwrite,
                "--seeds with several": len(seeds_of(seeds)) > 1,
                "--shard": shard,
                "--split": split != "default",
                "--track": track,
            }
        )
    if tasks is not None:
        refuse_beside_tasks(
            {
                "--target": target or task or classes or positive or time or event,
                "--final": final,
                "--overfit": overfit is not None,
                "--shard": shard,
                "--track": track,
            }
        )
    elif annotations is not None:
        raise ConfigError("--annotations belongs to --tasks; see bagscope explain for one model")
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
        seeds=seeds_of(seeds) or plan.seeds,
        skip_missing=skip_missing,
        device=device,
        overwrite=overwrite,
        shard=parse_shard(shard) if shard else None,
        final=final,
        track=track,
    )
    if tasks is not None:
        train_tasks(opened, request, tasks, annotations, dry_run=dry_run, as_json=as_json)
        return
    if overfit is not None:
        _print_overfit(
            overfit_study(opened, request, overfit, console.reporter(as_json=as_json)),
            as_json=as_json,
        )
        return
    if dry_run:
        _print_plan(plan_training(opened, request, dry_run=True), as_json=as_json)
        return
    result = train_run(opened, request, console.reporter(as_json=as_json))
    console.print_training(result, features=features, as_json=as_json)
    raise typer.Exit(result.exit_code)


def seeds_of(text: str | None) -> tuple[int, ...]:
    """Return the seeds of `--seeds 0,1,2`; none where it is not given."""
    if not text:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r}: write whole numbers separated by commas")
    return tuple(map(int, parts))


def _refuse_beside_overfit(options: Mapping[str, object]) -> None:
    """Refuse what means nothing to a sanity run, which trains one model and leaves none."""
    if given := [name for name, value in options.items() if value]:
        raise ConfigError(
            f"--overfit trains one model on a few cases and leaves no run, so {', '.join(given)} "
            f"mean{'s' * (len(given) == 1)} nothing beside it; leave one of the two out"
        )


def _print_overfit(found: Overfit, *, as_json: bool) -> None:
    if as_json:
        facts = {name: _json_number(value) for name, value in asdict(found).items()}
        console.print_json("overfit", facts)
        raise typer.Exit(int(not found.fits))
    seen = f"{counted(len(found.cases), 'case')}, {counted(found.epochs, 'epoch')}"
    typer.echo(f"{seen}: {', '.join(found.cases)}")
    right = "" if math.isnan(found.accuracy) else f", {found.accuracy:.0%} right"
    typer.echo(
        f"loss {found.first_loss:.3g} → {found.loss:.3g}{right}, "
        f"{found.metric_name} {found.metric:.3f}"
    )
    typer.echo("fits: the recipe can learn these" if found.fits else "does not fit; look at this:")
    for hint in found.hints:
        typer.echo(f"  {hint}")
    raise typer.Exit(int(not found.fits))


def _json_number(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_plan(planned: PlannedRun, *, as_json: bool) -> None:
    if as_json:
        console.print_json("plan", planned.config)
        return
    for note in planned.notes:
        typer.echo(f"  note: {note}")
    typer.echo(f"{planned.folder}: {counted(len(planned.members), 'member')}")
    for name, task in planned.members.items():
        test = planned.tests[name]
        typer.echo(
            f"  {name}: {len(task.train)} to learn from, {len(task.inner)} to choose by, "
            f"{len(test.cases)} to test on"
        )
