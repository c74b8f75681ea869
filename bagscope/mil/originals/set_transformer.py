"""Set Transformer, as its authors name the layers."""

from __future__ import annotations

from bagscope.mil.originals.mapping import Original

_LINEAR = ("fc_q", "fc_k", "fc_v", "fc_o", "ln0", "ln1")


def _layers() -> dict[str, str]:
    blocks = {f"enc.*.{mab}": f"encoder.*.{mab}" for mab in ("mab", "mab0", "mab1")}
    blocks |= {"dec.0.mab": "pooling.mab", "dec.1.mab": "decoder.0", "dec.2.mab": "decoder.1"}
    layers = {
        f"{theirs}.{name}": f"{ours}.{name}" for theirs, ours in blocks.items() for name in _LINEAR
    }
    rows = {"enc.*.I": "encoder.*.inducing", "dec.0.S": "pooling.seeds"}
    return layers | rows | {"dec.3": "classifier"}


ORIGINALS: dict[str, Original] = {
    "set-transformer": Original(aggregator="set_transformer", layers=_layers())
}
