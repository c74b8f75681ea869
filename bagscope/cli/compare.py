"""`bagscope compare`: runs on the same test patients, each against each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagscope.cli import console, options
from bagscope.wording import counted

if TYPE_CHECKING:
    from bagscope.mil.evaluation.comparing import Compared


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="folders of two or more runs", show_default=False)
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="where the runs have several", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="folder for compare.html and comparison.json", show_default=False
        ),
    ] = None,
    resamples: Annotated[
        int, typer.Option("--resamples", min=100, help="of each bootstrap")
    ] = 10_000,
    as_json: options.AsJson = False,
) -> None:
    """Say which runs differ beyond chance on the same test patients."""
    from bagscope.pipeline.compare import CompareRequest, compare_runs

    found = compare_runs(
        CompareRequest(runs=tuple(runs), target=target, out=out, resamples=resamples)
    )
    if as_json:
        console.print_json("compared", found.to_json())
        return
    _print(found)
    if out is not None:
        typer.echo(f"page: {out / 'compare.html'}")


def _print(found: Compared) -> None:
    from bagscope.mil.report.claims import interval_text, number_text
    from bagscope.mil.report.comparison_page import comparison_claims, p_text

    typer.echo(
        f"{found.metric.label} on the same {counted(found.patients, 'patient')}, 95 % intervals"
    )
    names = [f"{pair.first} − {pair.second}" for pair in found.pairs]
    wide = max(map(len, [*found.estimates, *names]))
    for name, one in found.estimates.items():
        typer.echo(f"  {name:<{wide}}  {number_text(one.value, 3):>7}  {interval_text(one, 3)}")
    typer.echo("pairs, with p as it is and after Holm")
    for name, pair in zip(names, found.pairs, strict=True):
        test = pair.judged_by
        ends = f"{number_text(test.low, 3)} to {number_text(test.high, 3)}"
        typer.echo(
            f"  {name:<{wide}}  {number_text(test.difference, 3):>7}  {ends:<17}  "
            f"{p_text(test.p_value):>7}  {p_text(pair.holm_p):>7}  {test.method}"
        )
    for claim in comparison_claims(found):
        typer.echo(claim.text)
    for note in found.notes:
        typer.echo(f"  note: {note}")
