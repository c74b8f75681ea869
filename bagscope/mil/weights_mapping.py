"""The names that the original implementations give to what is ours under other names.

A layer `a.*.b` of theirs is a list: its members, in the order of their numbers, are laid one under
the other in one layer of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.specs import did_you_mean

_ATTENTION = ("attention.projection", "attention.v", "attention.u", "attention.w", "classifier")
_BRANCHED = tuple(f"branches.{name}" for name in _ATTENTION[:4])


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """Where an original's layers go.

    Attributes:
        aggregator: ours that they are loaded into.
        layers: their names to ours; both stand for weight and bias.
        left_out: tensors of theirs that hold nothing learned.
    """

    aggregator: str
    layers: Mapping[str, str]
    left_out: frozenset[str] = frozenset()


def _attention(projection: str, v: str, u: str | None, w: str, classifier: str) -> Original:
    theirs = (projection, v, u, w, classifier)
    pairs = zip(theirs, _ATTENTION, strict=True)
    return Original(aggregator="abmil", layers={name: ours for name, ours in pairs if name})


def _clam(aggregator: str, classifier: str) -> Original:
    net = "attention_net.3.attention"
    theirs = ("attention_net.0", f"{net}_a.0", f"{net}_b.0", f"{net}_c", classifier)
    return Original(
        aggregator=aggregator,
        layers={
            **dict(zip(theirs, _ATTENTION, strict=True)),
            "instance_classifiers.*": "instance_loss.classifier",
        },
        left_out=frozenset({"instance_loss_fn.labels"}),
    )


_MOST_LAYERS = 8


def _mambamil() -> dict[str, str]:
    layers = {"_fc1.0": "projection", "norm": "norm", "attention.0": "v", "attention.2": "w"}
    layers |= {"classifier": "classifier"}
    for number in range(_MOST_LAYERS):
        theirs, ours = f"layers.{number}", f"mixers.{number}"
        layers |= {f"{theirs}.0": f"norms.{number}"}
        layers |= {f"{theirs}.1.{name}": f"{ours}.{name}" for name in ("in_proj", "out_proj")}
        for core, end in enumerate(("", "_b")):
            own = f"{ours}.cores.{core}"
            names = ("conv1d", "x_proj", "dt_proj")
            layers |= {f"{theirs}.1.{name}{end}": f"{own}.{name}" for name in names}
            layers |= {f"{theirs}.1.A{end}_log": f"{own}.A_log", f"{theirs}.1.D{end}": f"{own}.D"}
    return layers


_GATES = ("attention.attention_V.0", "attention.attention_U.0", "attention.attention_weights")
_HEADS = {"classifier.*.fc": "branch_classifier", "Slide_classifier.fc": "classifier"}
_MHIM = "online_encoder.attention.attention"
_HIPPO = "attention_weights"

ORIGINALS: Mapping[str, Original] = MappingProxyType(
    {
        "acmil-ga": Original(
            aggregator="acmil",
            layers={**dict(zip(("dimreduction.fc1", *_GATES), _BRANCHED, strict=True)), **_HEADS},
        ),
        "acmil-mha": Original(
            aggregator="acmil",
            layers={
                "dimreduction.fc1": "branches.projection",
                "q": "branches.scores.query",
                "sub_attention.*.q_proj": "branches.scores.ask",
                "sub_attention.*.k_proj": "branches.scores.key",
                "sub_attention.*.v_proj": "branches.each.value",
                "sub_attention.*.out_proj": "branches.each.out",
                "sub_attention.*.layer_norm": "branches.each.norm",
                "bag_attention.v_proj": "branches.together.value",
                "bag_attention.out_proj": "branches.together.out",
                "bag_attention.layer_norm": "branches.together.norm",
                **_HEADS,
            },
        ),
        "aem-abmil": _attention("dimreduction.fc1", *_GATES, "classifier.fc"),
        "clam-mb": _clam("clam_mb", "classifiers.*"),
        "clam-sb": _clam("clam_sb", "classifiers"),
        "hippo-gated": _attention(
            "encoder.0",
            f"{_HIPPO}.attention_V.0",
            f"{_HIPPO}.attention_U.0",
            f"{_HIPPO}.attention_weights",
            "head",
        ),
        "hippo-tanh": _attention("encoder.0", f"{_HIPPO}.0", None, f"{_HIPPO}.2", "head"),
        "mambamil": Original(aggregator="mambamil", layers=_mambamil()),
        "mambamil-max": Original(
            aggregator="max",
            layers={"head.0": "network.projection", "head.3": "network.classifier"},
        ),
        "mambamil-mean": Original(
            aggregator="mean",
            layers={"head.0": "network.projection", "head.3": "network.classifier"},
        ),
        "mhim-abmil": _attention("feature.0", f"{_MHIM}.0", None, f"{_MHIM}.2", "predictor"),
        "millab-gated": _attention(
            "patch_embed.0",
            "global_attn.attention_a.0",
            "global_attn.attention_b.0",
            "global_attn.attention_c",
            "classifier",
        ),
        "millab-tanh": _attention(
            "patch_embed.0", "global_attn.module.0", None, "global_attn.module.3", "classifier"
        ),
        "mnist-gated": _attention(
            "feature_extractor_part2.0",
            "attention_V.0",
            "attention_U.0",
            "attention_w",
            "classifier.0",
        ),
        "mnist-tanh": _attention(
            "feature_extractor_part2.0", "attention.0", None, "attention.2", "classifier.0"
        ),
        "packmil-abmil": _attention("feature.0", "attention.0", None, "attention.2", "classifier"),
    }
)


def from_original(
    source: str, tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an original's tensors under our names and in our shapes.

    They may be parameters, or the gradients of parameters.

    Args:
        source: one of `ORIGINALS`.
        tensors: under their names.
        ours: the state dict of our aggregator.

    Raises:
        ConfigError: a tensor that has no place here, or one of ours that nothing fills.
    """
    if source not in ORIGINALS:
        raise ConfigError(f"no original {source!r}{did_you_mean(source, tuple(ORIGINALS))}")
    original = ORIGINALS[source]
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        if name not in original.left_out:
            target, place = _place(source, name)
            parts.setdefault(target, []).append((place, tensor))
    if parts.keys() != ours.keys():
        missing = sorted(ours.keys() - parts.keys()) + sorted(parts.keys() - ours.keys())
        raise ConfigError(
            f"{source}: the tensors do not fit aggregator {original.aggregator}; unmatched are "
            f"{', '.join(missing)}, so check its options"
        )
    found = {}
    for target, members in parts.items():
        joined = torch.cat([tensor for _, tensor in sorted(members, key=lambda part: part[0])])
        if joined.numel() != ours[target].numel():
            raise ConfigError(
                f"{source}: {target} is {tuple(joined.shape)}, and ours is "
                f"{tuple(ours[target].shape)}; give the aggregator the original's widths"
            )
        found[target] = joined.reshape(ours[target].shape)
    return found


def _place(source: str, name: str) -> tuple[str, int]:
    """Return our tensor that one of theirs belongs into, and its place among the members."""
    layers = ORIGINALS[source].layers
    if name in layers:
        return layers[name], 0
    layer, _, kind = name.rpartition(".")
    for theirs, ours in layers.items():
        pattern = re.escape(theirs).replace(r"\*", r"(\d+)")
        if match := re.fullmatch(pattern, layer):
            joint = "_" if ours.endswith(".norm") else "."
            return f"{ours}{joint}{kind}", int(match[1]) if match.groups() else 0
    raise ConfigError(f"{source}: {name} has no place in aggregator {ORIGINALS[source].aggregator}")
