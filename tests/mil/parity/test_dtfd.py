"""DTFD-MIL with the original's weights and the recorded deal: both tiers, what is distilled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.mil.aggregators import dtfd
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64
from tests.mil.parity.recorded import RELATIVE, Recorded


class InTheirOrder(Recorded):
    """The tiles stand as the original's permutation has them: stored order is its deal."""

    def bags(self) -> Bags:
        return Bags.of([self.x[self.tensors["input/permutation"]]])


@pytest.mark.parametrize("variant", ["afs", "maxs", "maxmins"])
def test_dtfd(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "hidden": "=hidden",
        "attention": "=attention_hidden",
        "pseudo_bags": "=groups",
        "distil": variant,
        "split": "stored",
    }
    if variant != "afs":
        options["total_tiles"] = "=total_instance"
    recorded = InTheirOrder(f"dtfd_{variant}_A", "dtfd", options)
    distilled: list[Tensor] = []
    pool = dtfd.gated_attention_pool

    def seen(x: Tensor, *borders: Tensor, **gates: Any) -> Any:
        distilled.append(x)
        return pool(x, *borders, **gates)

    monkeypatch.setattr(dtfd, "gated_attention_pool", seen)
    recorded.model.train()
    output = recorded.output()
    assert output.branch_logits is not None
    each = output.branch_logits[0]
    tier1 = functional.cross_entropy(each, recorded.label.expand(len(each)))
    tier2 = functional.cross_entropy(output.logits, recorded.label)
    last = output.scores.softmax(1)[:, -1]
    order = recorded.tensors["input/permutation"]
    recorded.compare(
        tier1_logits=each,
        tier2_logits=output.logits,
        cam_last_class=torch.empty_like(last).scatter(0, order, last),
        loss_tier1=tier1,
        loss_tier2=tier2,
    )
    wanted = recorded.tensors["output/distilled"]
    assert_close_to_float64(distilled[0], wanted, rtol=RELATIVE, what="distilled")
    recorded.compare_gradients(tier1 + tier2)
