"""Every aggregator in every regime: it learns, and answers a pack as it answers each bag alone."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch

from bagscope.mil.aggregators.registry import aggregator_entry, aggregator_names
from bagscope.mil.bags import Bags
from bagscope.mil.cases import Case
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.registry import build_model
from bagscope.mil.sources import ArraySource
from bagscope.mil.training.trainer import Trainer
from bagscope.testing import check_aggregator
from tests.mil.made_bags import TARGET

FEATURES = 6
NARROW: dict[str, dict[str, Any]] = {
    "attentive_probe": {"queries": 3},
    "comel": {"groups": 3, "heads": 2, "layers": 1},
    "hopfield": {"heads": 2},
    "ilra": {"heads": 2, "layers": 1},
    "ins": {"tiles": 4, "queue": 16},
    "mambamil": {"layers": 1},
    "rrt": {"heads": 2, "regions": 2},
    "set_transformer": {"blocks": 1, "heads": 2},
    "transmil": {"landmarks": 5, "heads": 2},
    "vit": {"heads": 2, "layers": 1},
}
PACKED = {"name": "packmil", "options": {"share": 0.5, "shortest": 1, "capacity": 20}}
REGIMES: dict[str, dict[str, Any]] = {
    "mixup": {"name": "mixup"},
    "pseudo_bags": {"name": "pseudo_bags"},
    "packmil": PACKED,
    "downsampled": {
        "name": "packmil",
        "options": {**PACKED["options"], "downsampler": "max", "r": 2},
    },
    "mhim": {"name": "mhim", "options": {"masks": {"high": 0.3}, "warm_epochs": 1}},
}
THINNED = list(zip(aggregator_names(), cycle(REGIMES), strict=False))
WHOLE = [(name, regime) for name in aggregator_names() for regime in REGIMES]


def recipe_of(name: str, regime: str, **own: Any) -> TrainSpec:
    has_width = "hidden" in aggregator_entry(name).options.model_fields
    options = {**({"hidden": 8} if has_width else {}), **NARROW.get(name, {}), **own}
    return TrainSpec.model_validate(
        {
            "aggregator": {"name": name, "options": options},
            "regime": REGIMES[regime],
            "bags": {"bags_per_step": 4},
            "training": {"epochs": 1, "patience": None, "min_epochs": 0},
        }
    )


def source_of(count: int, seed: int) -> ArraySource:
    """Return bags of 3 to 13 tiles on a lattice, of two classes."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(3, 14, count)
    names = [f"c{place}" for place in range(count)]
    return ArraySource(
        [generator.normal(size=(size, FEATURES)).astype(np.float32) for size in sizes],
        [
            Case(
                case_id=name,
                patient_id=name,
                slide_ids=(name,),
                targets={"label": (float(place % 2),)},
            )
            for place, name in enumerate(names)
        ],
        grids=[
            np.stack([np.arange(size) % 4, np.arange(size) // 4], axis=1).astype(np.int32)
            for size in sizes
        ],
        tile_um=128.0,
    )


def learns_and_answers(name: str, regime: str) -> None:
    recipe = recipe_of(name, regime)
    trainer = Trainer(recipe, [TARGET], source_of(8, 0), source_of(4, 1), seed=0)
    start = {key: value.clone() for key, value in trainer.model.named_parameters()}
    (epoch,) = trainer.run().history
    assert all(np.isfinite(value) for value in epoch.losses.values())
    assert np.isfinite(epoch.validation_loss)
    moved = dict(trainer.model.named_parameters())
    assert any(not torch.equal(start[key], moved[key]) for key in start if "inner" in key)
    model = trainer.model.eval()
    source = source_of(3, 2)
    bags = [source.read(place) for place in range(3)]
    packed = Bags.of([torch.from_numpy(bag.features) for bag in bags])
    with torch.no_grad():
        found = model(packed)
        alone = torch.cat([model(packed.one(place)).logits for place in range(3)])
    assert len(found.scores) == len(packed.features)
    torch.testing.assert_close(found.logits, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "regime"), THINNED)
def test_each_aggregator_in_one_of_the_regimes(name: str, regime: str) -> None:
    learns_and_answers(name, regime)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "regime"), [pair for pair in WHOLE if pair not in THINNED])
def test_each_aggregator_in_all_other_regimes(name: str, regime: str) -> None:
    learns_and_answers(name, regime)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "regime"), THINNED)
def test_the_contract_is_kept_in_a_regime(name: str, regime: str) -> None:
    entry = aggregator_entry(name)
    drops = [key for key, value in entry.options() if "dropout" in key and isinstance(value, float)]
    recipe = recipe_of(name, regime, **dict.fromkeys(drops, 0.0))
    check_aggregator(
        lambda features, outputs: build_model(recipe, features, outputs),
        features=12,
        is_order_free=entry.is_order_free,
        mixes_bags=entry.mixes_bags,
        compiled=False,
    )
