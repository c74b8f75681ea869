"""`bagscope scan`: what is in a cohort, what is wrong with it, what will it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bagscope.cli import console, options
from bagscope.cohort.table import load_cohort
from bagscope.pipeline.scan import CohortScan, scan_cohort, write_scan_csv
from bagscope.pipeline.study import RunSpec, StudySpec, open_study
from bagscope.specs import parse_spec
from bagscope.wording import counted


def scan(
    source: Annotated[
        str,
        typer.Argument(help="a study folder, a table, a folder or a glob", show_default=False),
    ],
    mpp: options.MppOption = None,
    tile_px: options.TilePx = None,
    allow_estimated_mpp: options.AllowEstimatedMpp = None,
    feature_dim: Annotated[
        int, typer.Option(min=1, help="numbers per tile, for the disk estimate")
    ] = 1024,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="also write the table here", show_default=False)
    ] = None,
    backend: options.Backend = None,
    workers: options.Workers = None,
    as_json: options.AsJson = False,
) -> None:
    """Open every slide, count its tiles, time a few reads, and list every problem."""
    overrides: dict[str, dict[str, object]] = {
        "tiling": {"mpp": mpp, "tile_px": tile_px, "allow_estimated_mpp": allow_estimated_mpp},
        "run": {"workers": workers},
    }
    folder = Path(source)
    if (folder / "cohort.csv").exists():
        study = open_study(folder, overrides)
        cohort, spec = study.cohort(), study.spec
    else:
        given = {
            section: {name: value for name, value in values.items() if value is not None}
            for section, values in overrides.items()
        }
        cohort, spec = load_cohort(source), parse_spec(StudySpec, given, where="options")
    found = scan_cohort(
        cohort,
        spec.tiling,
        RunSpec.model_validate(spec.run),
        console.reporter(as_json=as_json),
        feature_dim=feature_dim,
        backend=backend,
    )
    if csv is not None:
        write_scan_csv(found, csv)
    if as_json:
        for row in found.rows:
            typer.echo(json.dumps({"event": "slide", **row}))
        typer.echo(json.dumps({"event": "totals", **found.totals()}))
    else:
        _print_scan(found, feature_dim)
    raise typer.Exit(found.exit_code)


def _print_scan(found: CohortScan, feature_dim: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("slide", "format", "size px", "mpp", "from", "backend", "tissue", "tiles"):
        table.add_column(name, justify="right" if name in {"tissue", "tiles", "mpp"} else "left")
    table.add_column("features MiB", justify="right")
    table.add_column("problem", style="red", overflow="fold")
    for row in found.rows:
        known = bool(row["format"])
        tissue = row["tissue_fraction"]
        table.add_row(
            str(row["slide_id"]),
            str(row["format"]),
            f"{row['width_px']}×{row['height_px']}" if known else "",
            f"{row['mpp']:.4g}" if row["mpp"] else "",
            str(row["mpp_source"]),
            str(row["backend"]),
            f"{tissue:.0%}" if tissue != "" else "",
            f"{row['tiles']:,}" if known else "",
            f"{row['features_mib']:.1f}" if known else "",
            str(row["problem"]),
        )
    screen = Console(width=None if Console().is_terminal else 200)
    screen.print(table)
    for row in found.rows:
        if row["warnings"]:
            typer.echo(f"warning: {row['slide_id']}: {row['warnings']}")
    for note in found.notes:
        typer.echo(f"note: {note}")
    totals = found.totals()
    typer.echo(
        f"{counted(totals['slides'], 'slide')}, {totals['problems']} with a problem; "
        f"{counted(totals['tiles'], 'tile')}; "
        f"features {totals['features_gib']:.2f} GiB at {feature_dim} × float16; reading about "
        f"{console.duration_text(totals['read_hours'] * 3600)} on one core, "
        "the encoder's own time not counted"
    )
