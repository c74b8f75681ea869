"""Attentive probing: its formulas written down plainly, and what its kinds have in common."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
import torch

from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.explain.pools import attention_terms
from tests.kernels.packed import assert_close_to_float64, normal

KINDS = [
    {"queries": queries, "scored": scored, "pooled": pooled}
    for queries, scored, pooled in product((3, 5, 20), ("all", "group"), ("all", "group"))
]


def model_of(**options: Any) -> Aggregator:
    torch.manual_seed(0)
    model = build_aggregator("attentive_probe", 12, 2, options).eval().double()
    with torch.no_grad():
        model.get_parameter("queries").normal_(std=2.0)
    return model


@pytest.mark.parametrize("options", KINDS, ids=json.dumps)
def test_it_is_the_formulas(options: dict[str, Any]) -> None:
    model, count = model_of(**options), options["queries"]
    width = -(-12 // count)
    groups = [slice(width * query, width * (query + 1)) for query in range(count)]
    state = model.state_dict()
    bags = [normal(tiles, 12, seed=tiles, dtype=torch.float64) for tiles in (9, 1, 40)]
    found = model(Bags.of(bags))
    at = 0
    for bag, x in enumerate(bags):
        pooled, weights = [], []
        for query, group in zip(state["queries"], groups, strict=True):
            seen = x if options["scored"] == "all" else x[:, group]
            own = query[: seen.shape[1]]
            weights.append((seen @ own / len(query) ** 0.5).softmax(0))
            pooled.append(weights[-1] @ (x if options["pooled"] == "all" else x[:, group]))
        z = torch.cat(pooled)
        logits = state["classifier.weight"] @ z + state["classifier.bias"]
        assert_close_to_float64(found.embedding[bag], z, rtol=1e-12, what="z")
        assert_close_to_float64(found.logits[bag], logits, rtol=1e-12, what="logits")
        mean = torch.stack(weights).mean(0)
        assert_close_to_float64(found.scores[at : at + len(x), 0].exp(), mean, rtol=1e-12)
        at += len(x)


def test_one_query_is_the_same_in_every_kind() -> None:
    bags = Bags.of([normal(9, 12).double()])
    logits = [
        model_of(queries=1, scored=scored, pooled=pooled)(bags).logits
        for scored, pooled in product(("all", "group"), repeat=2)
    ]
    assert all(torch.equal(logits[0], other) for other in logits)


@pytest.mark.parametrize("options", KINDS[:4], ids=json.dumps)
def test_a_tile_s_share_is_its_own(options: dict[str, Any]) -> None:
    assert attention_terms(model_of(**options), Bags.of([normal(30, 12)])) is not None


def test_normalised_tiles_have_no_scale() -> None:
    x = normal(9, 12).double()
    model = model_of(layer_norm=True)
    one, other = model(Bags.of([x])), model(Bags.of([1000 * x + 7]))
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
    plain = model_of()
    assert not torch.allclose(plain(Bags.of([x])).logits, plain(Bags.of([1000 * x])).logits)


def test_it_has_as_many_weights_as_it_says() -> None:
    model = build_aggregator("attentive_probe", 1024, 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 18_434
