"""MambaMIL, as its authors name the layers."""

from __future__ import annotations

from bagscope.mil.originals.mapping import Original


def _layers() -> dict[str, str]:
    layers = {"_fc1.0": "projection", "norm": "norm", "attention.0": "v", "attention.2": "w"}
    layers |= {"classifier": "classifier", "layers.*.0": "norms.*"}
    theirs, ours = "layers.*.1", "mixers.*"
    layers |= {f"{theirs}.{name}": f"{ours}.{name}" for name in ("in_proj", "out_proj")}
    for core, end in enumerate(("", "_b")):
        own = f"{ours}.cores.{core}"
        for name in ("conv1d", "x_proj", "dt_proj"):
            layers[f"{theirs}.{name}{end}"] = f"{own}.{name}"
        layers |= {f"{theirs}.A{end}_log": f"{own}.A_log", f"{theirs}.D{end}": f"{own}.D"}
    return layers


ORIGINALS: dict[str, Original] = {"mambamil": Original(aggregator="mambamil", layers=_layers())}
