"""From the names that an original implementation gives its layers to ours.

A `*` in a name of theirs stands for a number. Where ours has one too, it is the same number; where
ours has none, their layers are a list whose members, in order, are laid one under the other in one
layer of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bagscope.errors import ConfigError

_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """Where an original's layers go.

    Attributes:
        aggregator: ours that they are loaded into.
        layers: their names to ours; both stand for all tensors of a layer (theirs "x.weight" is
            ours "y.weight"; ours "y_" makes it "y_weight"), or for a single tensor.
        left_out: tensors of theirs that hold nothing learned.
        options: of ours that its authors chose and that no tensor's shape tells.
        regime: around the aggregator, which is its `inner`, with its options; None for none.
        parts: keys of the state dicts that its authors save it as, where they are several.
    """

    aggregator: str
    layers: Mapping[str, str]
    left_out: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    regime: Mapping[str, Any] | None = None
    parts: frozenset[str] = frozenset()

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
        gathered = self.gathered(source, tensors)
        if gathered.keys() != ours.keys():
            missing = sorted(ours.keys() - gathered.keys()) + sorted(gathered.keys() - ours.keys())
            raise ConfigError(
                f"{source}: the tensors do not fit aggregator {self.aggregator}; unmatched are "
                f"{', '.join(missing)}, so check its options"
            )
        found = {}
        for target, joined in gathered.items():
            if joined.numel() != ours[target].numel():
                raise ConfigError(
                    f"{source}: {target} is {tuple(joined.shape)}, and ours is "
                    f"{tuple(ours[target].shape)}; give the aggregator the original's widths"
                )
            found[target] = joined.reshape(ours[target].shape)
        return found

    def gathered(self, source: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an original's tensors under our names; the members of a list are one tensor.

        Raises:
            ConfigError: a tensor that has no place here.
        """
        if strange := self.without_place(tensors):
            shown = ", ".join(strange[:_SHOWN])
            more = f" (and {len(strange) - _SHOWN} more)" if len(strange) > _SHOWN else ""
            have = "has" if len(strange) == 1 else "have"
            raise ConfigError(
                f"{source}: {shown}{more} {have} no place in aggregator {self.aggregator}"
            )
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for name, tensor in tensors.items():
            if name not in self.left_out and (found := self._place(name)):
                parts.setdefault(found[0], []).append((found[1], tensor))
        gathered = {}
        for target, members in parts.items():
            listed = [tensor for _, tensor in sorted(members, key=lambda part: part[0])]
            if len({tensor.shape[1:] for tensor in listed}) > 1:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in listed)
                raise ConfigError(f"{source}: the tensors of {target} are {shapes}; they differ")
            gathered[target] = torch.cat(listed) if len(listed) > 1 else listed[0]
        return gathered

    def without_place(self, names: Iterable[str]) -> list[str]:
        """Return those of an original's tensors that have no place here."""
        return [name for name in names if name not in self.left_out and self._place(name) is None]

    def their_name(self, ours: str) -> str:
        """Return what an original calls a tensor of ours, the first of a list."""
        for theirs, target in self.layers.items():
            pattern = re.escape(target).replace(r"\*", r"(?P<number>\d+)")
            match = re.fullmatch(rf"{pattern}(?P<end>\.\w+|(?<=_)\w+)?", ours)
            if match:
                number = match.groupdict().get("number", "0")
                end = (match["end"] or "").lstrip(".")
                return theirs.replace("*", number) + (f".{end}" if end else "")
        return ours

    def _place(self, name: str) -> tuple[str, int] | None:
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
        return None
