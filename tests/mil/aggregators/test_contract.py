"""Every registered aggregator keeps the contract, in each of its kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bagscope.mil.aggregators.registry import (
    BUILT_IN,
    aggregator_entry,
    aggregator_names,
    build_aggregator,
)
from bagscope.mil.bags import Bags
from bagscope.testing import check_aggregator
from tests.kernels.packed import normal

KINDS: dict[str, tuple[dict[str, Any], ...]] = {
    "abmil": (
        {"gated": True, "attention_dropout": 0.25},
        {"gate": "relu", "activation": "gelu", "attention_bias": False, "init": "xavier"},
        {"projection": False, "hidden": 512, "gated": True, "attention": 16},
    ),
    "acmil": (
        {"branches": 1},
        {"attention": "multihead", "branches": 3, "stkim_k": 4},
        {"branches": 2, "stkim_exactly": False, "projection_bias": True},
    ),
    "attentive_probe": (
        {"queries": 5, "scored": "group"},
        {"queries": 20, "pooled": "all", "layer_norm": True, "dropout": 0.25},
    ),
    "clam_mb": ({"subtyping": True, "instance_loss": "ce"},),
    "clam_sb": ({"subtyping": True, "k": 3},),
    "comel": ({"groups": 3, "heads": 2, "layers": 2, "margin": 0.2, "dropout": 0.25},),
    "dsmil": (
        {"q": "linear", "activation": "gelu", "dropout": 0.25},
        {"v": "passing", "value_dropout": 0.25, "predict": "mean"},
    ),
    "dtfd": (
        {"distil": "maxs", "inference_splits": 2, "dropout": 0.25},
        {"distil": "maxmins", "total_tiles": 15, "pseudo_bags": 5, "rank_by": "predicted"},
    ),
    "hopfield": (
        {"states": 2, "heads": 3, "beta": 0.7, "dropout": 0.0},
        {"update_steps": 3, "heads": 2},
    ),
    "ilra": (
        {"rank": 3, "layer_norm": True, "dropout": 0.25, "layers": 1},
        {"heads": 2, "seeds": 2},
    ),
    "ins": ({"dropout": 0.25, "tiles": 5, "queue": 32, "faithful_queue": True},),
    "mambamil": (
        {"ways": "bi", "order": "raster", "layers": 1},
        {"ways": "cross", "order": "hilbert", "dropout": 0.25, "layers": 1},
        {"ways": "sr", "core": "mamba2", "head": 8, "rate": 3, "layers": 1},
    ),
    "max": ({"level": "embedding"},),
    "mean": ({"level": "embedding", "activation": "gelu", "init": "torch"},),
    "rrt": (
        {"regions": 3, "shortcut": True, "layers": 2},
        {"regions": 2, "places": "lattice", "representatives": 0, "dropout": 0.0},
        {"regions": 3, "faithful_pads": True, "epeg": 0},
    ),
    "set_transformer": (
        {"layer_norm": True, "seeds": 3, "blocks": 1},
        {"attention": "full", "blocks": 1, "seed_blocks": 0, "dropout": 0.25},
    ),
    "transmil": (
        {"landmarks": 16, "dropout": 0.0},
        {"landmarks": 5, "heads": 2, "ppeg": "lattice", "score_layer": 2},
        {"attention": "exact", "heads": 4, "ppeg_sizes": (3,)},
        {"landmarks": 9, "faithful_pads": True, "faithful_start": True, "taps": 5},
    ),
    "vit": (
        {"pooling": "mean", "mixer": "neighbours", "radius": 2, "layers": 1},
        {"pooling": "class", "mixer": "alibi", "mlp": 0, "layers": 1},
        {"mixer": "agent", "agents": 4, "window": 5, "layers": 1},
        {"mixer": "agent", "agents": 9, "layers": 1},
        {"mixer": "linear", "layer_dropout": 0.25, "layers": 1},
        {"mixer": "lightning", "layers": 1},
        {"mixer": "lightning", "decay": True, "norm": "rmsnorm"},
        {"mixer": "lightning", "reads": "forward", "layers": 1},
        {"mixer": "flow", "layers": 1},
        {"mixer": "inline", "local": True, "layers": 1},
    ),
}
"""Options beside the defaults, with a narrow projection, so that it is quick."""

DRAWS: dict[str, dict[str, Any]] = {
    "attentive_probe": {"dropout": 0.25},
    "comel": {"hidden": 16, "dropout": 0.25},
    "dsmil": {"hidden": 16, "dropout": 0.25},
    "hopfield": {"heads": 4, "dropout": 0.5},
    "ilra": {"hidden": 16, "dropout": 0.25},
    "ins": {"hidden": 16, "dropout": 0.25},
    "mambamil": {"hidden": 16, "dropout": 0.25},
    "set_transformer": {"hidden": 16, "dropout": 0.25},
    "vit": {"hidden": 16, "dropout": 0.25},
}
"""Options of those that draw nothing by default."""

SLOW = {
    "comel",
    "dtfd",
    "hopfield",
    "ilra",
    "mambamil",
    "rrt",
    "set_transformer",
    "transmil",
    "vit",
}
"""Of these, a narrow one is checked every time, and not compiled: layers take long there."""


def test_every_kind_is_of_a_registered_one() -> None:
    assert set(KINDS) <= set(BUILT_IN) <= set(aggregator_names())


@pytest.mark.parametrize("name", sorted({*aggregator_names()} - SLOW))
def test_with_its_defaults(name: str) -> None:
    check_aggregator(name, features=32, outputs=3)


@pytest.mark.parametrize("name", sorted(SLOW))
def test_narrow(name: str) -> None:
    has_width = "hidden" in aggregator_entry(name).options.model_fields
    options = {"hidden": 32} if has_width else {}
    check_aggregator(name, features=32, outputs=3, options=options, compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_slow_ones_with_their_defaults(name: str) -> None:
    check_aggregator(name, features=32, outputs=3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # A layer that mixes tiles takes long in float64, and longer to compile.
        pytest.param(name, options, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in KINDS
        for options in KINDS[name]
    ],
)
def test_with_other_options(name: str, options: dict[str, Any]) -> None:
    has_width = "hidden" in aggregator_entry(name).options.model_fields
    narrow = {"hidden": 16} if has_width else {}
    check_aggregator(name, features=12, outputs=2, options={**narrow, **options})


@pytest.mark.parametrize("name", aggregator_names())
def test_a_single_output_is_a_column(name: str) -> None:
    model = build_aggregator(name, 12, 1).eval()
    ages = torch.tensor([[61.0], [70.5]], dtype=torch.float64)
    bags = Bags.of([normal(5, 12), normal(1, 12)], targets={"age": ages})
    found = model(bags)
    assert found.logits.shape == (2, 1)
    assert found.scores.shape == (6, 1)
    assert torch.equal(found.logits, model(replace(bags, targets=None)).logits)


@pytest.mark.parametrize("name", aggregator_names())
def test_no_seed_is_too_large_to_draw_from(name: str) -> None:
    model = build_aggregator(name, 12, 2, DRAWS.get(name)).train()
    bags = Bags.of([normal(5, 12)], seed=2**62 + 11, step=2**40)
    first = model(bags).logits
    assert torch.equal(first, model(bags).logits)
    assert not torch.equal(first, model(replace(bags, seed=2**62 + 12)).logits)
