"""Weights of the original implementations, loaded into aggregators of ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.originals import (
    dsmil,
    dtfd,
    hopfield,
    ilra,
    mambamil,
    packmil,
    pooling,
    rrt,
    set_transformer,
    transmil,
)
from bagscope.mil.originals.mapping import Original
from bagscope.specs import did_you_mean

ORIGINALS: Mapping[str, Original] = MappingProxyType(
    pooling.ORIGINALS
    | dsmil.ORIGINALS
    | dtfd.ORIGINALS
    | hopfield.ORIGINALS
    | ilra.ORIGINALS
    | mambamil.ORIGINALS
    | packmil.ORIGINALS
    | rrt.ORIGINALS
    | set_transformer.ORIGINALS
    | transmil.ORIGINALS
)

PARTS: frozenset[frozenset[str]] = frozenset(
    original.parts for original in ORIGINALS.values() if original.parts
)
"""Keys of the state dicts that are one model where a checkpoint has them side by side."""


def from_original(
    source: str, tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an original's tensors under our names (see `Original.renamed`).

    Raises:
        ConfigError: no such original, or tensors that do not fit.
    """
    if source not in ORIGINALS:
        raise ConfigError(f"no original {source!r}{did_you_mean(source, tuple(ORIGINALS))}")
    return ORIGINALS[source].renamed(source, tensors, ours)
