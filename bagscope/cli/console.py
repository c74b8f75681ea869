"""How a run looks: a live bar in a terminal, plain lines in a log, JSON lines for programs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bagscope.artifacts import Json, canonical_json
from bagscope.cohort.progress import (
    Event,
    Progress,
    Reporter,
    RunFinished,
    RunStarted,
    RunWaiting,
    SlideFinished,
    SlideTold,
)
from bagscope.wording import counted

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from bagscope.cohort.jobs import RunReport
    from bagscope.pipeline.extract import ExtractResult
    from bagscope.pipeline.train import PlannedRun, TrainResult
    from bagscope.pipeline.tune import TuneResult, TuneTask

MAX_FAILURES_SHOWN = 20


def reporter(*, as_json: bool) -> Reporter:
    """Return the reporter that suits the output."""
    if as_json:
        return JsonReporter()
    return TerminalReporter() if sys.stderr.isatty() else PlainReporter()


class JsonReporter:
    """One JSON object per event on standard output."""

    def emit(self, event: Event) -> None:
        """Print the event."""
        words = [c if c.islower() else f"_{c.lower()}" for c in type(event).__name__]
        typer.echo(canonical_json({"event": "".join(words)[1:], **asdict(event)}))


def print_json(event: str, fields: Mapping[str, Json]) -> None:
    """Print one more JSON object beside those of the run."""
    typer.echo(canonical_json({"event": event, **fields}))


class PlainReporter:
    """One line per slide on standard error, for logs."""

    def emit(self, event: Event) -> None:
        """Print a line where there is something to say."""
        if isinstance(event, RunStarted):
            shard = f", shard {event.shard[0]}/{event.shard[1]}" if event.shard else ""
            typer.echo(
                f"{event.stage}: {counted(event.total, event.noun)}, "
                f"{counted(event.workers, 'worker')}{shard}",
                err=True,
            )
        elif isinstance(event, SlideTold):
            typer.echo(f"{event.slide_id}: {event.text}", err=True)
        elif isinstance(event, SlideFinished):
            typer.echo(slide_line(event), err=True)
        elif isinstance(event, RunWaiting):
            typer.echo(waiting_line(event), err=True)


class TerminalReporter:
    """A bar with rate and time left; failures and warnings scroll past above it."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def emit(self, event: Event) -> None:
        """Move the bar."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, SlideFinished):
            self._advance(event)
        elif isinstance(event, SlideTold) and self._bar and self._task is not None:
            self._bar.update(self._task, rate=f"{event.slide_id}: {event.text}")
        elif isinstance(event, RunWaiting) and self._bar:
            self._bar.console.print(waiting_line(event))
        elif isinstance(event, RunFinished) and self._bar:
            self._bar.stop()

    def _start(self, event: RunStarted) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(event.stage, total=event.total, rate="")
        self._bar.start()

    def _advance(self, event: SlideFinished) -> None:
        if self._bar is None or self._task is None:
            return
        if event.outcome == "failed" or event.warnings:
            self._bar.console.print(slide_line(event), markup=False, highlight=False)
        self._bar.update(
            self._task, completed=event.progress.finished, rate=rate_text(event.progress)
        )


def slide_line(event: SlideFinished) -> str:
    """Return one line about a finished slide."""
    progress = event.progress
    line = f"[{progress.finished}/{progress.total}] {event.slide_id}: {event.outcome}"
    if event.outcome == "failed":
        return f"{line} ({event.error_class}): {event.message}"
    if "tiles" in event.facts:
        line += f", {counted(event.facts['tiles'], 'tile')}"
    line += f", {event.seconds:.1f} s"
    if progress.left_s:
        line += f", {duration_text(progress.left_s)} left"
    return "\n".join([line, *(f"  warning: {warning}" for warning in event.warnings)])


def waiting_line(event: RunWaiting) -> str:
    """Return one line about what other processes work on."""
    return f"waiting for {counted(len(event.slide_ids), 'slide')} worked on elsewhere"


def rate_text(progress: Progress) -> str:
    """Return rate, failures and time left, as far as they are known."""
    parts = []
    if progress.tiles_per_s:
        parts.append(f"{progress.tiles_per_s:,.0f} tiles/s")
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    if progress.left_s is not None:
        parts.append(f"{duration_text(progress.left_s)} left")
    return ", ".join(parts)


def from_here(path: Path) -> Path:
    """Return a path as it is named from the working directory, where it lies below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def duration_text(seconds: float) -> str:
    """Return a duration as people say it: 42 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def print_report(report: RunReport, *, as_json: bool) -> None:
    """Print how a run ended, each failure with its reason, and how to go on."""
    if as_json:
        return
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report.counts.items() if count)
    if report.elsewhere:
        counts += f", {report.elsewhere} worked on elsewhere"
    typer.echo(
        f"{report.stage}: {counts or 'nothing to do'}; {counted(report.tiles, 'tile')} "
        f"in {duration_text(report.seconds)}"
    )
    for failure in report.failures[:MAX_FAILURES_SHOWN]:
        typer.echo(f"  failed  {failure.slide_id}  {failure.error_class}: {failure.message}")
    if len(report.failures) > MAX_FAILURES_SHOWN:
        typer.echo(f"  and {len(report.failures) - MAX_FAILURES_SHOWN} more, see the status folder")
    if report.interrupted:
        again = shlex.join(["bagscope", *sys.argv[1:]])
        typer.echo(
            f"interrupted with {counted(report.remaining, 'slide')} to go; go on with: {again}"
        )


def print_extraction(result: ExtractResult, *, as_json: bool) -> None:
    """Print how an extraction ended, and what it was bound by."""
    print_report(result.report, as_json=as_json)
    timing = result.timing
    if as_json:
        if timing is not None:
            print_json("timing", {**timing.seconds(), "sentence": timing.sentence})
        return
    for note in result.notes:
        typer.echo(f"  note: {note}")
    if timing is not None and timing.tiles:
        typer.echo("seconds waiting for")
        for name, seconds in timing.seconds().items():
            typer.echo(f"  {name:<10} {seconds:8.1f}  {seconds / timing.total_s:4.0%}")
        typer.echo(timing.sentence)


def print_training(
    result: TrainResult, *, features: str | None = None, as_json: bool = False
) -> None:
    """Print how a training run ended, and what to do with it.

    Where features were said to be somewhere, evaluation is to be told too.
    """
    if as_json:
        facts = {"run": str(result.folder), "complete": result.is_complete}
        print_json("trained", {**facts, "notes": list(result.notes)})
        return
    for note in result.notes:
        typer.echo(f"  note: {note}")
    print_report(result.trained, as_json=as_json)
    if result.tested is None:
        return
    if result.tested.exit_code:
        print_report(result.tested, as_json=as_json)
    elif result.is_complete:
        for report in (result.scored, result.final):
            if report is not None and report.exit_code:
                print_report(report, as_json=as_json)
        typer.echo(f"test predictions: {result.folder / 'predictions.csv'}")
        if result.bundle is not None:
            typer.echo(f"models: {result.bundle}")
        again = f" --features {features}" if features else ""
        typer.echo(f"next: bagscope evaluate {result.folder}{again}")


def print_tuning(result: TuneResult, *, features: str | None = None, as_json: bool = False) -> None:
    """Print what was chosen for each fold, and how training with it ended."""
    if as_json:
        print_json("tuned", {"chosen": {name: dict(v) for name, v in result.chosen.items()}})
        return
    print_report(result.tuned, as_json=as_json)
    for split, options in result.chosen.items():
        typer.echo(f"  {split}: {canonical_json(options).decode()}")
    if result.trained is not None:
        print_training(result.trained, features=features, as_json=as_json)


def print_tuning_plan(planned: PlannedRun, tasks: Mapping[str, TuneTask], *, as_json: bool) -> None:
    """Print what would be searched, on which cases."""
    first = next(iter(tasks.values()))
    if as_json:
        space = {name: where.model_dump(mode="json") for name, where in first.space.items()}
        print_json("plan", {**planned.config, "space": space, "trials": first.trials})
        return
    for note in planned.notes:
        typer.echo(f"  note: {note}")
    typer.echo(
        f"{planned.folder}: {counted(first.trials, 'trial')} on {first.inner_folds} inner folds "
        f"for each of {counted(len(tasks), 'fold')}, over {', '.join(first.space)}"
    )
    for task in tasks.values():
        typer.echo(f"  {task.split}: {counted(len(task.cases), 'case')} to choose by")
