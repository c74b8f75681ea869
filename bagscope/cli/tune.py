"""`bagscope tune`: options of a recipe, chosen inside every fold, then trained and tested."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bagscope.cli import console, options, target_options, train_options
from bagscope.cli.target_options import targets_of
from bagscope.cli.train import seeds_of
from bagscope.pipeline.recipes import laid_over, parse_settings
from bagscope.pipeline.study import open_study
from bagscope.pipeline.train import TrainRequest
from bagscope.pipeline.tune import INNER_FOLDS, TRIALS, TuneRequest, plan_tuning, tune_run


def tune(
    study: options.Study,
    recipe: train_options.Recipe = None,
    space: Annotated[
        Path | None,
        typer.Option(
            "--space",
            help="YAML file of options and ranges; learning rate, weight decay, dropout and hidden "
            "width if not set",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="per fold")] = TRIALS,
    inner_folds: Annotated[
        int, typer.Option("--inner-folds", min=2, help="that each trial is scored on")
    ] = INNER_FOLDS,
    seed: Annotated[int, typer.Option("--seed", help="of the search")] = 0,
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
        str,
        typer.Option("--name", help="of the run; <recipe>_tuned if not set", show_default=False),
    ] = "",
    features: train_options.Features = None,
    encoder: train_options.Encoder = None,
    skip_missing: train_options.SkipMissing = False,
    device: train_options.Device = "cpu",
    workers: options.Workers = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Choose options inside every fold, then train and test with them; resumes at the trial."""
    opened = open_study(study, {"run": {"workers": workers}})
    plan = opened.spec.train
    chosen = recipe or plan.recipe
    request = TuneRequest(
        train=TrainRequest(
            targets=targets_of(target, task, classes, positive, time, event) or opened.spec.targets,
            recipe=chosen,
            settings=laid_over(plan.options if recipe is None else {}, parse_settings(set_ or [])),
            split=split,
            name=name or f"{Path(chosen).stem}_tuned",
            features=features,
            encoder=encoder,
            seeds=seeds_of(seeds) or plan.seeds,
            skip_missing=skip_missing,
            device=device,
            overwrite=overwrite,
        ),
        space=space,
        trials=trials,
        inner_folds=inner_folds,
        seed=seed,
    )
    if dry_run:
        planned, tasks = plan_tuning(opened, request, dry_run=True)
        console.print_tuning_plan(planned, tasks, as_json=as_json)
        return
    result = tune_run(opened, request, console.reporter(as_json=as_json))
    console.print_tuning(result, features=features, as_json=as_json)
    raise typer.Exit(result.exit_code)
