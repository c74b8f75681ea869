"""Small models and bags for explanations, the slow way to ask them, one that knows the truth."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.explain.question import class_question
from bagscope.testing.planted import PlantedBags
from tests.kernels.packed import normal

FEATURES = 6
CLASSES = ("a", "b", "c")
QUESTION = class_question(CLASSES)
SMALL: dict[str, Any] = {"hidden": 8, "attention": 5}
CLOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "abmil": ("abmil", SMALL),
    "gated": ("abmil", {**SMALL, "gated": True, "activation": "gelu"}),
    "clam_sb": ("clam_sb", SMALL),
    "clam_mb": ("clam_mb", SMALL),
    "acmil": ("acmil", {"hidden": 8, "attention_width": 5, "branches": 3}),
    "mean": ("mean", {"hidden": 8}),
}
GENERIC: dict[str, tuple[str, dict[str, Any]]] = {
    "max": ("max", {"hidden": 8}),
    "multihead": ("acmil", {"attention": "multihead", "hidden": 8, "heads": 2, "branches": 2}),
}
EVERY = CLOSED | GENERIC


def model(kind: str, seed: int = 0) -> Aggregator:
    """Return a model with random weights, all of them away from where they start."""
    name, options = EVERY[kind]
    torch.manual_seed(seed)
    made = build_aggregator(name, FEATURES, len(CLASSES), options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return made


def bags(*lengths: int, seed: int = 0) -> Bags:
    """Return bags of so many tiles, with names."""
    made = [normal(n, FEATURES, seed=seed + place) for place, n in enumerate(lengths)]
    return Bags.of(made, bag_ids=[f"slide {place}" for place in range(len(lengths))])


def asked(
    aggregator: Aggregator, made: Bags, selections: Sequence[NDArray[np.int64]]
) -> NDArray[np.float64]:
    """Return the softmax of the model's logits of each selection, asked alone and in float64."""
    precise = copy.deepcopy(aggregator).double()
    found = [
        precise(
            Bags.of([made.features[torch.from_numpy(np.ascontiguousarray(rows))].double()])
        ).logits.softmax(1)
        for rows in selections
    ]
    return torch.cat(found).detach().numpy()


def oracle(planted: PlantedBags, *, attends: bool = True) -> Aggregator:
    """Return an ABMIL of two classes that finds the planted tiles, or weighs all tiles alike.

    h = relu(direction · x − shift / 2), attention and class rise with h.
    """
    aggregator = build_aggregator("abmil", len(planted.direction), 2, {"hidden": 1, "attention": 1})
    values = {
        "attention.projection.weight": torch.from_numpy(planted.direction)[None],
        "attention.projection.bias": -torch.tensor([planted.shift / 2]),
        "attention.v.weight": torch.tensor([[1.0]]),
        "attention.v.bias": torch.tensor([-1.0]),
        "attention.w.weight": torch.tensor([[8.0 if attends else 0.0]]),
        "attention.w.bias": torch.tensor([0.0]),
        "classifier.weight": torch.tensor([[-3.0], [3.0]]),
        "classifier.bias": torch.tensor([3.0, -3.0]),
    }
    aggregator.load_state_dict({name: value.float() for name, value in values.items()})
    return aggregator.eval()
