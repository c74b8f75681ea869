"""ABMIL says what its formula says, and its dropout can be drawn again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64, normal

LENGTHS = (5, 1, 33)


def bags(**changes: object) -> Bags:
    made = Bags.of([normal(n, 12, seed=n) for n in LENGTHS], bag_ids=("a", "b", "c"), seed=1)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("gate", ["tanh", "relu"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_formula(gated: bool, gate: str, activation: str) -> None:
    torch.manual_seed(0)
    options = {"hidden": 9, "attention": 4, "gated": gated, "gate": gate, "activation": activation}
    model = build_aggregator("abmil", 12, 3, options).eval()
    found = model(bags())
    weights = {name: value.double() for name, value in model.state_dict().items()}

    def layer(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for bag in range(len(LENGTHS)):
        x = bags().one(bag).features.double()
        h = getattr(torch.nn.functional, activation)(layer(x, "attention.projection"))
        hidden = getattr(torch, gate)(layer(h, "attention.v"))
        if gated:
            hidden = hidden * layer(h, "attention.u").sigmoid()
        weight = layer(hidden, "attention.w").softmax(0)
        pooled = (weight * h).sum(0)
        assert_close_to_float64(found.embedding[bag], pooled)
        assert_close_to_float64(found.logits[bag], layer(pooled, "classifier"))
        assert found.entropy is not None
        assert_close_to_float64(found.entropy[bag], -(weight * weight.log()).sum(0), atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_without_a_projection_the_tiles_themselves_are_pooled(gated: bool) -> None:
    torch.manual_seed(0)
    options = {"projection": False, "attention": 4, "gated": gated, "attention_dropout": 0.25}
    model = build_aggregator("abmil", 12, 3, options).eval()
    assert not any("projection" in name for name in model.state_dict())
    found = model(bags())
    for bag in range(len(LENGTHS)):
        one = bags().one(bag)
        weight = model(one).scores.softmax(0)
        assert_close_to_float64(found.embedding[bag], (weight * one.features).sum(0))
    model.train()(bags()).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_options_of_a_projection_that_is_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="activation belongs to the projection"):
        build_aggregator("abmil", 12, 3, {"projection": False, "activation": "gelu"})
    build_aggregator("abmil", 12, 3, {"projection": False, "dropout": 0.0})


def test_dropout_belongs_to_seed_and_step() -> None:
    torch.manual_seed(0)
    options = {"hidden": 32, "dropout": 0.5, "attention_dropout": 0.5}
    model = build_aggregator("abmil", 12, 3, options).train()
    first, again = model(bags()).logits, model(bags()).logits
    assert torch.equal(first, again)
    assert not torch.equal(first, model(bags(step=1)).logits)
    assert not torch.equal(first, model(bags(seed=2)).logits)
    assert torch.equal(model.eval()(bags()).logits, model(bags(step=1)).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_bags_give_gradients_in_full(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build_aggregator("abmil", 12, 3, {"hidden": 32})
    model(bags().to("cpu", dtype)).logits.sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert {grad.dtype for grad in grads if grad is not None} == {torch.float32}
    assert None not in grads
