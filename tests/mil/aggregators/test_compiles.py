"""A compiled aggregator is compiled once, not at every bag and step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import BagOutput, Bags
from tests.kernels.packed import normal

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("abmil", {"hidden": 16, "gated": True, "dropout": 0.25, "attention_dropout": 0.1}),
    ("clam_sb", {"hidden": 16, "dropout": 0.25}),
    ("acmil", {"hidden": 16, "branches": 2, "stkim_k": 4}),
    ("acmil", {"hidden": 16, "branches": 2, "attention": "multihead", "dropout": 0.25}),
    ("attentive_probe", {"queries": 3, "layer_norm": True, "dropout": 0.25}),
    ("hopfield", {"hidden": 16, "heads": 2, "update_steps": 2, "dropout": 0.25}),
    ("rrt", {"hidden": 16, "regions": 2, "dropout": 0.25}),
    ("set_transformer", {"hidden": 16, "blocks": 1, "dropout": 0.25}),
    ("dsmil", {"hidden": 16, "v": "passing", "dropout": 0.25, "value_dropout": 0.1}),
    ("dtfd", {"hidden": 16, "distil": "maxmins", "dropout": 0.25}),
    ("ilra", {"hidden": 16, "rank": 2, "dropout": 0.25}),
    ("vit", {"hidden": 16, "heads": 4, "layers": 1, "dropout": 0.25, "layer_dropout": 0.2}),
    ("vit", {"hidden": 16, "heads": 4, "layers": 1, "mixer": "agent", "agents": 4}),
]
STEPS = 10


def loss_of(found: BagOutput) -> torch.Tensor:
    return torch.stack([found.logits.sum(), *(loss.sum() for loss in found.losses.values())]).sum()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_ten_steps_need_few_compilations(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build_aggregator(name, 12, 2, options).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    parameters = list(model.parameters())
    for step in range(STEPS):
        bags = Bags.of(
            [normal(10 + 7 * step, 12, seed=step), normal(31, 12, seed=99)],
            bag_ids=[f"first {step}", f"second {step}"],
            seed=100 + step,
            step=50 + step,
        )
        found, truth = loss_of(compiled(bags)), loss_of(model(bags))
        torch.testing.assert_close(found, truth)
        torch.testing.assert_close(
            torch.autograd.grad(found, parameters, materialize_grads=True),
            torch.autograd.grad(truth, parameters, materialize_grads=True),
            rtol=1e-4,
            atol=1e-5,
        )
    assert counter.frame_count <= 3
