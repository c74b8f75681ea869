"""`bagscope convert-weights`: a published checkpoint → a model that predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bagscope.cli import console, options, target_options
from bagscope.errors import ConfigError
from bagscope.pipeline.convert_weights import (
    PlannedBundle,
    WeightsRequest,
    WeightTask,
    plan_weights,
)
from bagscope.pipeline.convert_weights import convert_weights as write_weights
from bagscope.pipeline.recipes import parse_settings


def convert_weights(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="a file of safetensors, or of torch.save", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="the bundle, NAME.bagscope", show_default=False)
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="A,B,…",
            help="a name for each logit, in order; of two, the last is the positive",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="ORIGINAL",
            help="whose model it is, as clam-sb or transmil; recognised if not set",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="column of the labels that the classes are of (default: label); of survival, a "
            "name",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        WeightTask,
        typer.Option("--task", help="whether a bag has one of the classes, or any, or a risk"),
    ] = "classes",
    time: target_options.Time = None,
    event: target_options.Event = None,
    edges: Annotated[
        str | None,
        typer.Option(
            "--edges",
            metavar="T0,T1,…",
            help="survival: where the time bins of the training begin and end, one more than "
            "logits; none of Cox",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            "--features",
            help="a folder of features of the kind that it was trained on, in place of --encoder, "
            "--mpp and --tile-px",
            show_default=False,
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            "-e",
            help="of the training features (default: unknown)",
            show_default=False,
        ),
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(
            "--mpp", help="requested of the training tiles (default: unknown)", show_default=False
        ),
    ] = None,
    tile_px: Annotated[
        int | None,
        typer.Option(
            "--tile-px", help="of the training tiles (default: unknown)", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="OPTION=VALUE",
            help="of the aggregator, where no tensor's shape tells it",
            show_default=False,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="leave tensors of such names out; may be repeated",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", help="of the state dict, where the file has several", show_default=False
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a model of a published checkpoint, without running any code that is in it."""
    request = WeightsRequest(
        checkpoint=checkpoint,
        out=out,
        classes=_parts(classes),
        source=source,
        target=target,
        task=task,
        time=time,
        event=event,
        edges=_numbers(edges),
        features=features,
        encoder=encoder,
        mpp=mpp,
        tile_px=tile_px,
        settings=parse_settings(settings or ()),
        ignore=tuple(ignore or ()),
        key=key,
        overwrite=overwrite,
    )
    if dry_run:
        _print("plan", plan_weights(request), as_json=as_json)
        return
    done = write_weights(request)
    _print("converted", done.planned, as_json=as_json, path=done.path, is_new=done.is_new)


def _parts(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _parts(text))
    except ValueError as error:
        raise ConfigError(f"--edges {text}: write numbers, as --edges 0,12,24,60,120") from error


def _print(
    event: str,
    planned: PlannedBundle,
    *,
    as_json: bool,
    path: Path | None = None,
    is_new: bool = False,
) -> None:
    fitted = planned.fitted
    if as_json:
        written = {} if path is None else {"bundle": str(path), "is_new": is_new}
        facts = {
            "original": fitted.source,
            "aggregator": fitted.aggregator,
            "options": dict(fitted.options),
            "told": list(fitted.told),
            "assumed": list(fitted.assumed),
            "features": planned.origin.to_json(),
            "notes": list(planned.notes),
        }
        console.print_json(event, {**facts, **written})
        return
    read = ", ".join(f"{name} {fitted.options[name]}" for name in fitted.told)
    outputs = ", ".join(planned.member.targets[0].classes) or "a risk"
    typer.echo(
        f"{fitted.source} → {fitted.aggregator}: {fitted.features} features in, {outputs} out"
    )
    typer.echo(f"read off the weights: {read}")
    for note in planned.notes:
        typer.echo(f"  note: {note}")
    if path is not None:
        typer.echo(f"model: {path}{'' if is_new else ' (was there already)'}")
