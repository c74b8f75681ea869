"""From the names that an original implementation gives its layers to ours.

A `*` in a name of theirs stands for a number. Where ours has one too, it is the same number; where
ours has none, their layers are a list whose members, in order, are laid one under the other in one
layer of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bagscope.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """Where an original's layers go.

    Attributes:
        aggregator: ours that they are loaded into.
        layers: their names to ours; both stand for all tensors of a layer (theirs "x.weight" is
            ours "y.weight"; ours "y_" makes it "y_weight"), or for a single tensor.
        left_out: tensors of theirs that hold nothing learned.
    """

    aggregator: str
    layers: Mapping[str, str]
    left_out: frozenset[str] = frozenset()

    def renamed(
        self, source: str, tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return an original's tensors under our names and in our shapes.

        They may be parameters, or the gradients of parameters.

        Args:
            source: name of the original, for errors.
            tensors: under their names.
            ours: the state dict of our aggregator.

        Raises:
            ConfigError: a tensor that has no place here, or one of ours that nothing fills.
        """
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for name, tensor in tensors.items():
            if name not in self.left_out:
                target, place = self._place(source, name)
                parts.setdefault(target, []).append((place, tensor))
        if parts.keys() != ours.keys():
            missing = sorted(ours.keys() - parts.keys()) + sorted(parts.keys() - ours.keys())
            raise ConfigError(
                f"{source}: the tensors do not fit aggregator {self.aggregator}; unmatched are "
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

    def _place(self, source: str, name: str) -> tuple[str, int]:
        """Return our tensor that one of theirs belongs into, and its place among the members."""
        layer, _, kind = name.rpartition(".")
        for theirs, ours in self.layers.items():
            pattern = re.escape(theirs).replace(r"\*", r"(\d+)")
            for whole, end in ((name, ""), (layer, kind)):
                if match := re.fullmatch(pattern, whole):
                    number = match[1] if match.groups() else "0"
                    target = ours.replace("*", number)
                    joint = "." if end and not target.endswith("_") else ""
                    return f"{target}{joint}{end}", 0 if "*" in ours else int(number)
        raise ConfigError(f"{source}: {name} has no place in aggregator {self.aggregator}")
