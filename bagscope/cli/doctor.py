"""`bagscope doctor`: what this machine has, and what bagscope would make of it."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def doctor(
    online: Annotated[
        bool, typer.Option("--online", help="also ask whether the model hub can be reached")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for programs")] = False,
) -> None:
    """Show versions, processor, GPU, OpenSlide, kernels and free disk."""
    from bagscope.pipeline.doctor import examine

    found = examine(online=online)
    if as_json:
        typer.echo(json.dumps({"checks": found.checks, "problems": list(found.problems)}, indent=2))
    else:
        width = max(len(name) for section in found.checks.values() for name in section)
        for title, section in found.checks.items():
            typer.echo(title)
            for name, value in section.items():
                typer.echo(f"  {name:<{width}}  {value}")
        for problem in found.problems:
            typer.echo(f"problem: {problem}", err=True)
    raise typer.Exit(int(bool(found.problems)))
