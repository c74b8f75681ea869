"""Adapters: their algebra, what they leave alone, and how they keep away from earlier ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.continual.adapters import (
    Adapters,
    adapt,
    adapters_of,
    plain_weights,
    with_first_directions,
)
from bagscope.mil.continual.owlora import OWLoRA, OWLoRAOptions, heads_of
from bagscope.mil.continual.sequence import learn_task, require_sequence, with_body_of
from bagscope.mil.training.optimisation import copied
from tests.kernels.packed import normal
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_source

OPTIONS: dict[str, Any] = {"hidden": 8, "heads": 2, "groups": 3, "attention": 4}


def scrambled(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def regime_of(earlier: int, name: str = "comel", rank: int = 2) -> OWLoRA:
    torch.manual_seed(0)
    options = OPTIONS if name == "comel" else {"hidden": 8}
    return OWLoRA(
        DIMENSION,
        2,
        OWLoRAOptions(earlier=earlier, rank=rank),
        lambda features, outputs: build_aggregator(name, features, outputs, options),
    )


def test_a_weight_is_its_own_and_what_the_tasks_add() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    own = layer.weight.detach().clone()
    adapt(layer, 3, 2)
    assert torch.equal(layer.weight, own), "B starts at zero"
    scrambled(layer)
    (adapters,) = adapters_of(layer)
    wanted = layer.parametrizations.weight.original.detach().clone()  # type: ignore[union-attr]
    for a, b, share in zip(adapters.a, adapters.b, adapters.share, strict=True):
        wanted += share.detach() * b.detach() @ a.detach()
    torch.testing.assert_close(layer.weight.detach(), wanted)
    x = torch.randn(4, 7)
    plain = nn.Linear(7, 5)
    plain.load_state_dict(plain_weights(layer))
    torch.testing.assert_close(plain(x), layer(x))


def test_the_penalty_is_zero_for_orthogonal_adapters_alone() -> None:
    adapters = Adapters(torch.zeros(6, 6), tasks=2, rank=2)
    axes = torch.eye(6)
    with torch.no_grad():
        adapters.first.copy_(axes[:2])
        adapters.a[0].copy_(axes[2:4])
        adapters.a[1].copy_(axes[4:])
    assert float(adapters.penalty().detach()) == 0
    with torch.no_grad():
        adapters.a[1].copy_(torch.stack([3 * axes[0], axes[5] + 2 * axes[3]]))
    assert float(adapters.penalty().detach()) == pytest.approx(9 + 4)
    adapters.turn_away()
    assert float(adapters.penalty().detach()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(adapters.a[1][1].detach(), axes[5])
    assert float(Adapters(torch.zeros(6, 6), tasks=0, rank=2).penalty().detach()) == 0


def test_where_no_direction_is_left_an_adapter_stays_as_it_is() -> None:
    adapters = Adapters(torch.zeros(3, 3), tasks=1, rank=3)
    with torch.no_grad():
        adapters.first.copy_(torch.eye(3))
    before = adapters.a[0].detach().clone()
    adapters.turn_away()
    assert torch.equal(adapters.a[0], before)


def test_the_first_task_reads_along_what_it_changed() -> None:
    model = regime_of(0)
    before = copied(model)
    name = "inner.projection.parametrizations.weight."
    after = dict(before)
    row, column = torch.randn(8), torch.randn(DIMENSION)
    after[f"{name}original"] = before[f"{name}original"] + torch.outer(row, column)
    found = with_first_directions(after, before)[f"{name}0.first"]
    along = float((found[0] @ column).abs() / column.norm())
    assert along == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["abmil", "comel", "ins", "mean"])
def test_a_later_task_learns_in_its_adapters_and_its_head(name: str) -> None:
    first, second = regime_of(1, name), regime_of(2, name)
    scrambled(first)
    second.begin_from(first.state_dict())
    kept = copied(second)
    bags = Bags.of(
        [normal(5, DIMENSION, seed=1), normal(3, DIMENSION, seed=2)],
        targets={"label": torch.tensor([[0.0], [1.0]], dtype=torch.float64)},
    )
    optimiser = torch.optim.SGD([p for p in second.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # with B at zero, the first step moves B alone
        found = second.train()(bags)
        torch.stack(
            [found.logits[:, 0].sum(), *(v.sum() for v in found.losses.values())]
        ).sum().backward()
        optimiser.step()
    moved = {n for n, value in second.state_dict().items() if not torch.equal(value, kept[n])}
    own = {n for n in moved if ".a.1" in n or ".b.1" in n or ".share.1" in n}
    assert own and {n.removeprefix("inner.") for n in moved - own} <= second.head
    assert moved - own, "the head learns"
    for key, value in first.state_dict().items():
        if key.removeprefix("inner.") not in first.head:
            assert torch.equal(second.state_dict()[key], value)


def test_plain_weights_answer_as_the_adapted_model() -> None:
    model = regime_of(2).eval()
    scrambled(model)
    plain = build_aggregator("comel", DIMENSION, 2, OPTIONS).eval()
    plain.load_state_dict(plain_weights(model.inner))
    bags = Bags.of([normal(9, DIMENSION), normal(2, DIMENSION, seed=3)])
    torch.testing.assert_close(plain(bags).logits, model(bags).logits)
    torch.testing.assert_close(plain(bags).scores, model(bags).scores)


def test_a_head_is_what_depends_on_the_number_of_logits() -> None:
    two, three = (build_aggregator("comel", DIMENSION, n, OPTIONS) for n in (2, 3))
    heads = heads_of(two, three)
    assert heads == {
        "classifier.weight", "classifier.bias", "instance.weight", "instance.bias",
    }  # fmt: skip
    own, later = copied(two), copied(build_aggregator("comel", DIMENSION, 2, OPTIONS))
    mixed = with_body_of(own, later, heads)
    assert torch.equal(mixed["classifier.weight"], own["classifier.weight"])
    assert torch.equal(mixed["v.weight"], later["v.weight"])


def test_tasks_are_no_regime_beside_another_one() -> None:
    recipe = made_recipe(regime={"name": "mixup"})
    source = made_source(4)
    with pytest.raises(ConfigError, match="regime mixup and tasks in sequence"):
        learn_task(recipe, TARGET, source, None, way="owlora", number=0, before=None)
    with pytest.raises(ConfigError, match="at least two tasks"):
        require_sequence(["one"])
    with pytest.raises(ConfigError, match="a comes twice"):
        require_sequence(["a", "b", "a"])
