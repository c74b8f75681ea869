"""The base of everything that a user configures: frozen, strict, with errors in plain words.

A spec refuses unknown keys and names the nearest known one. `parse_spec` turns pydantic's findings
into one `ConfigError`, so that no user ever reads a validation dump.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError

from bagscope.errors import ConfigError

MOST_NAMED = 30
"""More names than this are no help in a sentence."""

SpecT = TypeVar("SpecT", bound="Spec")


class Spec(BaseModel):
    """A frozen set of options; each default lives in its field and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def refuse_unused(spec: Spec, *names: str, of: str, now: str) -> None:
    """Refuse options that were chosen and that another option leaves without use.

    Args:
        spec: that is being checked.
        names: of the options.
        of: what they belong to.
        now: what there is in its place.

    Raises:
        ValueError: names the first of them; for pydantic's validators.
    """
    for name in names:
        default = type(spec).model_fields[name].default
        if getattr(spec, name) != default:
            raise ValueError(f"{name} is of {of}, and {now}; leave it at {default}")


def parse_spec(kind: type[SpecT], values: Mapping[str, Any], *, where: str) -> SpecT:
    """Build a spec from untrusted values.

    Args:
        kind: the spec to build.
        values: as read from a YAML file or the command line.
        where: what the values were read from, for the message.

    Raises:
        ConfigError: every finding, each with field, value seen and what is expected.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        findings = [_finding(kind, dict(found)) for found in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(findings)}") from error


def _finding(kind: type[Spec], found: Mapping[str, Any]) -> str:
    location: tuple[str | int, ...] = found["loc"]
    field = ".".join(map(str, _as_written(kind, location))) or "the spec"
    if found["type"] == "extra_forbidden":
        return f"unknown option {field!r}{did_you_mean(str(location[-1]), _known(kind, location))}"
    if found["type"] == "missing":
        return f"option {field!r} is missing"
    message = str(found["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if found["type"] == "value_error" and isinstance(found["input"], Mapping):
        # Said by a block of options as a whole, which names those that it is about.
        return f"{field}: {message}" if location else message
    if found["type"] in ("model_type", "dict_type", "mapping_type"):
        message = "should be a block of options, each with its name"
    return f"{field} is {found['input']!r}: {message}"


def _as_written(kind: type[Spec], location: Sequence[str | int]) -> list[str | int]:
    """Return a location without the tag that stands behind a choice of forms, which no file has."""
    model: type[BaseModel] | None = kind
    found: list[str | int] = []
    rest = iter(location)
    for key in rest:
        found.append(key)
        field = model.model_fields.get(str(key)) if model is not None else None
        if field is not None and any(isinstance(one, Discriminator) for one in field.metadata):
            next(rest, None)
        inner: Any = None if field is None else field.annotation
        model = inner if _is_model(inner) else None
    return found


def _known(kind: type[Spec], location: Sequence[str | int]) -> list[str]:
    """List the fields of the model that the last element of `location` was not found in."""
    model: type[BaseModel] = kind
    for key in location[:-1]:
        inner = model.model_fields.get(str(key))
        if inner is None or not _is_model(inner.annotation):
            break
        model = inner.annotation  # type: ignore[assignment]  # just checked by _is_model
    return list(model.model_fields)


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known name, else the known ones if few."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(sorted(known))})" if 0 < len(known) <= MOST_NAMED else ""
