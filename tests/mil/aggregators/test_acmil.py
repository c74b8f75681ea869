"""ACMIL: what its masks, its branches and its diversity do, and what it is with a single branch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.acmil import default_hidden
from bagscope.mil.aggregators.branches import Branched
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64, normal

LENGTHS = (40, 1, 5, 3)
FEATURES, M = 12, 3
BAGS = Bags.of([normal(n, FEATURES, seed=n) for n in LENGTHS], seed=1)
KINDS = pytest.mark.parametrize("attention", ["gated", "multihead"])


def built(**options: object) -> Aggregator:
    torch.manual_seed(0)
    model = build_aggregator("acmil", FEATURES, 2, {"hidden": 16, "branches": M, **options})
    for parameter in model.parameters():
        # The queries of multi-head branches start at nothing, and attention would be uniform.
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def branched(model: Aggregator, bags: Bags = BAGS) -> Branched:
    """Return what the branches say in the model's mode."""
    found: Branched = model.branches(bags, model._masked(bags))  # type: ignore[operator]
    return found


def test_one_branch_without_masks_is_gated_abmil() -> None:
    abmil = build_aggregator(
        "abmil",
        FEATURES,
        2,
        {"hidden": 16, "gated": True, "dropout": 0.0, "projection_bias": False},
    )
    acmil = built(branches=1, stkim_k=0)
    names = {
        f"branches.{name}" if name.startswith("attention") else name: value
        for name, value in abmil.state_dict().items()
    }
    unused = {name: p for name, p in acmil.state_dict().items() if name.startswith("branch_")}
    acmil.load_state_dict({**names, **unused})
    for mode in (True, False):
        ours, theirs = acmil.train(mode)(BAGS), abmil.train(mode)(BAGS)
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.entropy, theirs.entropy)
        weights = [part.softmax(0) for part in ours.scores.split(LENGTHS)]
        wanted = [part.softmax(0) for part in theirs.scores.split(LENGTHS)]
        assert_close_to_float64(torch.cat(weights), torch.cat(wanted))
        assert ours.branch_logits is None
        assert ours.losses == {}
    ours.logits.sum().backward()
    theirs.logits.sum().backward()
    grads = {name: p.grad for name, p in acmil.named_parameters()}
    assert grads["branch_classifier.weight"] is None
    for name, parameter in abmil.named_parameters():
        grad = grads[f"branches.{name}" if name.startswith("attention") else name]
        assert torch.equal(grad, parameter.grad), name  # type: ignore[arg-type]


@KINDS
def test_masked_tiles_weigh_nothing_and_the_others_share_their_weight(attention: str) -> None:
    model = built(attention=attention, stkim_k=10, stkim_p=0.6)
    before = branched(model).log_weights(BAGS.cu_seqlens).exp().flatten(1)
    after = branched(model.train()).log_weights(BAGS.cu_seqlens).exp().flatten(1)
    for bag, (old, new) in enumerate(zip(before.split(LENGTHS), after.split(LENGTHS), strict=True)):
        n = LENGTHS[bag]
        for a, b in zip(old.T, new.T, strict=True):
            masked = b == 0
            # Of ten (or all) tiles 60 %, but never all of a bag.
            assert int(masked.sum()) == int(min(10, n) * 0.6)
            assert set(masked.nonzero()[:, 0].tolist()) <= set(a.topk(min(10, n)).indices.tolist())
            assert_close_to_float64(b[~masked], a[~masked] / a[~masked].double().sum())


@KINDS
def test_masks_belong_to_seed_step_and_bag(attention: str) -> None:
    model = built(attention=attention, dropout=0.0 if attention == "multihead" else None).train()
    first = branched(model).scores
    assert torch.equal(first, branched(model).scores)
    assert not torch.equal(first, branched(model, replace(BAGS, step=1)).scores)
    assert not torch.equal(first, branched(model, replace(BAGS, seed=2)).scores)
    alone = branched(model, BAGS.one(2)).scores
    assert_close_to_float64(alone, first[41:46])
    renamed = replace(BAGS.one(0), bag_ids=("another",))
    assert not torch.equal(branched(model, renamed).scores == -1e9, first[:40] == -1e9)


@KINDS
@pytest.mark.parametrize("off", [{"stkim_k": 0}, {"stkim_p": 0.0}])
def test_without_masks_training_is_evaluation(attention: str, off: dict[str, float]) -> None:
    options = {"dropout": 0.0} if attention == "multihead" else {}
    model = built(attention=attention, **options, **off)
    wanted = model(BAGS)
    found = model.train()(BAGS)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.scores, wanted.scores)


@KINDS
def test_diversity_is_the_mean_cosine_of_two_branches(attention: str) -> None:
    model = built(attention=attention)
    weights = branched(model).log_weights(BAGS.cu_seqlens).exp().double()
    found = model(BAGS).losses["diversity"]
    for bag, part in enumerate(weights.split(LENGTHS)):
        cosines = [
            functional.cosine_similarity(part[:, a, head], part[:, b, head], dim=0)
            for a, b in itertools.combinations(range(M), 2)
            for head in range(part.shape[2])
        ]
        assert_close_to_float64(found[bag].double(), torch.stack(cosines).mean())


def test_each_branch_has_a_head_of_its_own() -> None:
    model = built()
    found = model(BAGS)
    assert found.branch_logits is not None
    assert found.branch_logits.shape == (len(LENGTHS), M, 2)
    each = branched(model).each
    layer = model.branch_classifier
    for branch in range(M):
        rows = slice(2 * branch, 2 * branch + 2)
        wanted = each[:, branch] @ layer.weight[rows].T + layer.bias[rows]  # type: ignore[index, operator, union-attr]
        assert_close_to_float64(found.branch_logits[:, branch], wanted)


@KINDS
def test_a_score_is_the_log_of_the_mean_weight(attention: str) -> None:
    model = built(attention=attention)
    found = model(BAGS)
    weights = branched(model).log_weights(BAGS.cu_seqlens).exp().flatten(1).mean(1)
    assert found.scores.shape == (sum(LENGTHS), 1)
    assert_close_to_float64(found.scores[:, 0].exp(), weights)
    assert_close_to_float64(
        torch.stack([part.sum() for part in weights.split(LENGTHS)]), torch.ones(len(LENGTHS))
    )


def test_multihead_branches_have_no_terms() -> None:
    assert built(attention="multihead").pooling_terms(BAGS) is None
    assert built().pooling_terms(BAGS) is not None


@pytest.mark.parametrize(
    ("features", "hidden"),
    [(384, 128), (512, 256), (768, 384), (1024, 512), (1536, 768), (1280, 640), (166, 88), (1, 8)],
)
def test_the_projection_is_as_wide_as_the_authors_choose(features: int, hidden: int) -> None:
    assert default_hidden(features) == hidden


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads has no meaning with attention gated"):
        built(heads=4)
    with pytest.raises(ConfigError, match="attention_width has no meaning with attention multi"):
        built(attention="multihead", attention_width=4)
    with pytest.raises(ConfigError, match="hidden is 20, no multiple of the 8 heads"):
        built(attention="multihead", hidden=20)


def test_dropout_of_multihead_branches_can_be_drawn_again() -> None:
    model = built(attention="multihead", stkim_k=0, dropout=0.5).train()
    first = model(BAGS).logits
    assert torch.equal(first, model(BAGS).logits)
    assert not torch.equal(first, model(replace(BAGS, step=1)).logits)
