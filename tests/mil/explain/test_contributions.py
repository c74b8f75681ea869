"""What tiles add to the logits adds up to them, whatever stands before the pooling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.mil.explain.contributions import contributions, whole_terms
from bagscope.mil.explain.pools import attention_terms
from tests.mil.explain.made_models import CLOSED, bags, model


@pytest.mark.parametrize("kind", CLOSED)
def test_contributions_add_up_to_the_logits(kind: str) -> None:
    made = model(kind)
    both = bags(4, 9)
    with torch.no_grad():
        terms, logits = made.pooling_terms(both), made(both).logits
    assert isinstance(terms, PoolingTerms)
    added = contributions(terms, [4, 9])
    sums = np.stack([added[:4].sum(axis=0), added[4:].sum(axis=0)]) + terms.bias.detach().numpy()
    np.testing.assert_allclose(sums, logits.numpy(), rtol=1e-5, atol=1e-6)
    precise = whole_terms(made, both)
    assert precise is not None and precise.values.dtype == torch.float64
    np.testing.assert_allclose(contributions(precise, [4, 9]), added, rtol=1e-4, atol=1e-6)


def test_a_tile_contributes_its_weight_times_the_classifiers_share_of_it() -> None:
    """ABMIL by hand: w_c · (a_i h_i), tile by tile and class by class."""
    torch.manual_seed(0)
    made = build_aggregator("abmil", 6, 3, {"hidden": 8, "attention": 5}).double().eval()
    bag = Bags.of([torch.randn(7, 6, dtype=torch.float64)])
    with torch.no_grad():
        output, terms = made(bag), made.pooling_terms(bag)
        assert terms is not None
        weights = output.scores[:, 0].softmax(0)
        hidden = made.attention.projection(bag.features)
        classifier = made.classifier.weight
        by_hand = [
            [float(classifier[c] @ (weights[i] * hidden[i])) for c in range(3)] for i in range(7)
        ]
    np.testing.assert_allclose(contributions(terms, [7]), by_hand, rtol=1e-9, atol=1e-12)


def test_where_logits_are_no_sum_there_are_none() -> None:
    assert whole_terms(model("max"), bags(5)) is None
    assert whole_terms(model("multihead"), bags(5)) is None


class Smoothed(Aggregator):
    """Adds the bag's mean to every tile first: terms are not a tile's own, yet they add up."""

    def __init__(self, inner: Aggregator) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, made: Bags) -> BagOutput:
        return self.inner(self.smoothed(made))

    def pooling_terms(self, made: Bags) -> PoolingTerms | None:
        return self.inner.pooling_terms(self.smoothed(made))

    def smoothed(self, made: Bags) -> Bags:
        return replace(made, features=made.features + made.features.mean(0))


def test_behind_a_layer_that_mixes_tiles_they_add_up_as_well() -> None:
    made, bag = Smoothed(model("abmil")), bags(9)
    assert attention_terms(made, bag) is None
    terms = whole_terms(made, bag)
    assert terms is not None
    sums = contributions(terms, [9]).sum(axis=0) + terms.bias.detach().numpy()
    with torch.no_grad():
        np.testing.assert_allclose(sums, made(bag).logits[0], rtol=1e-5, atol=1e-6)
