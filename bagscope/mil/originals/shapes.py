"""What the shapes of an original's tensors tell: its widths, its options, and which one it is.

`SIZES` has a row for every aggregator, in our names of the tensors, so that it serves every
original of that aggregator. What no shape tells is the original's own (`Original.options`), asked
for, or the aggregator's default, and is said to be so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate
from operator import mul
from typing import Any

from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import aggregator_entry
from bagscope.mil.originals import ORIGINALS
from bagscope.mil.originals.mapping import Original
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.registry import build_model
from bagscope.specs import did_you_mean, parse_spec

Shapes = Mapping[str, tuple[int, ...]]
Reading = Callable[[Shapes], Any]
"""What shapes say; None where they say nothing."""
_SHOWN = 3
_INNER = "inner."
"""What the tensors of an aggregator begin with inside a regime."""


def axis(place: int, *names: str) -> Reading:
    """Return the size along an axis of the first of some tensors that is there."""
    return lambda shapes: next(
        (shapes[name][place] for name in names if len(shapes.get(name, ())) > place), None
    )


def rows(*names: str) -> Reading:
    """Return the outputs of a linear layer: the first axis of its weight."""
    return axis(0, *names)


def columns(*names: str) -> Reading:
    """Return the inputs of a linear layer: the second axis of its weight."""
    return axis(1, *names)


def has(name: str, yes: Any = True, no: Any = False) -> Reading:
    """Return one of two values, by whether a tensor is there."""
    return lambda shapes: yes if name in shapes else no


def count(pattern: str) -> Reading:
    """Return how many tensors have such a name."""
    return lambda shapes: sum(fnmatchcase(name, pattern) for name in shapes)


def ratio(whole: Reading, part: Reading) -> Reading:
    """Return how often one size goes into another."""

    def read(shapes: Shapes) -> int | None:
        sizes = whole(shapes), part(shapes)
        return None if None in sizes else sizes[0] // sizes[1]

    return read


def either(*readings: Reading) -> Reading:
    """Return what the first of several readings says that says anything."""
    return lambda shapes: next(
        (said for one in readings if (said := one(shapes)) is not None), None
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is read off the tensors of an aggregator.

    Attributes:
        features: the width of a tile's vector.
        outputs: the number of logits.
        options: of the aggregator, each read by itself.
        untold: options that no shape tells, and that answers depend on.
    """

    features: Reading
    outputs: Reading
    options: Mapping[str, Reading] = field(default_factory=dict)
    untold: tuple[str, ...] = ()


_PROJECTION, _V = "attention.projection.weight", "attention.v.weight"
_CLAM = Sizes(
    features=columns(_PROJECTION),
    outputs=rows("classifier.weight"),
    options={"hidden": rows(_PROJECTION), "attention": rows(_V)},
)
_TILES = Sizes(
    features=columns("network.projection.weight"),
    outputs=rows("network.classifier.weight"),
    options={"hidden": rows("network.projection.weight")},
    untold=("level", "activation"),
)
_BRANCHED = ("branches.attention.projection.weight", "branches.projection.weight")
_QUERY = "branches.scores.query"
_ENCODER = "encoder.0.mab"

