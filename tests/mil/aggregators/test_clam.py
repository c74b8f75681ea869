"""CLAM's loss on tiles: which tiles, which classes, and what learns from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.mil.aggregators.instance_loss import chosen_tiles, smooth_svm
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import BagOutput, Bags
from tests.kernels.packed import assert_close_to_float64, borders, normal

CLASSES, K, FEATURES = 3, 4, 12
LENGTHS = (40, 1, 5, 2, 9)
LABELS = (2.0, 1.0, 0.0, 1.0, torch.nan)
BOTH = pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])


def built(name: str, outputs: int = CLASSES, **options: object) -> Aggregator:
    torch.manual_seed(0)
    return build_aggregator(name, FEATURES, outputs, {"hidden": 16, "k": K, **options}).eval()


def bags(labels: tuple[float, ...] = LABELS, **targets: Tensor) -> Bags:
    columns = {"class": torch.tensor(labels, dtype=torch.float64)[:, None], **targets}
    return Bags.of([normal(n, FEATURES, seed=n) for n in LENGTHS], targets=columns)


def by_hand(model: Any, found: BagOutput, given: Bags, bag: int, label: int) -> Tensor:
    """Return the loss of one bag from the formula, class by class, in float64."""
    start, stop = given.cu_seqlens[bag : bag + 2].tolist()
    h = model.attention.projection(given.features[start:stop]).double()
    scores = found.scores[start:stop]
    loss_of = model.instance_loss
    total = torch.zeros((), dtype=torch.float64)
    k = min(K, (stop - start) // 2)
    for c in range(CLASSES):
        order = scores[:, min(c, scores.shape[1] - 1)].argsort(descending=True)
        rows = slice(2 * c, 2 * c + 2)
        weight, bias = loss_of.classifier.weight[rows], loss_of.classifier.bias[rows]
        logits = h @ weight.double().T + bias.double()
        ends = torch.cat([order[:k], order[len(order) - k :]])
        wanted = torch.tensor([1] * k + [0] * k)
        if c != label:
            ends, wanted = order[:k], torch.zeros(k, dtype=torch.long)
        if k and (c == label or loss_of.subtyping):
            judge = smooth_svm if loss_of.tile_loss == "svm" else functional.cross_entropy
            settings = {} if loss_of.tile_loss == "svm" else {"reduction": "none"}
            total = total + judge(logits[ends], wanted, **settings).mean()
    return total / (CLASSES if loss_of.subtyping else 1)


@BOTH
@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("tile_loss", ["svm", "ce"])
def test_the_loss_of_every_bag(name: str, subtyping: bool, tile_loss: str) -> None:
    model = built(name, subtyping=subtyping, instance_loss=tile_loss)
    given = bags()
    found = model(given)
    assert set(found.losses) == {"instance"}
    loss = found.losses["instance"]
    for bag, label in enumerate(LABELS[:-1]):
        wanted = by_hand(model, found, given, bag, int(label))
        assert_close_to_float64(loss[bag].double(), wanted, atol=1e-9, what=f"bag {bag}")
    # No tile is both at the top and at the bottom of one; the last has no label.
    assert loss[1] == 0
    assert loss[4] == 0
    assert bool((loss[[0, 2, 3]] > 0).all())


def test_the_two_ends_never_overlap() -> None:
    scores = normal(sum(LENGTHS), 2)
    rows, is_there = chosen_tiles(scores, borders(LENGTHS), K)
    assert rows.shape == (len(LENGTHS), 2, K, 2)
    assert is_there.sum(1).tolist() == [4, 0, 2, 1, 4]
    for bag in range(len(LENGTHS)):
        start, stop = borders(LENGTHS)[bag : bag + 2].tolist()
        count = int(is_there[bag].sum())
        for column in range(2):
            order = (start + scores[start:stop, column].argsort(descending=True)).tolist()
            assert rows[bag, 0, :count, column].tolist() == order[:count]
            assert rows[bag, 1, :count, column].tolist() == order[::-1][:count]


@BOTH
def test_attention_learns_nothing_from_it_and_the_projection_does(name: str) -> None:
    model = built(name)
    model(bags()).losses["instance"].sum().backward()
    learning = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {
        "attention.projection.weight",
        "attention.projection.bias",
        "instance_loss.classifier.weight",
        "instance_loss.classifier.bias",
    }


@BOTH
def test_without_a_single_class_there_is_no_such_loss(name: str) -> None:
    model = built(name)
    several = bags(other=torch.zeros(len(LENGTHS), 1, dtype=torch.float64))
    survival = {"survival": torch.ones(len(LENGTHS), 2, dtype=torch.float64)}
    for given in (replace(bags(), targets=None), several, replace(bags(), targets=survival)):
        assert model(given).losses == {}
        assert torch.equal(model(given).logits, model(bags()).logits)
    # One output is a number: its target is no class, though it stands in one column.
    assert built(name, outputs=1)(bags()).losses == {}


@BOTH
@pytest.mark.parametrize("subtyping", [False, True])
def test_a_class_without_an_output_has_no_such_loss(name: str, subtyping: bool) -> None:
    model = built(name, outputs=2, subtyping=subtyping)
    loss = model(bags()).losses["instance"]
    assert loss[0] == 0
    assert loss[2] > 0


def test_the_scores_of_clam_mb_are_per_class() -> None:
    found = built("clam_mb")(bags())
    assert found.scores.shape == (sum(LENGTHS), CLASSES)
    assert found.entropy is not None
    assert found.entropy.shape == (len(LENGTHS), CLASSES)
    assert found.embedding.shape == (len(LENGTHS), CLASSES * 16)
    assert built("clam_sb")(bags()).scores.shape == (sum(LENGTHS), 1)


def test_the_smooth_maximum_is_never_below_the_hard_one() -> None:
    scores, targets = normal(200, 2, scale=5.0), torch.arange(200) % 2
    other = scores.gather(1, 1 - targets[:, None])[:, 0]
    hard = (other + 1 - scores.gather(1, targets[:, None])[:, 0]).clamp_min(0)
    smooth = smooth_svm(scores, targets)
    assert bool((smooth >= hard - 1e-6).all())
    assert bool((smooth <= hard + torch.log(torch.tensor(2.0)) + 1e-6).all())
    leads = (scores[:, 0] - scores[:, 1]).abs() >= torch.log(torch.tensor(1000.0))
    assert 5 < int(leads.sum()) < 195
    assert torch.allclose(smooth[leads], hard[leads])
