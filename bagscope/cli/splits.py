"""`bagscope splits`: divide a cohort by patient, and check that it stays divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagscope.artifacts import canonical_json
from bagscope.cli import options, target_options
from bagscope.cli.counter import StepCounter
from bagscope.mil.splits.plan import DEFAULT_NAME, SplitSpec
from bagscope.pipeline.study import open_study

if TYPE_CHECKING:
    from bagscope.pipeline.splits import MadeSplits, SideSummary

MAX_SPLITS_SHOWN = 12

splits = typer.Typer(
    help="Divide a cohort by patient into train, val and test; check that it stays divided.",
    no_args_is_help=True,
)


@splits.command()
def make(
    study: options.Study,
    target: target_options.Target = None,
    task: target_options.TaskName = None,
    classes: target_options.Classes = None,
    positive: target_options.Positive = None,
    time: target_options.Time = None,
    event: target_options.Event = None,
    per: target_options.Per = target_options.DEFAULT_PER,
    method: Annotated[str | None, options.of(SplitSpec, "method", "--method")] = None,
    folds: Annotated[int | None, options.of(SplitSpec, "folds", "--folds")] = None,
    repeats: Annotated[int | None, options.of(SplitSpec, "repeats", "--repeats")] = None,
    test_share: Annotated[float | None, options.of(SplitSpec, "test_share", "--test-share")] = None,
    val_share: Annotated[float | None, options.of(SplitSpec, "val_share", "--val-share")] = None,
    seed: Annotated[int | None, options.of(SplitSpec, "seed", "--seed")] = None,
    stratify: Annotated[
        bool | None, options.of(SplitSpec, "stratify", "--stratify/--no-stratify")
    ] = None,
    file: Annotated[str | None, options.of(SplitSpec, "file", "--from")] = None,
    name: Annotated[str, typer.Option("--name", help="of the splits")] = DEFAULT_NAME,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Put every labelled slide or patient on a side; writes STUDY/splits/NAME.csv."""
    opened = open_study(study)
    targets = target_options.targets_of(target, task, classes, positive, time, event)
    targets = targets or opened.spec.targets
    target_options.require_targets(targets)
    given = {
        "method": method,
        "folds": folds,
        "repeats": repeats,
        "test_share": test_share,
        "val_share": val_share,
        "seed": seed,
        "stratify": stratify,
        "file": file,
    }
    from bagscope.pipeline.splits import make_study_splits, split_spec

    made = make_study_splits(
        opened,
        targets,
        split_spec(opened, given),
        per=per,
        name=name,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    _print_made(made, dry_run=dry_run, as_json=as_json)


@splits.command()
def check(
    place: Annotated[
        Path,
        typer.Argument(metavar="STUDY|FILE", help="a study, or its splits", show_default=False),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help=f"of the study's splits (default: {DEFAULT_NAME})", show_default=False
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            "--features",
            help="a feature folder, in which to look for tissue scanned twice",
            show_default=False,
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Look for patients on two sides, missing classes, tissue scanned twice; exit 1 on any."""
    progress = StepCounter("splits", silent=as_json)
    from bagscope.pipeline.splits import check_study_splits

    path, found = check_study_splits(place, name, features=features, advance=progress.advance)
    for kind, sentences in (("note", found.notes), ("fault", found.faults)):
        for sentence in sentences:
            if as_json:
                typer.echo(canonical_json({"event": kind, "sentence": sentence}))
            else:
                typer.echo(f"{kind}: {sentence}")
    if as_json:
        totals = {"faults": len(found.faults), "notes": len(found.notes)}
        typer.echo(canonical_json({"event": "totals", "path": str(path), **totals}))
    else:
        typer.echo(f"{path}: {len(found.faults)} faults")
    raise typer.Exit(int(bool(found.faults)))


def _print_made(made: MadeSplits, *, dry_run: bool, as_json: bool) -> None:
    from bagscope.pipeline.splits import summarise_splits

    summaries = summarise_splits(made)
    if as_json:
        for summary in summaries:
            typer.echo(canonical_json({"event": "side", **asdict(summary)}))
        for note in made.plan.notes:
            typer.echo(canonical_json({"event": "note", "sentence": note}))
        totals = {"path": str(made.path), "splits": len(made.plan.splits), "written": made.written}
        typer.echo(canonical_json({"event": "totals", **totals}))
        return
    _print_table(summaries[: 3 * MAX_SPLITS_SHOWN])
    hidden = len(made.plan.splits) - MAX_SPLITS_SHOWN
    if hidden > 0:
        typer.echo(f"and {hidden} more splits; --json shows all")
    for note in made.plan.notes:
        typer.echo(f"note: {note}")
    done = "written" if made.written else "not written" if dry_run else "there already, the same"
    typer.echo(f"{made.path}: {len(made.plan.splits)} splits, {done}")


def _print_table(summaries: Sequence[SideSummary]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    has_site = any(summary.site for summary in summaries)
    has_median = any(summary.median is not None for summary in summaries)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("split", *(["site"] if has_site else []), "side"):
        table.add_column(column)
    labels = list(summaries[0].counts)
    # Text, so that a class called "[x]" is not taken for markup.
    for column in ("patients", "slides", *labels, *(["median"] if has_median else [])):
        table.add_column(Text(column), justify="right")
    for summary in summaries:
        median = [] if not has_median else ["" if summary.median is None else f"{summary.median:g}"]
        cells = (
            summary.split if summary.side == "train" else "",
            *([summary.site if summary.side == "train" else ""] if has_site else []),
            summary.side,
            f"{summary.patients:,}",
            f"{summary.slides:,}",
            *(f"{summary.counts[label]:,}" for label in labels),
            *median,
        )
        last = summary.side == "test"
        table.add_row(*(Text(cell) for cell in cells), end_section=last)
    Console(width=None if Console().is_terminal else 200).print(table)
