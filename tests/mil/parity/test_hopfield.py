"""Hopfield pooling with its original's weights gives the original's outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.originals import from_original
from tests.kernels.packed import assert_close_to_float64, normal, vectors
from tests.mil.parity.recorded import RELATIVE, ZERO

SOURCE = "hopfield-pooling"


@pytest.mark.parametrize("variant", ["one-step", "three-updates", "early-stop", "beta-two-queries"])
def test_hopfield(variant: str) -> None:
    tensors, meta = vectors(f"hopfield-pooling_{variant}_A")
    config = meta["config"]
    options = {
        "hidden": config["hidden_size"],
        "heads": config["num_heads"],
        "states": config["quantity"],
        "beta": config["beta"],
        "update_steps": config["update_steps_max"],
        "update_eps": config["update_steps_eps"],
        "dropout": config["dropout"],
    }
    x = tensors["input/x"].clone().requires_grad_()
    model = build_aggregator("hopfield", x.shape[1], 1, options)
    # What is recorded is the pooling alone: its classifier is ours, and is not compared.
    head = {f"classifier.{name}": value for name, value in model.classifier.state_dict().items()}
    theirs = {
        name: value
        for key, value in tensors.items()
        if (name := key.removeprefix("weights/")) != key
    }
    model.load_state_dict(from_original(SOURCE, theirs | head, model.state_dict()))
    # A second bag would change what a batch of the original does; ours stops for each alone.
    output = model(Bags.of([x, normal(5, x.shape[1])]))

    wanted = tensors["output/out"]
    assert_close_to_float64(output.embedding[0], wanted, rtol=RELATIVE, atol=ZERO, what="out")
    mean = tensors["output/association"].mean((0, 1))
    found = output.scores[: len(x), 0].exp()
    assert_close_to_float64(found, mean, rtol=RELATIVE, what="association")
    loss = (output.embedding[0] * tensors["input/cotangent"]).sum()
    assert_close_to_float64(loss, tensors["output/loss_total"], rtol=RELATIVE, atol=ZERO)
    loss.backward()
    grads = {name: tensors[f"grad/{name}"] for name in theirs}
    empty = {name: torch.zeros_like(value) for name, value in head.items()}
    renamed = from_original(SOURCE, grads | empty, model.state_dict())
    for name, parameter in model.named_parameters():
        if not name.startswith("classifier"):
            assert parameter.grad is not None, name
            assert_close_to_float64(
                parameter.grad, renamed[name], rtol=RELATIVE, atol=ZERO, what=name
            )
    assert x.grad is not None
    assert_close_to_float64(x.grad, tensors["grad/x"], rtol=RELATIVE, atol=ZERO, what="x")
