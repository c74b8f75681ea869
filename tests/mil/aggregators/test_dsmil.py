"""DSMIL: which tile is critical, what each stream learns from, what explanations may use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.dsmil import segment_argmax
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.explain.pools import attention_terms
from tests.kernels.packed import assert_close_to_float64, bags_of, borders, normal

OUTPUTS, LENGTHS = 3, (5, 1, 300)
BAGS = Bags.of([normal(n, 12, seed=n) for n in LENGTHS])


def built(**options: Any) -> Aggregator:
    torch.manual_seed(0)
    return build_aggregator("dsmil", 12, OUTPUTS, {"query": 8, **options}).eval()


def streams(x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits of both streams of one bag (n, D), written from the formulas."""

    def layer(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    q = layer(layer(x, "query").relu(), "query_out").tanh()
    values = layer(x, "value").relu()
    highest, pooled = [], []
    for instance in layer(x, "instance").T:
        best = int(instance.argmax())
        highest.append(instance[best])
        pooled.append(torch.softmax(q @ q[best] / math.sqrt(q.shape[1]), 0) @ values)
    return layer(torch.cat(pooled), "classifier"), torch.stack(highest)


def test_both_streams_are_those_of_the_formulas() -> None:
    model = built(v="passing")
    weights = {name: value.double() for name, value in model.state_dict().items()}
    found = model(BAGS)
    assert found.branch_logits is not None
    for bag, x in enumerate(bags_of(BAGS.features.double(), BAGS.cu_seqlens)):
        logits, highest = streams(x, weights)
        assert_close_to_float64(found.logits[bag], logits)
        assert_close_to_float64(found.branch_logits[bag, 0], highest)


def test_the_first_of_equal_tiles_is_critical() -> None:
    values = torch.tensor([[2.0, 0.0], [5.0, 1.0], [5.0, 1.0], [7.0, 9.0], [7.0, 9.0]])
    assert segment_argmax(values, borders([3, 2])).tolist() == [[1, 1], [3, 3]]
    # An empty bag has no tile, and takes none from its neighbours.
    assert segment_argmax(values, borders([5, 0])).tolist()[0] == [3, 3]


def test_an_empty_bag_has_the_biases() -> None:
    model = built()
    torch.nn.init.normal_(model.instance.bias)  # type: ignore[union-attr, arg-type]
    found = model(Bags.of([normal(4, 12), normal(0, 12), normal(3, 12, seed=2)]))
    assert found.branch_logits is not None
    assert torch.equal(found.branch_logits[1, 0], model.instance.bias)  # type: ignore[union-attr]
    assert torch.equal(found.logits[1], model.classifier.bias)  # type: ignore[union-attr]


def test_the_max_stream_teaches_one_tile_per_class() -> None:
    x = normal(40, 12).requires_grad_()
    found = built()(Bags.of([x]))
    assert found.branch_logits is not None
    found.branch_logits.sum().backward()
    assert x.grad is not None
    rows = (x.grad != 0).any(1).nonzero()[:, 0]
    assert 1 <= len(rows) <= OUTPUTS
    found = built()(Bags.of([x]))
    (x_bag,) = torch.autograd.grad(found.logits.sum(), x)
    assert bool((x_bag != 0).any(1).all())


def test_the_mean_of_both_streams_is_an_answer_and_no_lesson() -> None:
    bag, both = built()(BAGS), built(predict="mean")
    mean = both(BAGS)
    assert bag.branch_logits is not None
    torch.testing.assert_close(mean.logits, (bag.logits + bag.branch_logits[:, 0]) / 2)
    assert torch.equal(both.train()(BAGS).logits, bag.logits)
    assert both.pooling_terms(BAGS) is None


def test_terms_hold_of_the_bag_as_it_is_alone() -> None:
    model = built()
    terms = model.pooling_terms(BAGS)
    assert terms is not None
    torch.testing.assert_close(terms.logits(BAGS.cu_seqlens), model(BAGS).logits)
    assert attention_terms(model, BAGS.one(2)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation and dropout belong to a projection; set hidden"),
        ({"dropout": 0.1}, "activation and dropout belong to a projection; set hidden"),
        ({"value_dropout": 0.1}, "value_dropout belongs to v: passing"),
    ],
)
def test_options_without_a_use_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(**options)
