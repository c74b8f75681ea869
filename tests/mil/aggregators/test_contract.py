"""Every registered aggregator keeps the contract, in each of its kinds."""

from __future__ import annotations

from typing import Any

import pytest

from bagscope.mil.aggregators.registry import BUILT_IN, aggregator_names
from bagscope.testing import check_aggregator

KINDS: dict[str, tuple[dict[str, Any], ...]] = {
    "abmil": (
        {"gated": True, "attention_dropout": 0.25},
        {"gate": "relu", "activation": "gelu", "attention_bias": False, "init": "xavier"},
    ),
    "acmil": (
        {"branches": 1},
        {"attention": "multihead", "branches": 3, "stkim_k": 4},
        {"branches": 2, "stkim_exactly": False, "projection_bias": True},
    ),
    "clam_mb": ({"subtyping": True, "instance_loss": "ce"},),
    "clam_sb": ({"subtyping": True, "k": 3},),
    "max": ({"level": "embedding"},),
    "mean": ({"level": "embedding", "activation": "gelu", "init": "torch"},),
}
"""Options beside the defaults, with a narrow projection, so that it is quick."""


def test_every_kind_is_of_a_registered_one() -> None:
    assert set(KINDS) <= set(BUILT_IN) <= set(aggregator_names())


@pytest.mark.parametrize("name", aggregator_names())
def test_with_its_defaults(name: str) -> None:
    check_aggregator(name, features=32, outputs=3)


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in KINDS for options in KINDS[name]]
)
def test_with_other_options(name: str, options: dict[str, Any]) -> None:
    check_aggregator(name, features=12, outputs=2, options={"hidden": 16, **options})


@pytest.mark.parametrize("name", aggregator_names())
def test_with_a_single_output(name: str) -> None:
    check_aggregator(name, features=12, outputs=1, options={"hidden": 16})
