"""TransMIL with the original's weights gives its outputs and gradients, published and fixed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional

from bagscope.mil.aggregators.transmil import LEAST_SHARE
from tests.kernels.packed import assert_close_to_float64
from tests.mil.parity.recorded import Recorded

RELATIVE = 1e-5
VARIANTS = {
    "faithful": {"faithful_pads": True, "faithful_start": True},
    "fixed-perheadscale": {"faithful_pads": True},
}


@pytest.mark.parametrize("score_layer", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transmil(variant: str, score_layer: int) -> None:
    options: dict[str, Any] = {
        "hidden": "=hidden",
        "heads": "=heads",
        "landmarks": "=landmarks",
        "iterations": "=pinv_iterations",
        "ppeg_sizes": "=ppeg",
        "score_layer": score_layer,
        **VARIANTS[variant],
    }
    recorded = Recorded(f"transmil_{variant}_A", "transmil", options)
    recorded.model.eval()
    output = recorded.output()
    recorded.compare(logits=output.logits, embedding=output.embedding)
    recorded.compare_gradients(functional.cross_entropy(output.logits, recorded.label))
    if score_layer == 1:
        wanted = shown(recorded.tensors["output/cls_attention_layer1"], len(recorded.x))
        share = output.scores[:, 0].exp()
        assert_close_to_float64(share, wanted, rtol=RELATIVE, what="attention")


def shown(attention: Tensor, tiles: int) -> Tensor:
    """Return what tiles are shown with, of [class token, tiles, the first tiles again]."""
    weights = attention[1 : tiles + 1].clone()
    again = attention[tiles + 1 :]
    weights[: len(again)] += again
    return (weights * tiles).clamp(min=LEAST_SHARE)
