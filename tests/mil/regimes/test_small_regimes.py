"""Pseudo-bags and mixup: what is drawn, what it costs, and that training goes on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.bags import Bags
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.draws import shuffled, uniforms
from bagscope.mil.regimes.mixup import mixed_rows
from bagscope.mil.regimes.pseudo_bags import dealt
from bagscope.mil.regimes.regime import Regime
from bagscope.mil.regimes.registry import build_model, refuse_impossible, regime_names
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.trainer import Trainer
from tests.kernels.packed import normal
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_source

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def bags_of(lengths: list[int], step: int = 0) -> Bags:
    features = [normal(length, DIMENSION, seed=place) for place, length in enumerate(lengths)]
    labels = torch.tensor([[float(place % 2)] for place in range(len(lengths))]).double()
    return Bags.of(features, targets={"label": labels}, seed=7, step=step)


def borders_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@settings(max_examples=50)
@given(LENGTHS, st.integers(2, 5))
def test_pseudo_bags_share_out_every_tile_once(lengths: list[int], count: int) -> None:
    bags = bags_of(lengths)
    order = shuffled(bags)
    parts = [dealt(order, bags.cu_seqlens, number, count) for number in range(count)]
    for bag, (start, length) in enumerate(zip(bags.cu_seqlens.tolist(), lengths, strict=False)):
        own = [rows[borders[bag] : borders[bag + 1]].tolist() for rows, borders in parts]
        assert all(own), "every pseudo-bag has a tile"
        seen = sorted(row for rows in own for row in rows)
        assert set(seen) == set(range(start, start + length))
        if length >= count:
            assert len(seen) == length
            assert max(map(len, own)) - min(map(len, own)) <= 1


@settings(max_examples=50)
@given(LENGTHS, st.floats(0, 1))
def test_mixed_bags_hold_tiles_of_both_and_no_tile_twice(lengths: list[int], share: float) -> None:
    bags = bags_of(lengths)
    count = len(lengths)
    partner = torch.arange(1, count + 1) % count
    rows, borders = mixed_rows(uniforms(bags), bags.cu_seqlens, partner, share)
    whose = torch.repeat_interleave(torch.arange(count), torch.tensor(lengths))[rows]
    for bag in range(count):
        own, other = lengths[bag], lengths[partner[bag]]
        found = whose[borders[bag] : borders[bag + 1]].tolist()
        stays, comes = max(1, round(share * own)), max(1, round((1 - share) * other))
        if count > 1:
            assert found.count(bag) == min(stays, own)
            assert found.count(int(partner[bag])) == min(comes, other)


def test_draws_do_not_depend_on_the_company() -> None:
    bags = bags_of([5, 3, 8])
    alone = [uniforms(bags.one(bag)) for bag in range(3)]
    assert torch.equal(uniforms(bags), torch.cat(alone))
    assert not torch.equal(uniforms(bags), uniforms(bags, 1))
    assert not torch.equal(uniforms(bags), uniforms(bags_of([5, 3, 8], step=1)))
    many = uniforms(bags_of([4000]))
    assert abs(float(many.mean()) - 0.5) < 0.02 and many.min() >= 0 and many.max() < 1


def judged(model: Regime, bags: Bags) -> Any:
    objective = build_objective([TARGET], made_recipe().objective)
    fitted = objective.fit({"label": np.array([[0.0], [1.0]])})
    return model.losses(
        bags,
        lambda output, targets, lengths=None: fitted(
            output, targets, progress=0.0, lengths=lengths
        ),
    )


def regime_of(name: str, aggregator: str = "mean", **options: Any) -> Regime:
    own = {"hidden": 8} if aggregator == "mean" else {"hidden": 8, "attention": 4}
    recipe = TrainSpec.model_validate(
        {
            "aggregator": {"name": aggregator, "options": own},
            "regime": {"name": name, "options": options},
        }
    )
    torch.manual_seed(0)
    model = build_model(recipe, DIMENSION, 2)
    assert isinstance(model, Regime)
    return model


def test_a_mixed_bag_costs_both_labels_by_their_shares() -> None:
    model, bags = regime_of("mixup", alpha=0.7).train(), bags_of([6, 4, 9])
    found = judged(model, bags)
    share = float(np.random.default_rng([bags.seed, bags.step, 1]).beta(0.7, 0.7))
    partner = torch.tensor([1, 2, 0])
    rows, borders = mixed_rows(uniforms(bags), bags.cu_seqlens, partner, share)
    logits = model.inner(bags.picked(rows, borders)).logits
    labels = bags.targets["label"][:, 0].long() if bags.targets else torch.empty(0)
    wanted = share * functional.cross_entropy(logits, labels)
    wanted = wanted + (1 - share) * functional.cross_entropy(logits, labels[partner])
    torch.testing.assert_close(found.total, wanted)


def test_pseudo_bags_cost_the_mean_of_what_each_costs() -> None:
    model, bags = regime_of("pseudo_bags", count=3).train(), bags_of([6, 4, 9])
    order = shuffled(bags)
    labels = bags.targets["label"][:, 0].long() if bags.targets else torch.empty(0)
    each = [
        functional.cross_entropy(
            model.inner(bags.picked(*dealt(order, bags.cu_seqlens, number, 3))).logits, labels
        )
        for number in range(3)
    ]
    torch.testing.assert_close(judged(model, bags).total, torch.stack(each).mean())


@pytest.mark.parametrize("name", ["mixup", "pseudo_bags"])
@pytest.mark.parametrize("aggregator", ["abmil", "clam_sb", "acmil"])
def test_in_evaluation_the_aggregator_answers_for_itself(name: str, aggregator: str) -> None:
    own = {"hidden": 8}
    recipe = TrainSpec.model_validate(
        {"aggregator": {"name": aggregator, "options": own}, "regime": {"name": name}}
    )
    model = build_model(recipe, DIMENSION, 2)
    assert isinstance(model, Regime)
    bags = bags_of([6, 4, 9])
    assert torch.equal(model.eval()(bags).logits, model.inner(bags).logits)
    losses = judged(model.train(), bags)
    losses.total.backward()
    assert all(
        bool(weight.grad.isfinite().all())
        for weight in model.parameters()
        if weight.grad is not None
    )


@pytest.mark.parametrize("name", ["mixup", "pseudo_bags"])
def test_a_killed_training_ends_at_the_same_bits(name: str, tmp_path: Path) -> None:
    recipe = made_recipe(regime={"name": name}, training={"epochs": 3})

    def trainer(folder: Path | None, stop_after: int | None = None) -> Trainer:
        source, inner = made_source(12), made_source(6, seed=1)
        return Trainer(
            recipe, [TARGET], source, inner, seed=3, folder=folder, stop_after=stop_after
        )

    whole = trainer(None).run()
    trainer(tmp_path, stop_after=1).run()
    again = trainer(tmp_path).run()
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)
    assert whole.history[-1].losses["total"] < whole.history[0].losses["total"]


def test_what_does_not_go_together_is_refused() -> None:
    alone = made_recipe(regime={"name": "mixup"}, bags={"bags_per_step": 1})
    with pytest.raises(ConfigError, match="bags_per_step is 1; set it to 2"):
        refuse_impossible(alone, [TARGET])
    cox = made_recipe(regime={"name": "mixup"}, objective={"survival": "cox"})
    survival = TargetSpec(column="os", task="survival", time="months", event="dead")
    with pytest.raises(ConfigError, match="Cox's loss is of all bags"):
        refuse_impossible(cox, [survival])
    for name in ("ins", "comel", "clam_sb", "clam_mb"):
        taught = TrainSpec.model_validate(
            {
                "aggregator": {"name": name},
                "regime": {"name": "mixup"},
                "bags": {"bags_per_step": 4},
                "objective": {"terms": {"instance": 0.5}},
            }
        )
        with pytest.raises(ConfigError, match=f"weight to instance, which aggregator {name} "):
            refuse_impossible(taught, [TARGET])
    with pytest.raises(ConfigError, match="goes by their places"):
        build_model(
            TrainSpec.model_validate(
                {
                    "aggregator": {"name": "mambamil", "options": {"order": "raster"}},
                    "regime": {"name": "mixup"},
                }
            ),
            DIMENSION,
            2,
        )
    with pytest.raises(ConfigError, match=r"no regime 'mixip'.*mixup"):
        build_model(made_recipe(regime={"name": "mixip"}), DIMENSION, 2)
    with pytest.raises(ConfigError, match="regime full"):
        build_model(made_recipe(regime={"options": {"count": 3}}), DIMENSION, 2)
    assert {"full", "mixup", "pseudo_bags"} <= set(regime_names())
