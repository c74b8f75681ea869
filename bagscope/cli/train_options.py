"""What is trained on what, as options that `train` and `tune` share."""

from __future__ import annotations

from typing import Annotated

import typer

Recipe = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="name of a recipe, or a YAML file", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="BLOCK.OPTION=VALUE", help="over the recipe", show_default=False),
]
Split = Annotated[
    str, typer.Option("--split", help="name of the splits; made where they are missing")
]
Seeds = Annotated[
    str | None,
    typer.Option("--seeds", help="one model per fold and seed: 0,1,2", show_default=False),
]
Features = Annotated[
    str | None,
    typer.Option(
        "--features", help="folder or URL; the study's own if not set", show_default=False
    ),
]
Encoder = Annotated[
    str | None,
    typer.Option("--encoder", "-e", help="where there are several", show_default=False),
]
SkipMissing = Annotated[
    bool, typer.Option("--skip-missing", help="leave slides without features out")
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda (a member on each GPU), cuda:1, ...")
]
