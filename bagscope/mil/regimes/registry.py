"""The regimes by name, and the model that a recipe describes: its aggregator within its regime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import Aggregator, aggregator_entry, build_aggregator
from bagscope.mil.recipe import FULL, RegimeSpec, TrainSpec
from bagscope.mil.regimes.regime import Regime
from bagscope.mil.targets import TargetSpec
from bagscope.specs import Spec, did_you_mean, parse_spec

BUILT_IN: tuple[str, ...] = (
    "mhim",
    "mixup",
    "packmil",
    "pseudo_bags",
    "two_stage",
)
"""A new regime is a file of this folder and its name in this line."""

RegimeT = TypeVar("RegimeT", bound=type[Regime])


@dataclass(frozen=True, kw_only=True, slots=True)
class RegimeEntry:
    """What is known of a registered regime.

    Attributes:
        kind: its class.
        options: the spec of its options.
        summary: one sentence.
        reference: where it was published.
        terms: of the loss that it adds.
    """

    name: str
    kind: type[Regime]
    options: type[Spec]
    summary: str
    reference: str
    terms: tuple[str, ...]


_ENTRIES: dict[str, RegimeEntry] = {}


def register_regime(
    name: str,
    options: type[Spec],
    *,
    summary: str,
    reference: str,
    terms: tuple[str, ...] = (),
) -> Callable[[RegimeT], RegimeT]:
    """Register a regime under a name; decorates its class."""

    def add(kind: RegimeT) -> RegimeT:
        _ENTRIES[name] = RegimeEntry(
            name=name,
            kind=kind,
            options=options,
            summary=summary,
            reference=reference,
            terms=terms,
        )
        return kind

    return add


def regime_names() -> tuple[str, ...]:
    """Return the names of all regimes, in order; imports none of them."""
    return tuple(sorted({FULL, *BUILT_IN, *_ENTRIES}))


def regime_entry(name: str) -> RegimeEntry:
    """Return what is known of a regime other than the plain one.

    Raises:
        ConfigError: no such regime.
    """
    if name not in _ENTRIES and name in BUILT_IN:
        import_module(f"bagscope.mil.regimes.{name}")
    if name not in _ENTRIES:
        raise ConfigError(f"no regime {name!r}{did_you_mean(name, regime_names())}")
    return _ENTRIES[name]


def build_model(recipe: TrainSpec, features: int, outputs: int) -> Aggregator:
    """Return the freshly initialised model of a recipe.

    Args:
        recipe: its aggregator and its regime count.
        features: width of a tile's vector.
        outputs: number of logits.

    Raises:
        ConfigError: no such aggregator or regime, or options that it does not have.
    """
    aggregator, regime = recipe.aggregator, recipe.regime

    def inner(features: int, outputs: int) -> Aggregator:
        return build_aggregator(aggregator.name, features, outputs, aggregator.options)

    if regime.name == FULL:
        _parsed(FULL, Spec, regime.options)
        return inner(features, outputs)
    entry = regime_entry(regime.name)
    build: Any = entry.kind
    model: Regime = build(
        features, outputs, _parsed(entry.name, entry.options, regime.options), inner
    )
    return model


def refuse_impossible(recipe: TrainSpec, targets: Sequence[TargetSpec]) -> None:
    """Refuse an aggregator, a regime or a draw that does not go with the recipe or the targets.

    Raises:
        ConfigError: says what does not go together.
    """
    if recipe.bags.balanced and not any(target.is_categorical for target in targets):
        raise ConfigError(
            "bags.balanced draws by class, and no target has classes (there are: "
            f"{', '.join(f'{target.name}, {target.task}' for target in targets)}); leave it out"
        )
    built_by = aggregator_entry(recipe.aggregator.name).build
    if isinstance(built_by, type) and issubclass(built_by, Aggregator):
        built_by.refuse(recipe, targets)
    if recipe.regime.name != FULL:
        regime_entry(recipe.regime.name).kind.refuse(recipe, targets)


def without_regime(recipe: TrainSpec) -> TrainSpec:
    """Return the same recipe under the plain regime, without the terms that the other one adds."""
    if recipe.regime.name == FULL:
        return recipe
    own = regime_entry(recipe.regime.name).terms
    kept = {name: weight for name, weight in recipe.objective.terms.items() if name not in own}
    return recipe.model_copy(
        update={
            "regime": RegimeSpec(),
            "objective": recipe.objective.model_copy(update={"terms": kept}),
        }
    )


def _parsed(name: str, spec: type[Spec], options: Mapping[str, Any]) -> Spec:
    return parse_spec(spec, options, where=f"regime {name}")
