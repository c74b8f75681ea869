"""DTFD-MIL, as its authors name the layers."""

from __future__ import annotations

from bagscope.mil.originals.mapping import Original


def _tier(theirs: str, ours: str) -> dict[str, str]:
    attention = f"{theirs}attention.attention"
    return {
        f"{attention}_V.0": f"{ours}.v",
        f"{attention}_U.0": f"{ours}.u",
        f"{attention}_weights": f"{ours}.w",
        f"{theirs}classifier.fc": f"{ours}.classifier",
    }


ORIGINALS: dict[str, Original] = {
    "dtfd": Original(
        aggregator="dtfd",
        layers={
            "dimReduction.fc1": "projection",
            **_tier("", "first"),
            **_tier("UClassifier.", "second"),
        },
    )
}
