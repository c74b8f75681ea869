"""DSMIL with the originals' weights: both streams, losses and gradients; alone and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from bagscope.mil.aggregators.dsmil import segment_argmax
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.originals import from_original
from tests.kernels.packed import assert_close_to_float64, vectors
from tests.mil.parity.recorded import RELATIVE, ZERO, Recorded

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear-q": {"q": "linear"},
    "one-class": {},
    "passing-v": {"v": "passing"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dsmil(variant: str) -> None:
    recorded = Recorded(f"dsmil_{variant}_A", "dsmil", {"query": "=query_dim", **VARIANTS[variant]})
    output = recorded.output()
    assert output.branch_logits is not None
    highest, target = output.branch_logits[:, 0], recorded.tensors["input/target"]
    bag = functional.binary_cross_entropy_with_logits(output.logits, target)
    best = functional.binary_cross_entropy_with_logits(highest, target)
    recorded.compare(
        bag_logits=output.logits,
        max_logits=highest,
        attention=output.scores.softmax(0).T,
        embedding=output.embedding,
        loss_bag=bag,
        loss_max=best,
        score_average=output.logits.sigmoid() + highest.sigmoid(),
    )
    if "output/loss_total_cross_entropy" in recorded.tensors:
        each = [functional.cross_entropy(one, recorded.label) for one in (output.logits, highest)]
        recorded.compare(loss_total_cross_entropy=(each[0] + each[1]) / 2)
    instance = recorded.tensors["output/instance_logits"]
    rows = segment_argmax(instance, recorded.bags().cu_seqlens)
    assert torch.equal(rows[0], recorded.tensors["output/critical_index"])
    recorded.compare_gradients((bag + best) / 2)


def test_packed_slides_are_packmil_s_isolated_ones() -> None:
    tensors, meta = vectors("packmil_packing-dsmil_A")
    config = meta["config"]
    model = build_aggregator(
        "dsmil",
        config["in_features"],
        config["n_classes"],
        {
            "hidden": config["hidden"],
            "activation": config["activation"],
            "query": config["query_dim"],
            "v": "passing",
        },
    )

    def renamed(prefix: str) -> dict[str, torch.Tensor]:
        theirs = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        return from_original("packmil-dsmil", theirs, model.state_dict())

    model.load_state_dict(renamed("weights/"))
    output = model(Bags.of([tensors[f"input/x{slide}"] for slide in range(3)]))
    assert output.branch_logits is not None
    found = {"bag_logits": output.logits, "max_logits": output.branch_logits[:, 0]}
    for name, value in found.items():
        for case in (name, f"{name}_separate"):
            assert_close_to_float64(value, tensors[f"output/{case}"], rtol=RELATIVE, what=case)
    each = [functional.cross_entropy(one, tensors["input/label"]) for one in found.values()]
    loss = torch.stack(each).mean()
    assert_close_to_float64(loss, tensors["output/loss_total"], rtol=RELATIVE, what="loss")
    loss.backward()
    wanted = renamed("grad/")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_close_to_float64(parameter.grad, wanted[name], rtol=RELATIVE, atol=ZERO, what=name)
