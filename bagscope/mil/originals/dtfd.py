"""DTFD-MIL, as its authors name the layers of one model, and of the four that they save it as."""

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
            "dim_reduction.fc1": "projection",
            **_tier("", "first"),
            **_tier("UClassifier.", "second"),
            **_tier("att_classifier.", "second"),
        },
        parts=frozenset({"dim_reduction", "attention", "classifier", "att_classifier"}),
    )
}
