"""ILRA with the original's weights: the logits of every seed, the loss, the gradients."""

from __future__ import annotations

import pytest
from torch.nn import functional

from tests.mil.parity.recorded import Recorded


@pytest.mark.parametrize("rank", [1, 4])
def test_ilra(rank: int) -> None:
    recorded = Recorded(
        f"ilra_r{rank}_A",
        "ilra",
        {
            "hidden": "=hidden",
            "heads": "=heads",
            "layers": "=layers",
            "rank": "=latent",
            "seeds": "=seeds",
            "layer_norm": "=layer_norm",
        },
    )
    output = recorded.output()
    assert (output.branch_logits is None) == (rank == 1)
    each = output.logits if output.branch_logits is None else output.branch_logits[0]
    recorded.compare(logits=each)
    recorded.compare_gradients(functional.cross_entropy(each, recorded.label.expand(len(each))))