SIZES: Mapping[str, Sizes] = {
    "abmil": Sizes(
        features=columns(_PROJECTION),
        outputs=rows("classifier.weight"),
        options={
            "hidden": rows(_PROJECTION),
            "attention": rows(_V),
            "gated": has("attention.u.weight"),
            "projection_bias": has("attention.projection.bias"),
            "attention_bias": has("attention.v.bias"),
        },
        untold=("activation", "gate"),
    ),
    "acmil": Sizes(
        features=columns(*_BRANCHED),
        outputs=rows("classifier.weight"),
        options={
            "attention": has(_QUERY, "multihead", "gated"),
            "branches": either(rows("branches.attention.w.weight"), columns(_QUERY)),
            "hidden": rows(*_BRANCHED),
            "projection_bias": either(
                has("branches.attention.projection.bias", no=None), has("branches.projection.bias")
            ),
            "attention_width": rows("branches.attention.v.weight"),
        },
        untold=("activation", "heads"),
    ),
    "clam_mb": _CLAM,
    "clam_sb": _CLAM,
    "dsmil": Sizes(
        features=columns("projection.weight", "instance.weight"),
        outputs=rows("instance.weight"),
        options={
            "hidden": rows("projection.weight"),
            "query": rows("query.weight"),
            "q": has("query_out.weight", "nonlinear", "linear"),
            "v": has("value.weight", "passing", "identity"),
        },
        untold=("activation", "predict"),
    ),
    "dtfd": Sizes(
        features=columns("projection.weight"),
        outputs=rows("first.classifier.weight"),
        options={"hidden": rows("projection.weight"), "attention": rows("first.v.weight")},
        untold=("pseudo_bags", "distil", "split", "inference_splits"),
    ),
    "hopfield": Sizes(
        features=rows("norm_key.weight"),
        outputs=rows("classifier.weight"),
        options={"states": columns("states"), "hidden": columns("out.weight")},
        untold=("heads", "beta", "update_steps", "update_eps"),
    ),
    "ilra": Sizes(
        features=columns("blocks.0.forth.key.weight"),
        outputs=rows("classifier.weight"),
        options={
            "hidden": columns("classifier.weight"),
            "layers": count("blocks.*.latent"),
            "rank": columns("blocks.0.latent"),
            "seeds": columns("seeds"),
            "layer_norm": has("pooling.norm_first.weight"),
        },
        untold=("heads",),
    ),
    "mambamil": Sizes(
        features=columns("projection.weight"),
        outputs=rows("classifier.weight"),
        options={
            "hidden": rows("projection.weight"),
            "attention": rows("v.weight"),
            "layers": count("norms.*.weight"),
            # A second core reads backwards or in strides, and both have the same tensors.
            "ways": has("mixers.0.cores.1.A_log", None, "plain"),
            "states": columns("mixers.0.cores.0.A_log"),
            "expand": ratio(columns("mixers.0.out_proj.weight"), rows("projection.weight")),
        },
        untold=("ways", "rate", "order"),
    ),
    "max": _TILES,
    "mean": _TILES,
    "rrt": Sizes(
        features=columns("projection.weight"),
        outputs=rows("classifier.weight"),
        options={
            "hidden": rows("projection.weight"),
            "attention": rows("v.weight"),
            "layers": count("norms.*.weight"),
            "heads": rows("mixers.0.epeg"),
            "epeg": either(axis(2, "mixers.0.epeg"), lambda shapes: 0),
            "representatives": either(columns("cross.phi"), lambda shapes: 0),
        },
        untold=(
            "heads",
            "cross_heads",
            "regions",
            "shortcut",
            "gate",
            "activation",
            "places",
            "faithful_pads",
        ),
    ),
    "set_transformer": Sizes(
        features=columns(f"{_ENCODER}0.fc_k.weight", f"{_ENCODER}.fc_q.weight"),
        outputs=rows("classifier.weight"),
        options={
            "hidden": columns("classifier.weight"),
            "blocks": either(
                lambda shapes: count("encoder.*.mab0.fc_q.weight")(shapes) or None,
                count("encoder.*.mab.fc_q.weight"),
            ),
            "attention": has(f"{_ENCODER}0.fc_q.weight", "induced", "full"),
            "inducing": columns("encoder.0.inducing"),
            "seeds": columns("pooling.seeds"),
            "seed_blocks": count("decoder.*.fc_q.weight"),
            "layer_norm": has("pooling.mab.ln0.weight"),
        },
        untold=("heads",),
    ),
    "transmil": Sizes(
        features=columns("projection.weight"),
        outputs=rows("classifier.weight"),
        options={
            "hidden": rows("projection.weight"),
            "heads": rows("layers.0.taps"),
            # Half the width, as its authors have it.
            "landmarks": ratio(rows("projection.weight"), lambda shapes: 2),
            "taps": axis(2, "layers.0.taps"),
            "ppeg_sizes": lambda shapes: (
                tuple(
                    shape[2]
                    for name, shape in sorted(shapes.items())
                    if fnmatchcase(name, "ppeg.convs.*.weight")
                )
                or None
            ),
        },
        untold=("attention", "iterations", "ppeg", "faithful_pads", "faithful_start"),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """An original's weights in an aggregator of ours.

    Attributes:
        source: the original.
        features: the width of a tile's vector.
        outputs: the number of logits.
        options: all that are not None.
        told: those that the shapes say.
        assumed: those that nothing says, and that answers depend on.
        weights: under our names, in our shapes.
        regime: around the aggregator, with its options; None for none.
    """

    source: str
    aggregator: str
    features: int
    outputs: int
    options: Mapping[str, Any]
    told: tuple[str, ...]
    assumed: tuple[str, ...]
    weights: Mapping[str, Tensor]
    regime: Mapping[str, Any] | None = None

    @property
    def recipe(self) -> TrainSpec:
        """Return the recipe whose model the weights are of."""
        return _recipe(self.aggregator, self.options, self.regime)


def fit(
    source: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> Fitted:
    """Return an original's tensors as weights of ours.

    Args:
        source: name of the original.
        tensors: under its names; what all of these begin with, as `module.`, is taken off.
        settings: options of ours over all else.

    Raises:
        ConfigError: no such original, or tensors that do not fit it.
    """
    if source not in ORIGINALS:
        raise ConfigError(f"no original {source!r}{did_you_mean(source, tuple(ORIGINALS))}")
    original, settings = ORIGINALS[source], settings or {}
    theirs = without_prefix(original, tensors)
    gathered = original.gathered(source, theirs)
    sizes = SIZES.get(original.aggregator)
    if sizes is None:
        raise ConfigError(
            f"{source}: the sizes of aggregator {original.aggregator} are not read off its tensors "
            f"(known: {', '.join(SIZES)})"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in gathered.items()}
    of_aggregator = {name.removeprefix(_INNER): shape for name, shape in shapes.items()}
    read = {
        name: value
        for name, reading in sizes.options.items()
        if (value := reading(of_aggregator)) is not None
    }
    entry = aggregator_entry(original.aggregator)
    options = parse_spec(
        entry.options,
        {**original.options, **read, **settings},
        where=f"{source}: aggregator {original.aggregator}",
    )
    # Where the tensor that would tell is missing, any will do to find that out.
    features, outputs = sizes.features(of_aggregator) or 1, sizes.outputs(of_aggregator) or 1
    given = {name: value for name, value in options.model_dump().items() if value is not None}
    recipe = _recipe(original.aggregator, given, original.regime)
    ours = build_model(recipe, features, outputs).state_dict()
    _require_fit(source, original, shapes, {name: tuple(t.shape) for name, t in ours.items()})
    return Fitted(
        source=source,
        aggregator=original.aggregator,
        features=features,
        outputs=outputs,
        options=given,
        told=tuple(name for name in read if name not in settings),
        assumed=tuple(
            name
            for name in sizes.untold
            if name in given and name not in read and name not in settings
        ),
        weights=original.renamed(source, theirs, ours),
        regime=original.regime,
    )


def recognise(tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> Fitted:
    """Return the tensors as weights of the one original that they fit.

    Raises:
        ConfigError: they fit none, or several; says which, or which is nearest.
    """
    fitting: list[Fitted] = []
    faults: list[tuple[int, str]] = []
    for source, original in ORIGINALS.items():
        try:
            fitting.append(fit(source, tensors, settings))
        except ConfigError as error:
            theirs = without_prefix(original, tensors)
            faults.append((len(original.without_place(theirs)), str(error)))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(one.source for one in fitting)
        raise ConfigError(f"the tensors fit {names} alike; choose one with --from")
    strange, fault = min(faults)
    if strange > len(tensors) // 2:
        shown = ", ".join(list(tensors)[:_SHOWN])
        raise ConfigError(
            f"the tensors ({shown}, …) are of no original that is known here "
            f"({', '.join(sorted(ORIGINALS))})"
        )
    raise ConfigError(f"the tensors fit no original exactly; the nearest: {fault}")


def without_prefix(original: Original, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without what all their names begin with and the original's do not."""
    own = {name.partition(".")[0] for name in original.layers}
    found = dict(tensors)
    while True:
        heads = {name.partition(".")[0] for name in found}
        if len(heads) != 1 or heads <= own or not all("." in name for name in found):
            return found
        found = {name.partition(".")[2]: tensor for name, tensor in found.items()}


def _recipe(
    aggregator: str, options: Mapping[str, Any], regime: Mapping[str, Any] | None
) -> TrainSpec:
    values: dict[str, Any] = {"aggregator": {"name": aggregator, "options": dict(options)}}
    return TrainSpec.model_validate(values if regime is None else {**values, "regime": regime})


def _require_fit(source: str, original: Original, shapes: Shapes, ours: Shapes) -> None:
    """Refuse tensors that are not those of an aggregator, in the original's names."""
    said = original.their_name
    faults = [f"{said(name)} {ours[name]} is missing" for name in ours.keys() - shapes.keys()]
    faults += [
        f"{said(name)} {shapes[name]} has no place beside the others"
        for name in shapes.keys() - ours.keys()
    ]
    faults += [
        f"{said(name)} is {shapes[name]}, expected {ours[name]}"
        for name in sorted(ours.keys() & shapes.keys())
        if not _same_rows(shapes[name], ours[name])
    ]
    if faults:
        more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ConfigError(
            f"{source}: the weights are not those of aggregator {original.aggregator} with these "
            f"options: {'; '.join(sorted(faults)[:_SHOWN])}{more}"
        )


def _same_rows(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether one shape is the other with axes put together, and not another order."""
    borders, others = (set(accumulate((1, *shape), mul)) for shape in (one, other))
    return (borders <= others or others <= borders) and max(borders) == max(others)
