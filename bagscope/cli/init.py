"""`bagscope init`: make a study folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bagscope.cli import options, target_options
from bagscope.cohort.cells import TABLE_SUFFIXES
from bagscope.cohort.table import Cohort, missing_paths
from bagscope.pipeline.recipes import parse_settings
from bagscope.pipeline.study import Study, init_study
from bagscope.wording import counted

DEFAULT_LABEL = "label"
"""The column for labels, in a table that is made of a folder of slides."""


def init(
    study: options.Study,
    slides: Annotated[
        str,
        typer.Option(
            help="a table (CSV, TSV, Parquet, XLSX), a folder or a glob of slides",
            show_default=False,
        ),
    ],
    labels: options.Labels = None,
    target: target_options.Target = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="BLOCK.SETTING=VALUE",
            help="of study.yaml, such as tiling.mpp=1.0",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a study folder: the table of slides, and study.yaml with every setting explained."""
    settings: dict[str, Any] = parse_settings(set_ or [])
    targets = target_options.targets_of(target)
    if targets:
        settings["targets"] = [
            spec.model_dump(mode="json", exclude_defaults=True) for spec in targets
        ]
    is_table = Path(slides).is_file() and Path(slides).suffix.lower() in TABLE_SUFFIXES
    wanted = [spec.column for spec in targets] or [DEFAULT_LABEL]
    to_fill = [] if is_table or labels else ["patient_id", *wanted]
    is_new = not (study / "study.yaml").exists()
    made, cohort = init_study(study, slides, labels=labels, settings=settings, to_fill=to_fill)
    _print_study(made, cohort, to_fill if is_new else [], is_new=is_new)
    typer.echo(f"next: bagscope scan {study}")


def _print_study(made: Study, cohort: Cohort, to_fill: list[str], *, is_new: bool) -> None:
    typer.echo(
        f"{made.folder}: {counted(len(cohort.rows), 'slide')}{'' if is_new else '; kept as it is'}"
    )
    for note in cohort.notes:
        typer.echo(f"  note: {note}")
    absent = missing_paths(cohort)
    for row in absent[:10]:
        typer.echo(f"  warning: {row.slide_id}: {row.path} does not exist", err=True)
    if len(absent) > 10:
        typer.echo(f"  warning: and {len(absent) - 10} more files do not exist", err=True)
    if to_fill:
        patient, *columns = to_fill
        typer.echo(f"{made.cohort_path}: fill in before you train")
        typer.echo(f"  {patient}: the same for all slides of a patient; empty: each has its own")
        for column in columns:
            typer.echo(f"  {column}: what is to be predicted; empty: not known")
    typer.echo(f"{made.folder / 'study.yaml'}: every setting, with its default")
    if not made.spec.targets:
        typer.echo("  name the column to predict under targets, and `bagscope run` trains too")
