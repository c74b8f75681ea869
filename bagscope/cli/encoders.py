"""`bagscope encoders`: which encoders there are, whether they work here, fetching weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bagscope.cli import options
from bagscope.pipeline.encoders import (
    EncoderCheck,
    EncoderPage,
    EncoderRow,
    check_encoders,
    fetch_encoder,
    list_encoders,
    show_encoder,
)
from bagscope.wording import counted

encoders = typer.Typer(
    help="List encoders, check whether they work here, fetch their weights.",
    no_args_is_help=True,
)

Name = Annotated[
    str,
    typer.Argument(help="of the encoder, or timm:MODEL, local:PATH", show_default=False),
]


@encoders.command("list")
def list_(as_json: options.AsJson = False) -> None:
    """Show every encoder: what it gives, which tiles it wants, under what licence."""
    rows = list_encoders()
    if as_json:
        for row in rows:
            typer.echo(json.dumps(asdict(row)))
    else:
        _print_rows(rows)


@encoders.command()
def show(name: Name, as_json: options.AsJson = False) -> None:
    """Show everything that is known of one encoder, and how to use it."""
    page = show_encoder(name)
    if as_json:
        typer.echo(json.dumps(asdict(page)))
    else:
        _print_page(page)


@encoders.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="encoders to check and run on one tile; all, without running"),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="folder that encoders fetch --to filled", show_default=False),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code of a model's repository")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Say whether weights are at hand, who grants access, and run one tile."""
    checks = check_encoders(names or (), weights=weights, trust_remote_code=trust_remote_code)
    if as_json:
        for found in checks:
            typer.echo(json.dumps({**asdict(found), "usable": found.usable}))
    else:
        _print_checks(checks)
    raise typer.Exit(int(bool(names) and not all(found.usable for found in checks)))


@encoders.command()
def fetch(
    name: Name,
    to: Annotated[
        Path, typer.Option(help="folder that gets one subfolder per encoder", show_default=False)
    ],
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Put an encoder's weights into a folder, for machines without a connection."""
    done = fetch_encoder(name, to, overwrite=overwrite)
    if as_json:
        folder = None if done.folder is None else str(done.folder)
        typer.echo(json.dumps({**asdict(done), "folder": folder}))
        return
    typer.echo(done.note)
    if done.folder is not None:
        files = counted(len(done.sha256), "file")
        typer.echo(f"{done.folder}: {files}, {done.size_bytes / 2**20:,.1f} MiB")


def _print_rows(rows: Sequence[EncoderRow]) -> None:
    _print_table(
        ("encoder", "numbers", "tile", "licence", "commercial", "gated", "built by"),
        [
            (
                row.name,
                str(row.dimension),
                f"{row.tile_px} px @ {row.mpp:g}",
                row.licence or "not stated",
                _yes_no(row.commercial_use),
                _yes_no(row.gated),
                row.source,
            )
            for row in rows
        ],
        right=("numbers",),
    )
    typer.echo(
        f"{counted(len(rows), 'encoder')}; tiles at µm per pixel; timm:MODEL and local:PATH work "
        "for everything else; bagscope encoders show NAME says more"
    )


def _print_page(page: EncoderPage) -> None:
    width = max(map(len, page.facts))
    typer.echo(page.name)
    for field, value in page.facts.items():
        if value not in (None, "", {}):
            text = json.dumps(value) if isinstance(value, dict | list) else _text(value)
            typer.echo(f"  {field:<{width}}  {text}")
    typer.echo(f"page\n  {page.page or 'none'}")
    typer.echo("how to use it")
    for line in page.steps:
        typer.echo(f"  {line}")


def _print_checks(checks: Sequence[EncoderCheck]) -> None:
    _print_table(
        ("encoder", "weights", "gated", "access", "offline", "one tile", "problem"),
        [
            (
                found.name,
                _weights_text(found),
                _yes_no(found.gated),
                _access_text(found),
                _yes_no(found.works_offline),
                "" if found.seconds is None else f"{found.seconds:.1f} s",
                "the hub can't be reached" if found.unreachable else found.problem,
            )
            for found in checks
        ],
        right=("one tile",),
    )
    silent = [found for found in checks if found.unreachable]
    if silent:
        # The same reason for each, so once.
        names = "NAME" if len(silent) > 1 else silent[0].name
        typer.echo(
            f"the hub can't be reached ({silent[0].unreachable}); on a machine with a connection "
            f"run bagscope encoders fetch {names} --to DIR, and pass --weights DIR here"
        )
    usable = sum(found.usable for found in checks)
    offline = sum(found.works_offline for found in checks)
    typer.echo(f"{usable} of {len(checks)} can be used here, {offline} without a connection")


def _weights_text(found: EncoderCheck) -> str:
    texts = {
        "built in": "none needed",
        "builder": "its builder's",
        "package": "in a package",
        "file": "local file",
        "folder": "in the folder",
        "cache": "in the cache",
    }
    return texts.get(found.weights, "to download" if found.granted else "not at hand")


def _access_text(found: EncoderCheck) -> str:
    if found.granted:
        return "granted"
    if found.granted is False or (found.gated and not found.weights):
        return f"ask at {found.page}"
    return "not needed" if found.weights else "not known"


def _yes_no(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


def _text(value: object) -> str:
    return _yes_no(value) if isinstance(value, bool) else str(value)


def _print_table(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        options_of: dict[str, Any] = {"style": "red"} if name == "problem" else {}
        justify: Any = "right" if name in right else "left"
        # A name that is cut short can't be typed.
        table.add_column(
            name, justify=justify, overflow="fold", no_wrap=name == "encoder", **options_of
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if Console().is_terminal else 200).print(table)
