"""Mean pooling: two levels with one answer, told apart by where dropout acts."""

from __future__ import annotations

import torch

from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64, normal

BAGS = Bags.of([normal(n, 12, seed=n) for n in (5, 1, 4100)], seed=1)


def built(**options: object) -> Aggregator:
    torch.manual_seed(0)
    return build_aggregator("mean", 12, 3, {"hidden": 32, **options})


def test_logits_are_the_mean_of_the_tiles_logits() -> None:
    found = built().eval()(BAGS)
    for bag, (first, last) in enumerate(((0, 5), (5, 6), (6, 4106))):
        assert_close_to_float64(found.logits[bag], found.scores[first:last].double().mean(0))
    assert found.score_kind == "instance_logit"


def test_both_levels_are_one_in_evaluation() -> None:
    instance, embedding = built(level="instance"), built(level="embedding")
    assert torch.equal(instance.eval()(BAGS).logits, embedding.eval()(BAGS).logits)


def test_dropout_acts_on_what_the_level_says() -> None:
    instance = built(level="instance", dropout=0.5).train()(BAGS)
    embedding = built(level="embedding", dropout=0.5).train()(BAGS)
    plain = built().eval()(BAGS)
    # Half of 4,100 tiles' units average out; half of a pooled vector's don't.
    assert_close_to_float64(instance.embedding[2], plain.embedding[2], rtol=0.1)
    assert not torch.equal(instance.scores, plain.scores)
    assert torch.equal(embedding.scores, plain.scores)
    assert torch.equal(embedding.embedding, plain.embedding)
    assert not torch.equal(embedding.logits, plain.logits)


def test_every_tile_weighs_the_same_in_the_terms() -> None:
    terms = built().eval().pooling_terms(BAGS)
    assert terms is not None
    assert not terms.scores.any()


def test_every_tile_gets_a_gradient() -> None:
    features = BAGS.features.clone().requires_grad_()
    built().eval()(
        Bags(features=features, cu_seqlens=BAGS.cu_seqlens, bag_ids=BAGS.bag_ids)
    ).logits.sum().backward()
    assert features.grad is not None
    assert bool((features.grad != 0).any(1).all())
