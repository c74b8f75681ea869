"""PackMIL, as its authors name the layers: attention pooling, and the regime around it."""

from __future__ import annotations

from collections.abc import Mapping

from bagscope.mil.originals.mapping import Original

_POOLING = {
    "embed.0": "attention.projection",
    "aggregate.attention.0": "attention.v",
    "aggregate.attention.2": "attention.w",
}
DOWNSAMPLER: Mapping[str, str] = {
    "attention.0": "v",
    "attention.2": "w",
    "embed.0": "embed",
    "downsample": "out",
}

ORIGINALS: dict[str, Original] = {
    "packmil-packed": Original(aggregator="abmil", layers={**_POOLING, "classifier": "classifier"}),
    # Ours are those of the regime around it.
    "packmil": Original(
        aggregator="abmil",
        layers={
            **{f"mil.{theirs}": f"inner.{ours}" for theirs, ours in _POOLING.items()},
            **{
                f"downsampler.{theirs}": f"downsampler.{ours}"
                for theirs, ours in DOWNSAMPLER.items()
            },
            "predictor": "inner.classifier",
        },
    ),
    "packmil-ads": Original(aggregator="abmil", layers=DOWNSAMPLER),
}
