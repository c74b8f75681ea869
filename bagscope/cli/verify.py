"""`bagscope verify`: is every artefact of a study still what it was when it was written?"""

from __future__ import annotations

from typing import Annotated

import typer

from bagscope.artifacts import canonical_json
from bagscope.cli import options
from bagscope.cli.counter import StepCounter


def verify(
    folder: options.Study,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=1, help="threads; one per core if not set")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check every tile file, feature file, model and status file; exit 1 on any fault."""
    from bagscope.pipeline.verify import verify_study

    found = verify_study(folder, StepCounter("verify", silent=as_json).advance, workers=workers)
    for fault in found.faults:
        if as_json:
            record = {"event": "fault", "path": str(fault.path), "sentence": fault.sentence}
            typer.echo(canonical_json(record))
        else:
            typer.echo(f"{fault.path}: {fault.sentence}")
    totals = {"artefacts": found.artefacts, "faults": len(found.faults)}
    if as_json:
        typer.echo(canonical_json({"event": "totals", **totals}))
    else:
        typer.echo(f"verify: {totals['artefacts']:,} artefacts, {totals['faults']:,} faults")
    raise typer.Exit(found.exit_code)
