"""Max pooling: whose tile a logit is, and which tiles learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bagscope.mil.aggregators.max import segment_max
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from tests.kernels.packed import borders, normal

OUTPUTS = 3
BAGS = Bags.of([normal(n, 12, seed=n) for n in (5, 1, 300)])


def built(**options: object) -> Aggregator:
    torch.manual_seed(0)
    return build_aggregator("max", 12, OUTPUTS, {"hidden": 32, **options}).eval()


def test_each_class_has_the_logit_of_its_best_tile() -> None:
    found = built()(BAGS)
    for bag, (first, last) in enumerate(((0, 5), (5, 6), (6, 306))):
        assert torch.equal(found.logits[bag], found.scores[first:last].amax(0))


def test_embeddings_are_pooled_unit_by_unit() -> None:
    model = built(level="embedding")
    found = model(BAGS)
    h = model.network.project(BAGS)  # type: ignore[union-attr, operator]
    for bag, (first, last) in enumerate(((0, 5), (5, 6), (6, 306))):
        assert torch.equal(found.embedding[bag], h[first:last].amax(0))
    # A tile's score is the answer for that tile alone.
    alone = model(BAGS.one(1))
    assert torch.allclose(alone.scores, alone.logits)


@pytest.mark.parametrize("bag", [0, 1, 2])
def test_at_most_a_tile_per_class_learns(bag: int) -> None:
    one = BAGS.one(bag)
    features = one.features.clone().requires_grad_()
    found = built()(replace(one, features=features))
    found.logits.sum().backward()
    assert features.grad is not None
    learning = set((features.grad != 0).any(1).nonzero()[:, 0].tolist())
    assert learning <= set(found.scores.argmax(0).tolist())
    assert 1 <= len(learning) <= OUTPUTS


def test_equal_tiles_share_the_gradient() -> None:
    values = torch.tensor([[2.0], [1.0], [2.0], [5.0]], requires_grad=True)
    top = segment_max(values, borders([3, 1]))
    assert top.tolist() == [[2.0], [5.0]]
    top.sum().backward()
    assert values.grad is not None
    assert values.grad[:, 0].tolist() == [0.5, 0.0, 0.5, 1.0]


def test_an_empty_bag_gives_zeros() -> None:
    assert segment_max(torch.ones(2, 3), borders([0, 2])).tolist() == [[0.0] * 3, [1.0] * 3]
