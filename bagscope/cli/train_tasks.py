"""`bagscope train --tasks`: tasks learnt one after the other, and what is left of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bagscope.cli import console
from bagscope.errors import ConfigError
from bagscope.pipeline.continual import (
    RESULT_NAME,
    TABLE_NAME,
    ContinualResult,
    PlannedSequences,
    continual_run,
    plan_continual,
)

if TYPE_CHECKING:
    from bagscope.pipeline.study import Study
    from bagscope.pipeline.train import TrainRequest


def train_tasks(
    study: Study,
    request: TrainRequest,
    tasks: Path,
    annotations: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train sequences of tasks, or say what would be trained; ends the command."""
    if dry_run:
        _print_plan(plan_continual(study, request, tasks, annotations, dry_run=True), as_json)
        return
    report = console.reporter(as_json=as_json)
    result = continual_run(study, request, tasks, annotations, report)
    _print_result(result, as_json)
    raise typer.Exit(result.exit_code)


def refuse_beside_tasks(options: Mapping[str, object]) -> None:
    """Refuse what means nothing to tasks in sequence.

    Raises:
        ConfigError: names it.
    """
    if given := [name for name, value in options.items() if value]:
        raise ConfigError(
            f"--tasks names columns, classes and order in its file, and has members and tables of "
            f"its own, so {', '.join(given)} mean{'s' * (len(given) == 1)} nothing beside it; "
            "leave one of the two out"
        )


def _print_plan(planned: PlannedSequences, as_json: bool) -> None:
    counts = {
        name: {
            one.name: [len(one.train), len(one.inner), len(cases)]
            for one, cases in zip(task.tasks, planned.tests[name].cases, strict=True)
        }
        for name, task in planned.sequences.items()
    }
    if as_json:
        console.print_json("plan", {"sequences": counts})
        return
    for note in planned.notes:
        typer.echo(f"  note: {note}")
    ways = ", ".join(planned.spec.ways)
    typer.echo(f"{planned.folder}: {len(counts)} sequences, each by {ways}")
    for name, tasks in counts.items():
        for task, (train, inner, test) in tasks.items():
            typer.echo(
                f"  {name} {task}: {train} to learn from, {inner} to choose by, {test} to test on"
            )


def _print_result(result: ContinualResult, as_json: bool) -> None:
    if as_json:
        console.print_json(
            "tasks",
            {
                "folder": str(result.folder),
                "ways": (result.found or {}).get("ways"),
                "bundles": {name: str(path) for name, path in result.bundles.items()},
            },
        )
        return
    for note in result.notes:
        typer.echo(f"  note: {note}")
    console.print_report(result.trained, as_json=as_json)
    if result.tested is not None and result.tested.exit_code:
        console.print_report(result.tested, as_json=as_json)
    if result.found is not None:
        typer.echo((result.folder / TABLE_NAME).read_text(encoding="utf-8"))
        typer.echo(f"written: {result.folder / TABLE_NAME}, {result.folder / RESULT_NAME}")
        names = ", ".join(path.name for path in result.bundles.values())
        typer.echo(f"what is left of each task, for bagscope predict {result.folder}/: {names}")
