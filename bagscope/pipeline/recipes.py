"""Recipes by name or file, and options laid over them. Light to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import bagscope
from bagscope.errors import ConfigError, first_line
from bagscope.mil.recipe import FULL, TrainSpec
from bagscope.pipeline.study import read_yaml
from bagscope.specs import did_you_mean, parse_spec

_PACKAGE = Path(bagscope.__file__).parent
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "configs")
"""Where recipes lie in a wheel, and in a checkout."""


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with bagscope."""
    return tuple(sorted(path.stem for folder in _FOLDERS for path in folder.glob("*.yaml")))


def load_recipe(name: str, options: Mapping[str, Any] | None = None) -> TrainSpec:
    """Return a recipe with options laid over it.

    Where they name another aggregator or regime, or another aggregator of a coarse stage, nothing
    is kept of what the recipe sets for its own one; nor of a block that they give empty.

    Args:
        name: of a recipe that comes with bagscope, or a YAML file.
        options: nested as in the file; they win.

    Raises:
        ConfigError: no such recipe, aggregator or regime, or an option that there is not.
    """
    from bagscope.mil.aggregators.registry import aggregator_entry
    from bagscope.mil.regimes.registry import regime_entry

    path = _path_of(name)
    values = laid_over(_without_renamed(read_yaml(path), options or {}), options or {})
    recipe = parse_spec(TrainSpec, values, where=f"recipe {path.name}")
    aggregator = recipe.aggregator
    parse_spec(
        aggregator_entry(aggregator.name).options,
        aggregator.options,
        where=f"recipe {path.name}: aggregator {aggregator.name}",
    )
    regime = recipe.regime
    if regime.name != FULL:
        where = f"recipe {path.name}: regime {regime.name}"
        parse_spec(regime_entry(regime.name).options, regime.options, where=where)
    return recipe


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return `training.epochs=20` and the like as nested options; values are read as YAML.

    Raises:
        ConfigError: not of that form.
    """
    options: dict[str, Any] = {}
    for text in settings:
        name, is_given, value = text.partition("=")
        if not is_given or not name.strip():
            raise ConfigError(f"--set {text!r}: write it as block.option=value")
        *blocks, last = name.strip().split(".")
        inner = options
        for block in blocks:
            inner = inner.setdefault(block, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {text!r}: {block} is set to a value already")
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: {first_line(error)}") from error
    return options


def laid_over(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested options with others laid over them; an empty block takes the whole one away."""
    found = dict(values)
    for name, value in options.items():
        below = found.get(name)
        if value and isinstance(value, Mapping) and isinstance(below, Mapping):
            found[name] = laid_over(below, value)
        else:
            found[name] = value
    return found


def _without_renamed(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested options without those of what is named, where others name another one."""
    found = dict(values)
    for block, given in options.items():
        own = found.get(block)
        if not (isinstance(own, Mapping) and isinstance(given, Mapping)):
            continue
        is_choice = "name" in own and own.keys() <= {"name", "options"}
        if is_choice and given.get("name", own["name"]) != own["name"]:
            del found[block]
        else:
            found[block] = _without_renamed(own, given)
    return found


def _path_of(name: str) -> Path:
    given = Path(name)
    if given.suffix in (".yaml", ".yml"):
        if not given.is_file():
            raise ConfigError(f"--recipe {name}: no such file")
        return given
    for folder in _FOLDERS:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise ConfigError(f"no recipe {name!r}{did_you_mean(name, recipe_names())}")
