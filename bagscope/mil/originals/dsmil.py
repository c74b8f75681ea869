"""DSMIL, as its authors name the layers, and PackMIL, which puts a projection before it."""

from __future__ import annotations

from bagscope.mil.originals.mapping import Original


def _streams(instance: str, within: str = "") -> dict[str, str]:
    bag = f"{within}b_classifier"
    return {
        f"{within}i_classifier.{instance}": "instance",
        f"{bag}.q": "query",
        f"{bag}.q.0": "query",
        f"{bag}.q.2": "query_out",
        f"{bag}.v.1": "value",
        f"{bag}.fcc": "classifier",
    }


ORIGINALS: dict[str, Original] = {
    "dsmil": Original(aggregator="dsmil", layers=_streams("fc.0")),
    "packmil-dsmil": Original(
        aggregator="dsmil",
        layers={"embed.0": "projection", **_streams("0", "aggregate.")},
        # Of the model that it is part of; DSMIL has a classifier of its own.
        left_out=frozenset({"classifier.weight", "classifier.bias"}),
        options={"activation": "gelu"},
    ),
}
