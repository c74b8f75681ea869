"""Hopfield pooling: its formulas written down plainly, its dropout, what its tiles add up to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.explain.pools import attention_terms
from tests.kernels.packed import assert_close_to_float64, normal

SMALL: dict[str, Any] = {"hidden": 4, "heads": 2, "states": 3, "dropout": 0.0}
COUNTS = (21, 1, 4)


def model_of(**options: Any) -> Aggregator:
    """Return one whose states and norms are not where they start."""
    torch.manual_seed(0)
    model = build_aggregator("hopfield", 12, 2, {**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model.eval()


def plainly(state: dict[str, Tensor], x: Tensor, beta: float, steps: int) -> tuple[Tensor, Tensor]:
    """Return the logits of one bag and ξ (heads, states, tiles), head by head."""

    def norm(key: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{key}.weight"] + state[f"{key}.bias"]

    inputs = (norm("norm_state", state["states"]), norm("norm_key", x), norm("norm_value", x))
    weights, biases = state["qkv.weight"].chunk(3), state["qkv.bias"].chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip(inputs, weights, biases, strict=True))
    pooled, associations = [], []
    for head in torch.arange(8).chunk(2):
        asked = q[:, head]
        for _ in range(steps):
            asked = (beta * asked @ k[:, head].T).softmax(1) @ k[:, head]
        associations.append((beta * asked @ k[:, head].T).softmax(1))
        pooled.append(associations[-1] @ v[:, head])
    z = torch.cat(pooled, 1) @ state["out.weight"].T + state["out.bias"]
    logits = z.flatten() @ state["classifier.weight"].T + state["classifier.bias"]
    return logits, torch.stack(associations)


@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 2.5}, {"update_steps": 2, "update_eps": 0.0}],
    ids=json.dumps,
)
def test_it_is_the_formulas(options: dict[str, Any]) -> None:
    model = model_of(**options).double()
    bags = [normal(count, 12, seed=count, dtype=torch.float64) for count in COUNTS]
    found = model(Bags.of(bags))
    for bag, x in enumerate(bags):
        beta, steps = options.get("beta", 0.5), options.get("update_steps", 0)
        logits, association = plainly(model.state_dict(), x, beta, steps)
        assert_close_to_float64(found.logits[bag], logits, rtol=1e-10, what="logits")
        scores = found.scores[sum(COUNTS[:bag]) :][: len(x), 0]
        assert_close_to_float64(scores.exp(), association.mean((0, 1)), rtol=1e-10)


def test_a_tile_s_share_is_its_own_unless_states_move() -> None:
    bags = Bags.of([normal(40, 12)])
    assert attention_terms(model_of(), bags) is not None
    assert attention_terms(model_of(update_steps=3, beta=2.0), bags) is None


def test_dropout_is_of_the_association_and_right_in_the_mean() -> None:
    model, whole = model_of(dropout=0.5), model_of()
    bags = Bags.of([normal(9, 12), normal(1, 12, seed=1)])
    model.train()
    draws = torch.stack(
        [model(Bags.of(list(bags.features.split([9, 1])), step=step)).logits for step in range(300)]
    ).detach()
    spread = draws.std(0) / 300**0.5
    assert bool(((draws.mean(0) - whole(bags).logits).abs() < 5 * spread).all())
    # A bag of one tile whose only weight is dropped in all heads and states is left with the bias.
    bias = whole.pooling_terms(bags).bias
    assert bool((draws[:, 1] - bias).abs().amax(1).lt(1e-5).any())
