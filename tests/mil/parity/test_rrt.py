"""RRT-MIL with its original's weights gives the original's outputs and gradients."""

from __future__ import annotations

import pytest
from torch.nn import functional

from tests.mil.parity.recorded import Recorded

OPTIONS = {
    "hidden": "=hidden",
    "attention": "=attention_hidden",
    "heads": "=heads",
    "regions": "=region_num",
    "epeg": "=epeg_k",
    "representatives": "=crmsa_k",
    "cross_heads": "=crmsa_heads",
    "shortcut": "=all_shortcut",
    "gate": "=da_act",
    "activation": "=activation",
    "faithful_pads": True,
    "dropout": 0.0,
}


@pytest.mark.parametrize("variant", ["epeg15-cr3", "epeg21-cr5", "epeg9-cr1-shortcut"])
def test_rrt(variant: str) -> None:
    recorded = Recorded(f"rrt_{variant}_A", "rrt", OPTIONS)
    output = recorded.output()
    recorded.compare(logits=output.logits, attention=output.scores.softmax(0).T)
    recorded.compare_gradients(functional.cross_entropy(output.logits, recorded.label))
