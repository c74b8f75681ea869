"""TransMIL, as its authors name the layers."""

from __future__ import annotations

from bagscope.mil.originals.mapping import Original


def _layers() -> dict[str, str]:
    layers = {"_fc1.0": "projection", "cls_token": "class_token", "norm": "norm"}
    for number in (1, 2):
        theirs, ours = f"layer{number}", f"layers.{number - 1}"
        layers |= {f"{theirs}.norm": f"{ours}.norm", f"{theirs}.attn.to_qkv": f"{ours}.qkv"}
        layers |= {f"{theirs}.attn.to_out.0": f"{ours}.out"}
        layers |= {f"{theirs}.attn.res_conv.weight": f"{ours}.taps"}
    for place, name in enumerate(("proj", "proj1", "proj2")):
        layers[f"pos_layer.{name}"] = f"ppeg.convs.{place}"
    return layers | {"_fc2": "classifier"}


ORIGINALS: dict[str, Original] = {
    "transmil": Original(
        aggregator="transmil",
        layers=_layers(),
        options={"faithful_pads": True, "faithful_start": True},
    )
}
