"""ILRA beside torch's own attention, bag by bag; its seeds; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.ilra_layers import GatedAttentionBlock
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64, bags_of, normal

BAGS = Bags.of([normal(n, 12, seed=n) for n in (5, 1, 90)])


def built(**options: Any) -> Aggregator:
    torch.manual_seed(0)
    small = {"hidden": 16, "heads": 4, **options}
    return build_aggregator("ilra", 12, 3, small).eval()


def attend(block: GatedAttentionBlock, asking: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Return what rows learn of rows by torch's own attention, and its weights over heads."""
    attention = nn.MultiheadAttention(block.out.in_features, block.heads, dtype=torch.float64)
    attention.load_state_dict(
        {
            "in_proj_weight": block.inner.weight,
            "in_proj_bias": block.inner.bias,
            "out_proj.weight": block.inner_out.weight,
            "out_proj.bias": block.inner_out.bias,
        }
    )
    q, k, v = block.query(asking), block.key(asked), block.value(asked)
    found, weights = attention(q, k, v, average_attn_weights=True)
    o = q + found
    o = o if block.norm_first is None else block.norm_first(o)
    o = o + block.out(o).relu()
    o = o if block.norm_last is None else block.norm_last(o)
    if block.gate is not None:
        gate = block.gate(asking)
        o = o * gate * gate.sigmoid()
    return o, weights


@pytest.mark.parametrize("options", [{}, {"rank": 3, "layer_norm": True}, {"rank": 5, "seeds": 2}])
def test_it_is_torch_s_attention_bag_by_bag(options: dict[str, Any]) -> None:
    found = built(**options)(BAGS)
    model: Any = built(**options).double()
    start = 0
    for bag, x in enumerate(bags_of(BAGS.features.double(), BAGS.cu_seqlens)):
        h = x
        for block in model.blocks:
            rows, _ = attend(block.forth, block.latent, h)
            h, _ = attend(block.back, h, rows)
        z, weights = attend(model.pooling, model.seeds, h)
        logits = model.classifier(z)
        assert_close_to_float64(found.logits[bag], logits.mean(0), what="logits")
        assert_close_to_float64(found.embedding[bag], z.mean(0), what="embedding")
        if len(z) > 1:
            assert_close_to_float64(found.branch_logits[bag], logits, what="branches")
        own = found.scores[start : start + len(x), 0].exp()
        assert_close_to_float64(own, weights.mean(0), what="weights")
        start += len(x)


def test_one_seed_has_no_branches() -> None:
    assert built()(BAGS).branch_logits is None
    assert built(rank=2)(BAGS).branch_logits.shape == (3, 2, 3)  # type: ignore[union-attr]
    assert built(rank=2, seeds=1)(BAGS).branch_logits is None


def test_layers_start_as_the_authors_do() -> None:
    model: Any = built(hidden=256)
    block = model.blocks[1].back
    assert not block.inner.bias.any() and not block.inner_out.bias.any()
    assert block.out.bias.any()
    # Xavier's normal rule, and its uniform one for torch's own attention.
    torch.testing.assert_close(block.out.weight.std().item(), (1 / 256) ** 0.5, rtol=0.02, atol=0)
    assert block.inner.weight.abs().max() <= (6 / (4 * 256)) ** 0.5


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="hidden is 16, no multiple of the 3 heads"):
        built(heads=3)
