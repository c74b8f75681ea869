"""The aggregators by name: ours, and those that other packages register.

A package adds its own through the entry point group `bagscope.aggregators`, whose value is a module
that registers on import, as ours do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from bagscope.arithmetic import avoid_broken_units
from bagscope.errors import ConfigError, first_line
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec, did_you_mean, parse_spec

if TYPE_CHECKING:
    from bagscope.mil.recipe import TrainSpec
    from bagscope.mil.targets import TargetSpec

BUILT_IN = (
    "abmil", "acmil", "attentive_probe", "clam_mb", "clam_sb", "comel", "dsmil", "dtfd", "hopfield",
    "ilra", "ins", "mambamil", "max", "mean", "rrt", "set_transformer", "transmil", "vit",
)  # fmt: skip
"""A new aggregator of ours is a file of this folder and its name in this line."""
ENTRY_POINTS = "bagscope.aggregators"


class Aggregator(nn.Module):
    """From a batch of bags to logits, and a score for every tile.

    A subclass is built as `cls(features, outputs, options)`: width of the input, number of logits,
    and its own options.

    Attributes:
        label_terms: of its losses, those that are there only where each bag has one class.
    """

    label_terms: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        # Before the first product, which need not be one of our operations.
        avoid_broken_units()

    def forward(self, bags: Bags) -> BagOutput:
        """Return logits, embedding and scores; packed equals bag by bag."""
        raise NotImplementedError

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return what the logits are a weighted sum of; None where they are no such sum."""
        return None

    def rollout(self, bags: Bags) -> Tensor | None:
        """Return attention rollout (T,), which adds up to 1 over a bag; None where there is none.

        Of models whose layers let tiles look at each other: see `rolling`.
        """
        return None

    def after_step(self) -> None:
        """Follow a change of the weights in training, as a running mean does."""

    @property
    def needs_grid(self) -> bool:
        """Return whether tiles without places on a lattice are refused."""
        return False

    @property
    def needs_micrometres(self) -> bool:
        """Return whether tiles without places in micrometres are refused."""
        return False

    @property
    def needs_parents(self) -> bool:
        """Return whether tiles of a single resolution are refused."""
        return False

    @classmethod
    def refuse(cls, recipe: TrainSpec, targets: Sequence[TargetSpec]) -> None:
        """Refuse a recipe or targets that can't be learnt from.

        Raises:
            ConfigError: says what does not go together.
        """

    if TYPE_CHECKING:

        def __call__(self, bags: Bags) -> BagOutput:
            """Return what `forward` returns."""


AggregatorT = TypeVar("AggregatorT", bound=type[Aggregator])


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregatorEntry:
    """What is known of a registered aggregator.

    Attributes:
        options: the spec of its options.
        summary: one sentence.
        reference: where it was published.
        is_order_free: whether the order of a bag's tiles changes nothing.
        mixes_bags: whether a bag's output depends on the bags beside it, by design.
    """

    name: str
    build: Callable[[int, int, Any], Aggregator]
    options: type[Spec]
    summary: str
    reference: str
    is_order_free: bool
    mixes_bags: bool


_ENTRIES: dict[str, AggregatorEntry] = {}


def register(
    name: str,
    options: type[Spec],
    *,
    summary: str,
    reference: str,
    is_order_free: bool = True,
    mixes_bags: bool = False,
) -> Callable[[AggregatorT], AggregatorT]:
    """Register an aggregator under a name; decorates its class.

    Raises:
        ValueError: another class has the name.
    """

    def add(kind: AggregatorT) -> AggregatorT:
        taken = _ENTRIES.get(name)
        if taken is not None and getattr(taken.build, "__qualname__", "") != kind.__qualname__:
            raise ValueError(f"aggregator {name!r} is registered twice; choose another name")
        _ENTRIES[name] = AggregatorEntry(
            name=name,
            build=kind,
            options=options,
            summary=summary,
            reference=reference,
            is_order_free=is_order_free,
            mixes_bags=mixes_bags,
        )
        return kind

    return add


def aggregator_names() -> tuple[str, ...]:
    """Return the names of all aggregators, in order; imports none of them."""
    return tuple(sorted({*BUILT_IN, *_ENTRIES, *(point.name for point in _foreign())}))


def aggregator_entry(name: str) -> AggregatorEntry:
    """Return what is known of an aggregator.

    Raises:
        ConfigError: no such aggregator, or its package fails to register it.
    """
    if name not in _ENTRIES:
        if name in BUILT_IN:
            import_module(f"bagscope.mil.aggregators.{name}")
        for point in _foreign():
            if point.name == name:
                _load(point)
    if name not in _ENTRIES:
        known = aggregator_names()
        if name in known:
            raise ConfigError(f"aggregator {name!r}: its package registers no such name")
        raise ConfigError(f"no aggregator {name!r}{did_you_mean(name, known)}")
    return _ENTRIES[name]


def build_aggregator(
    name: str, features: int, outputs: int, options: Mapping[str, Any] | Spec | None = None
) -> Aggregator:
    """Return a freshly initialised aggregator.

    Args:
        name: of a registered one.
        features: width of a tile's vector.
        outputs: number of logits.
        options: its own; unknown ones are refused.

    Raises:
        ConfigError: no such aggregator, or options that it does not have.
    """
    entry = aggregator_entry(name)
    if isinstance(options, Spec):
        options = options.model_dump()
    parsed = parse_spec(entry.options, options or {}, where=f"aggregator {name}")
    return entry.build(features, outputs, parsed)


def _load(point: EntryPoint) -> None:
    try:
        point.load()
    # What a foreign package raises on import can be anything.
    except Exception as error:
        raise ConfigError(
            f"aggregator {point.name!r}: {point.value} can't be loaded ({first_line(error)}); "
            "correct or remove its package"
        ) from error


def _foreign() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))
