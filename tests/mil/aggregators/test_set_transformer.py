"""Set Transformer: its formulas written down plainly, its memory, what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64, normal

SMALL: dict[str, Any] = {"hidden": 16}
FEW: dict[str, Any] = {"inducing": 5}


def model_of(features: int = 12, **options: Any) -> Aggregator:
    torch.manual_seed(0)
    few = {} if options.get("attention") == "full" else FEW
    return build_aggregator("set_transformer", features, 2, {**SMALL, **few, **options}).eval()


def mab(state: dict[str, Tensor], name: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return MAB(Q, K) with four heads and its weights (4, m, n), as the paper writes it."""

    def layer(key: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.{key}.weight"].T + state[f"{name}.{key}.bias"]

    def norm(key: str, x: Tensor) -> Tensor:
        if f"{name}.{key}.weight" not in state:
            return x
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.{key}.weight"] + state[f"{name}.{key}.bias"]

    queries = layer("fc_q", q)
    keys, values = layer("fc_k", k), layer("fc_v", k)
    parts, weights = [], []
    for part in torch.arange(queries.shape[1]).chunk(4):
        scores = queries[:, part] @ keys[:, part].T / queries.shape[1] ** 0.5
        weights.append(scores.softmax(1))
        parts.append(queries[:, part] + weights[-1] @ values[:, part])
    o = norm("ln0", torch.cat(parts, 1))
    return norm("ln1", o + layer("fc_o", o).relu()), torch.stack(weights)


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": 3, "layer_norm": True},
        {"attention": "full", "blocks": 3, "seed_blocks": 1, "seeds": 2},
        {"seed_blocks": 0, "inducing": 40},
    ],
    ids=json.dumps,
)
def test_it_is_the_formulas(options: dict[str, Any]) -> None:
    model = model_of(**options).double()
    state = model.state_dict()
    bags = [normal(count, 12, seed=count, dtype=torch.float64) for count in (21, 1, 4)]
    found = model(Bags.of(bags))
    for bag, x in enumerate(bags):
        h = x
        for block in range(options.get("blocks", 2)):
            name = f"encoder.{block}"
            if options.get("attention") == "full":
                h, _ = mab(state, f"{name}.mab", h, h)
            else:
                rows, _ = mab(state, f"{name}.mab0", state[f"{name}.inducing"], h)
                h, _ = mab(state, f"{name}.mab1", h, rows)
        z, weights = mab(state, "pooling.mab", state["pooling.seeds"], h)
        for block in range(options.get("seed_blocks", 2)):
            z, _ = mab(state, f"decoder.{block}", z, z)
        logits = (z @ state["classifier.weight"].T + state["classifier.bias"]).mean(0)
        assert_close_to_float64(found.logits[bag], logits, rtol=1e-10, what="logits")
        scores = found.scores[sum(map(len, bags[:bag])) :][: len(x), 0]
        assert_close_to_float64(scores.exp(), weights.mean((0, 1)), rtol=1e-10, what="scores")


@pytest.mark.parametrize("attention", ["induced", "full"])
def test_nothing_kept_for_the_backward_pass_grows_with_the_square_of_a_bag(attention: str) -> None:
    model = model_of(attention=attention)
    tiles, sizes = 900, []

    def size_of(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(size_of, lambda tensor: tensor):
        found = model(Bags.of([normal(tiles, 12)]))
    found.logits.sum().backward()
    assert max(sizes) <= tiles * SMALL["hidden"]


def test_the_weights_of_a_tile_that_is_far_behind_are_told_apart() -> None:
    """The softmax gives both 0; the heatmap still has an order."""
    model = model_of(attention="full", blocks=1)
    with torch.no_grad():
        for parameter in model.get_submodule("pooling").parameters():
            parameter.mul_(12)
        scores = model(Bags.of([normal(60, 12, scale=4)])).scores
    behind = scores[scores < -104]
    assert bool(scores.isfinite().all()) and len(behind) > 10
    assert not bool(behind.exp().any()) and len(behind.unique()) == len(behind)


def test_heads_must_share_the_width() -> None:
    with pytest.raises(
        ConfigError, match=r"hidden is 18, no multiple of the 4 heads; change heads"
    ):
        model_of(hidden=18)


def test_inducing_rows_that_no_block_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"inducing is of attention induced.*leave it at 32"):
        model_of(attention="full", inducing=8)
