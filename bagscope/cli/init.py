"""`bagscope init`: make a study folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bagscope.cli import options
from bagscope.cohort.table import missing_paths
from bagscope.pipeline.study import init_study


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
) -> None:
    """Make a study folder from a table, a folder or a glob of slides."""
    made, cohort = init_study(Path(study), slides, labels=labels)
    typer.echo(f"{made.folder}: {len(cohort.rows)} slides")
    for note in cohort.notes:
        typer.echo(f"  note: {note}")
    absent = missing_paths(cohort)
    for row in absent[:10]:
        typer.echo(f"  warning: {row.slide_id}: {row.path} does not exist", err=True)
    if len(absent) > 10:
        typer.echo(f"  warning: and {len(absent) - 10} more files do not exist", err=True)
    typer.echo(f"next: bagscope scan {study}")
