"""What is to be predicted, as options that several verbs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args

import typer

from bagscope.errors import ConfigError
from bagscope.mil.cases import Per as PerCase
from bagscope.mil.targets import TargetSpec, Task
from bagscope.specs import parse_spec

_TASKS = get_args(Task)

Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        help="column of the labels; several times for several, each as COLUMN or COLUMN:TASK",
        show_default=False,
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help=f"{', '.join(_TASKS)} (default: {TargetSpec.model_fields['task'].get_default()})",
        show_default=False,
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="A,B,…",
        help="the column's values, in order; those of the table, sorted, if not set",
        show_default=False,
    ),
]
Positive = Annotated[
    str | None,
    typer.Option(
        "--positive",
        help="of two classes, the one to find; the last if not set",
        show_default=False,
    ),
]
Time = Annotated[
    str | None,
    typer.Option("--time", help="survival: column of the follow-up time", show_default=False),
]
Event = Annotated[
    str | None,
    typer.Option(
        "--event", help="survival: column of 1 for an event, 0 for censored", show_default=False
    ),
]
Per = Annotated[
    PerCase,
    typer.Option("--per", help="whether a bag is the tiles of a slide or of all a patient's"),
]
DEFAULT_PER: PerCase = "slide"


def targets_of(
    target: Sequence[str] | None,
    task: str | None = None,
    classes: str | None = None,
    positive: str | None = None,
    time: str | None = None,
    event: str | None = None,
) -> tuple[TargetSpec, ...]:
    """Return the targets that the options ask for; none where no option is given.

    `--time` and `--event` are one survival target more, or the only one; with `--task survival`
    a `--target` gives it its name.

    Raises:
        ConfigError: options that contradict each other, or belong to no target.
    """
    named = [_name_and_task(text, task) for text in target or ()]
    if time or event:
        if not any(kind == "survival" for _, kind in named):
            if task not in (None, "survival"):
                raise ConfigError(f"--time and --event belong to survival, and --task is {task}")
            named.append(("", "survival"))
    elif task and not named:
        raise ConfigError(f"--task is {task}, of no target; pass --target COLUMN")
    labelled = [name for name, kind in named if kind not in ("survival", "regression")]
    for option, value in (("--classes", classes), ("--positive", positive)):
        if value is not None and len(labelled) != 1:
            there = ", ".join(labelled) or "none"
            raise ConfigError(
                f"{option} {value!r} belongs to one target with classes (there are: {there})"
            )
    found = []
    for name, kind in named:
        values: dict[str, Any] = {"column": name}
        if kind is not None:
            values["task"] = kind
        if kind == "survival":
            values |= {"time": time, "event": event}
        elif name in labelled:
            if classes is not None:
                values["classes"] = [part.strip() for part in classes.split(",") if part.strip()]
            values["positive"] = positive
        found.append(parse_spec(TargetSpec, values, where="options"))
    return tuple(found)


def require_targets(targets: Sequence[TargetSpec]) -> None:
    """Refuse to go on without a target.

    Raises:
        ConfigError: there is none.
    """
    if not targets:
        raise ConfigError("no target; pass --target COLUMN, or --time and --event for survival")


def _name_and_task(text: str, task: str | None) -> tuple[str, str | None]:
    name, colon, kind = text.rpartition(":")
    return (name, kind) if colon and name and kind in _TASKS else (text, task)
