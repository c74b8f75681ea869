"""DTFD-MIL: how bags are dealt, what is distilled of them, and who learns from whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.pseudo_bags import Dealt, deal, extremes
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.explain.pools import attention_terms
from tests.kernels.packed import normal

OUTPUTS, LENGTHS = 3, (23, 1, 2, 300)


def bags_of(*lengths: int, step: int = 0) -> Bags:
    bags = Bags.of([normal(n, 12, seed=n) for n in lengths], step=step)
    return replace(bags, tile_row=torch.cat([torch.arange(n) for n in lengths]))


BAGS = bags_of(*LENGTHS)


def built(**options: Any) -> Aggregator:
    torch.manual_seed(0)
    small = {"hidden": 16, "attention": 8, **options}
    return build_aggregator("dtfd", 12, OUTPUTS, small).eval()


@pytest.mark.parametrize("use", [None, 1])
def test_pseudo_bags_are_as_equal_as_can_be(use: int | None) -> None:
    dealt = deal(BAGS, 4, use=use, in_training=False)
    for bag, length in enumerate(LENGTHS):
        wanted = [len(part) for part in np.array_split(np.arange(length), 4)]
        assert dealt.sizes[bag].tolist() == wanted
        assert dealt.group[dealt.bag == bag].bincount(minlength=4).tolist() == wanted
    if use is None:
        assert dealt.group[:23].tolist() == sorted(dealt.group[:23].tolist())


def test_each_step_and_each_bag_deals_anew_alone_as_packed() -> None:
    bags = bags_of(40, 40)
    found = deal(bags, 4, use=1, in_training=True).group
    again = deal(bags_of(40, 40, step=1), 4, use=1, in_training=True).group
    assert not torch.equal(found[:40], found[40:])
    assert not torch.equal(found, again)
    alone = deal(bags.one(1), 4, use=1, in_training=True).group
    assert torch.equal(alone, found[40:])


def test_a_prediction_s_deal_hangs_on_the_rows_of_the_tiles_alone() -> None:
    bags = bags_of(200)
    whole = deal(bags, 4, use=1, in_training=False).group
    kept = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:190]
    fewer = replace(
        bags,
        features=bags.features[kept],
        tile_row=kept,
        cu_seqlens=torch.tensor([0, 190], dtype=torch.int32),
        bag_ids=("another",),
        seed=9,
        step=9,
    )
    found = deal(fewer, 4, use=1, in_training=False).group
    # At most as many tiles change sides at each border as there are fewer of.
    assert int((found != whole[kept]).sum()) <= 3 * 10
    assert not torch.equal(deal(bags, 4, use=2, in_training=False).group, whole)


@pytest.mark.parametrize("with_lowest", [False, True])
def test_the_tiles_that_stand_out_are_those_of_a_sort(with_lowest: bool) -> None:
    keys, most = normal(sum(LENGTHS), seed=5), 4
    dealt = deal(BAGS, 5, use=1, in_training=False)
    rows, are_there = extremes(keys, dealt, most, with_lowest=with_lowest)
    for bag in range(len(LENGTHS)):
        for group in range(5):
            own = ((dealt.bag == bag) & (dealt.group == group)).nonzero()[:, 0]
            ranked = own[keys[own].argsort(descending=True)].tolist()
            wanted = ranked[:most] + (ranked[-most:] if with_lowest else [])
            assert rows[bag, group][are_there[bag, group]].tolist() == wanted


def test_equal_tiles_are_taken_as_they_stand() -> None:
    dealt = Dealt(torch.zeros(4).long(), torch.zeros(4).long(), torch.tensor([[4]]))
    rows, _ = extremes(torch.zeros(4), dealt, 2, with_lowest=False)
    assert rows.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("distil", ["afs", "maxs", "maxmins"])
def test_fewer_tiles_than_pseudo_bags_speak_in_turn(distil: str) -> None:
    found = built(distil=distil)(bags_of(1, 2))
    assert found.branch_logits is not None
    one, two = found.branch_logits
    assert torch.equal(one, one[:1].expand(4, -1))
    assert torch.equal(two[:2], two[2:]) and not torch.equal(two[0], two[1])
    model = built(distil=distil)
    h = model.projection(bags_of(1).features)  # type: ignore[operator]
    # Of one tile there is nothing to weigh in either tier.
    alone = model.second.classifier(h)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(model(bags_of(1)).logits, alone)


@pytest.mark.parametrize("distil", ["afs", "maxs"])
def test_the_second_tier_teaches_the_first_nothing(distil: str) -> None:
    model = built(distil=distil).train()
    model(BAGS).logits.sum().backward()
    taught = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert taught == {"second"}
    # Explanations ask what a tile does to the answer, through both tiers.
    x = BAGS.features.clone().requires_grad_()
    model.eval()(replace(BAGS, features=x)).logits.sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())


def test_tiles_are_best_for_the_last_class_or_for_the_answer() -> None:
    by_last, by_answer = built(distil="maxs"), built(distil="maxs", rank_by="predicted")
    for model in (by_last, by_answer):
        with torch.no_grad():
            model.first.classifier.bias[0] = 100.0  # type: ignore[union-attr, index]
    dealt: list[Tensor] = []
    for model, place in ((by_last, 2), (by_answer, 0)):
        evidence = model._evidence(  # type: ignore[operator]
            model(BAGS).scores, model(BAGS).branch_logits, deal(BAGS, 4, use=1, in_training=False)
        )
        dealt.append(evidence)
        torch.testing.assert_close(evidence, model(BAGS).scores.log_softmax(1)[:, place])
    assert not torch.equal(*dealt)


def test_several_deals_give_their_mean() -> None:
    one, three = built(), built(inference_splits=3)
    found = three(BAGS)
    assert found.branch_logits is not None
    assert found.branch_logits.shape == (len(LENGTHS), 12, OUTPUTS)
    assert not torch.allclose(found.logits[3], one(BAGS).logits[3], atol=0)
    terms = three.pooling_terms(BAGS)
    assert terms is not None and terms.scores.shape == (sum(LENGTHS), 3)
    torch.testing.assert_close(terms.logits(BAGS.cu_seqlens), found.logits)
    three.train()
    assert three(BAGS).branch_logits.shape[1] == 4  # type: ignore[union-attr]


def test_terms_hold_of_the_bag_as_it_is_alone() -> None:
    assert attention_terms(built(), BAGS.one(3)) is None
    assert built(distil="maxs").pooling_terms(BAGS) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_tiles": 8}, "total_tiles and rank_by belong to maxs and maxmins"),
        ({"rank_by": "last"}, "total_tiles and rank_by belong to maxs and maxmins"),
        ({"distil": "maxs", "total_tiles": 3}, "total_tiles is 3, less than one of each of the 4"),
        ({"split": "stored", "inference_splits": 2}, "inference_splits belongs to split: random"),
    ],
)
def test_options_without_a_use_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(**options)
