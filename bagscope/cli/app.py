"""The `bagscope` command: one verb per stage, errors as one sentence, exit codes that mean it.

0 fine; 1 some slides failed, or a check found faults; 2 wrong usage or configuration;
130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bagscope import __version__
from bagscope.cli.compare import compare
from bagscope.cli.convert import convert
from bagscope.cli.convert_weights import convert_weights
from bagscope.cli.demo import demo
from bagscope.cli.doctor import doctor
from bagscope.cli.encoders import encoders
from bagscope.cli.evaluate import evaluate
from bagscope.cli.explain import explain
from bagscope.cli.extract import extract
from bagscope.cli.heatmap import heatmap
from bagscope.cli.init import init
from bagscope.cli.predict import predict
from bagscope.cli.review import review
from bagscope.cli.run import run
from bagscope.cli.scan import scan
from bagscope.cli.splits import splits
from bagscope.cli.tile import tile
from bagscope.cli.train import train
from bagscope.cli.tune import tune
from bagscope.cli.verify import verify
from bagscope.cli.view import view
from bagscope.errors import BagscopeError, ConfigError, FingerprintMismatch

app = typer.Typer(
    name="bagscope",
    help="From whole-slide images to slide-level answers, and back to the tissue.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bagscope {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Hold the options that come before a verb."""


for verb in (
    init,
    scan,
    tile,
    extract,
    train,
    tune,
    evaluate,
    compare,
    predict,
    heatmap,
    review,
    explain,
    view,
    convert,
    convert_weights,
    verify,
    run,
    demo,
    doctor,
):
    app.command()(verb)
app.add_typer(encoders, name="encoders")
app.add_typer(splits, name="splits")


def main() -> None:
    """Run the command line; the only place where errors become exit codes."""
    try:
        app()
    except BagscopeError as error:
        typer.echo(f"bagscope: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError | FingerprintMismatch) else 1)
    except KeyboardInterrupt:
        typer.echo("bagscope: interrupted", err=True)
        sys.exit(130)
