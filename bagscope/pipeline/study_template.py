"""A study.yaml that states every setting, made from the specs themselves, so that it can't drift.

A line such as `#mpp: 0.5` states a default; without its `#` it is the setting. A line that begins
with `# ` is for people. Blocks stand there with nothing in them, which means all their defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from bagscope.specs import Spec

_TEXT_COLUMN = 34
_ENTRY = "- "


def study_template(
    kind: type[Spec],
    *,
    head: Sequence[str],
    titles: Mapping[str, str],
    choices: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
) -> str:
    """Return a YAML file of a spec whose fields are values, blocks, or lists of blocks.

    Args:
        kind: of the whole file.
        head: sentences at the top.
        titles: a sentence or two above each block, by its name.
        choices: names that a setting may have, by `block.setting`, where its type does not say.
        settings: nested; what is named here is set, all else is a comment.
    """
    lines = [f"# {line}".rstrip() for line in head]
    for name, field in kind.model_fields.items():
        inner = _spec_of(field)
        if inner is None:
            lines += ["", _line(name, field, settings)]
            continue
        own = settings.get(name)
        lines += ["", *(f"# {line}" for line in titles[name].splitlines()), f"{name}:"]
        if get_origin(field.annotation) is tuple:
            lines += _entries(inner, own or [])
        else:
            lines += [f"  {line}" for line in _block(name, inner, own or {}, choices)]
    return "\n".join(lines) + "\n"


def _block(
    block: str, kind: type[Spec], settings: Mapping[str, Any], choices: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield _line(name, field, settings, choices.get(f"{block}.{name}", ()))


def _entries(kind: type[Spec], settings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a list of blocks: those that are set, and one that shows the settings."""
    for entry in settings:
        yield f"  {_ENTRY}{_flow(entry)}"
    for place, (name, field) in enumerate(kind.model_fields.items()):
        value = _flow(_plain(field.get_default(call_default_factory=True)))
        lead = " " * len(_ENTRY) if place else _ENTRY
        yield f"  {_aside(f'#{lead}{name}: {value}', _meaning(field, ()))}"


def _line(
    name: str, field: FieldInfo, settings: Mapping[str, Any], choices: Sequence[str] = ()
) -> str:
    is_set = name in settings
    value = settings[name] if is_set else field.get_default(call_default_factory=True)
    text = f"{'' if is_set else '#'}{name}: {_flow(_plain(value))}"
    return _aside(text, _meaning(field, choices))


def _aside(text: str, meaning: str) -> str:
    return f"{text:<{_TEXT_COLUMN}}  # {meaning}"


def _meaning(field: FieldInfo, choices: Sequence[str]) -> str:
    """Return what a setting is for, and what it may be."""
    text = field.description or ""
    allowed = [*choices] or [name for name in _literals(field.annotation) if name not in text]
    if allowed:
        return f"{text} [{' | '.join([*choices] or _literals(field.annotation))}]"
    bounds = _bounds(field)
    return f"{text} ({bounds})" if bounds else text


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(name) for name in get_args(annotation)]
    return []


def _bounds(field: FieldInfo) -> str:
    """Return "0 to 1", "above 0", or nothing where any number will do."""
    low = high = above = below = None
    for rule in field.metadata:
        if isinstance(rule, annotated_types.Ge):
            low = rule.ge
        elif isinstance(rule, annotated_types.Le):
            high = rule.le
        elif isinstance(rule, annotated_types.Gt):
            above = rule.gt
        elif isinstance(rule, annotated_types.Lt):
            below = rule.lt
    if low is not None and high is not None:
        return f"{low} to {high}"
    words = (("at least", low), ("above", above), ("at most", high), ("below", below))
    return ", ".join(f"{word} {number}" for word, number in words if number is not None)


def _spec_of(field: FieldInfo) -> type[Spec] | None:
    """Return the spec of a block, or of the blocks of a list."""
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, Spec):
            return part
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("...\n").strip()
