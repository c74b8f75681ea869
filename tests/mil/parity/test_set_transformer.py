"""Set Transformer with its original's weights gives the original's outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.mil.aggregators.set_layers import ISAB, MAB, PMA, SAB
from tests.kernels.packed import assert_close_to_float64, vectors
from tests.mil.parity.recorded import RELATIVE, ZERO, Recorded


def test_the_whole_model() -> None:
    options = {
        "hidden": "=dim",
        "heads": "=heads",
        "inducing": "=inducing",
        "layer_norm": "=layer_norm",
    }
    recorded = Recorded("set-transformer_full_A", "set-transformer", options)
    output = recorded.output()
    recorded.compare(logits=output.logits, attention=output.scores.softmax(0).T)
    # The scores are the logarithm of the weights themselves, not only up to a constant.
    recorded.compare(attention=output.scores.exp().T)
    recorded.compare_gradients(functional.cross_entropy(output.logits, recorded.label))


Call = Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]
LAYERS: dict[str, tuple[Callable[[dict[str, Any]], nn.Module], Call]] = {
    "mab": (
        lambda c: MAB(c["dim"], c["dim"], c["dim"], c["heads"], is_normed=c["layer_norm"]),
        lambda layer, x, _, tensors: layer.gather(x, tensors["input/keys"], borders(19))[0],
    ),
    "sab": (
        lambda c: SAB(c["dim"], c["dim"], c["heads"], is_normed=c["layer_norm"]),
        lambda layer, x, cu, _: layer(x, cu),
    ),
    "isab": (
        lambda c: ISAB(c["dim"], c["dim"], c["heads"], c["inducing"], is_normed=c["layer_norm"]),
        lambda layer, x, cu, _: layer(x, cu),
    ),
    "pma": (
        lambda c: PMA(c["dim"], c["heads"], c["seeds"], is_normed=c["layer_norm"]),
        lambda layer, x, cu, _: layer(x, cu)[0][0],
    ),
}
OURS = {"I": "inducing", "S": "seeds"}


def borders(tiles: int) -> Tensor:
    return torch.tensor([0, tiles], dtype=torch.int32)


@pytest.mark.parametrize("end", ["", "-ln"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer(kind: str, end: str) -> None:
    tensors, meta = vectors(f"set-transformer_{kind}{end}_A")
    build, call = LAYERS[kind]
    check_layer(build(meta["config"]), call, tensors)


@pytest.mark.parametrize("end", ["", "-ln"])
def test_few_rows_among_themselves_are_the_same_as_tiles_of_a_bag(end: str) -> None:
    tensors, meta = vectors(f"set-transformer_sab{end}_A")
    layer = LAYERS["sab"][0](meta["config"])
    check_layer(layer, lambda layer, x, _, __: layer.mab.between_rows(x[None])[0], tensors)


@pytest.mark.parametrize("end", ["", "-ln"])
def test_tiles_that_ask_rows_are_the_same_as_rows_that_ask_tiles(end: str) -> None:
    tensors, meta = vectors(f"set-transformer_mab{end}_A")
    layer = LAYERS["mab"][0](meta["config"])
    check_layer(layer, lambda layer, x, cu, t: layer.tell(x, t["input/keys"][None], cu), tensors)


def check_layer(layer: nn.Module, call: Call, tensors: dict[str, Tensor]) -> None:
    """Compare a layer's output, and the gradients of its product with the cotangent."""
    ours = layer.state_dict()
    found = {
        OURS.get(name, name): value.reshape(ours[OURS.get(name, name)].shape)
        for key, value in tensors.items()
        if (name := key.removeprefix("weights/")) != key
    }
    layer.load_state_dict(found)
    x = tensors["input/x"].clone().requires_grad_()
    out = call(layer, x, borders(len(x)), tensors)
    assert_close_to_float64(out, tensors["output/out"], rtol=RELATIVE, atol=ZERO, what="out")
    (out * tensors["input/cotangent"]).sum().backward()
    grads = {OURS.get(name, name): value.grad for name, value in layer.named_parameters()}
    grads["x"] = x.grad
    compared = 0
    for key, wanted in tensors.items():
        if (name := key.removeprefix("grad/")) != key:
            grad = grads[OURS.get(name, name)]
            assert grad is not None, name
            assert_close_to_float64(
                grad.reshape(wanted.shape), wanted, rtol=RELATIVE, atol=ZERO, what=name
            )
            compared += 1
    assert compared >= len(found)
