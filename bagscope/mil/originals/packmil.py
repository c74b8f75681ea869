"""PackMIL, as its authors name the layers: attention pooling, and the regime around it.

A checkpoint without a downsampler is attention pooling, which needs no regime to predict. With a
downsampler, tiles pass through it before they are pooled; how many it makes one of in training, and
how, no tensor tells and no prediction depends on.
"""

from __future__ import annotations

from collections.abc import Mapping

from bagscope.mil.originals.mapping import Original

_POOLING: Mapping[str, str] = {
    "embed.0": "attention.projection",
    "aggregate.attention.0": "attention.v",
    "aggregate.attention.2": "attention.w",
}
_DOWNSAMPLER: Mapping[str, str] = {
    "attention.0": "v",
    "attention.2": "w",
    "embed.0": "embed",
    "downsample": "out",
}


def _around(theirs: str, ours: str, layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}{name}": f"{ours}{own}" for name, own in layers.items()}


DOWNSAMPLER = Original(aggregator="abmil", layers=_DOWNSAMPLER)
REGIME = Original(
    aggregator="abmil",
    layers={
        **_around("mil.", "inner.", _POOLING),
        **_around("downsampler.", "downsampler.", _DOWNSAMPLER),
        "predictor": "inner.classifier",
    },
    options={"activation": "gelu"},
    regime={"name": "packmil", "options": {"downsampler": "random", "r": 4}},
)
ORIGINALS: dict[str, Original] = {
    "packmil": Original(
        aggregator="abmil",
        layers={**_around("mil.", "", _POOLING), "predictor": "classifier"},
        options={"activation": "gelu"},
    ),
    "packmil-downsampler": REGIME,
    "packmil-packed": Original(
        aggregator="abmil",
        layers={**_POOLING, "classifier": "classifier"},
        options={"activation": "gelu"},
    ),
}
