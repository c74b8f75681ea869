from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.kernels.gated_attention_pool import triton as kernels
from bagscope.kernels.gated_attention_pool.reference import gated_attention_pool_reference
from tests.kernels.packed import (
    RAGGED,
    assert_close_to_float64,
    borders,
    doubled,
    gradients,
    normal,
    strided,
)

FEATURES, HIDDEN, GATES = 18, 20, 17
LENGTHS = (*RAGGED, 300, 0)


def problem(branches: int, *, is_gated: bool = True) -> dict[str, Tensor | None]:
    return {
        "x": normal(sum(LENGTHS), FEATURES, seed=1),
        "cu_seqlens": borders(LENGTHS),
        "projection_weight": normal(HIDDEN, FEATURES, seed=2, scale=0.3),
        "projection_bias": normal(HIDDEN, seed=3),
        "weight_v": normal(GATES, HIDDEN, seed=4, scale=0.3),
        "bias_v": normal(GATES, seed=5),
        "weight_u": normal(GATES, HIDDEN, seed=6, scale=0.3) if is_gated else None,
        "bias_u": None,
        "weight_w": normal(branches, GATES, seed=8),
        "bias_w": normal(branches, seed=9),
    }


def ours(*, projection_weight: Tensor, projection_bias: Tensor | None, **given: Any) -> PooledBags:
    return gated_attention_pool(projection=(projection_weight, projection_bias), **given)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("branches", "keep", "options"),
    [
        (1, "all", {}),
        (5, "nothing", {"activation": "gelu"}),
        (2, "nothing", {"gate": "relu", "activation": "identity"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("chunk", [128, 65_536])
def test_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    branches: int,
    keep: str,
    options: dict[str, str],
    chunk: int,
) -> None:
    monkeypatch.setattr(kernels, "CHUNK_TILES", chunk)
    low = {
        name: t.to(dtype) if t is not None and t.is_floating_point() else t
        for name, t in problem(branches, is_gated=branches != 2).items()
    }
    mask = normal(sum(LENGTHS), branches, seed=10) > 0.9
    assert low["x"] is not None
    apart = {**low, "x": strided(low["x"]), "mask": mask}
    found, grads = gradients(ours, apart, keep=keep, **options)
    truth, true_grads = gradients(
        gated_attention_pool_reference, doubled({**low, "mask": mask}), **options
    )
    rtol = 2e-5 if dtype == torch.float32 else 1e-2
    for name, a, b in zip(PooledBags._fields, found, truth, strict=True):
        is_empty = b == -torch.inf
        assert (a[is_empty] == -torch.inf).all()
        assert_close_to_float64(a[~is_empty], b[~is_empty], rtol=rtol, what=name)
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], rtol=rtol, atol=1e-6, what=name)


def test_dropout_is_drawn_the_same_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_TILES", 128)
    settings: dict[str, Any] = {"dropout_p": 0.25, "projection_dropout_p": 0.25, "seed": 3}
    kept, kept_grads = gradients(ours, problem(2), keep="all", **settings)
    made, made_grads = gradients(ours, problem(2), keep="nothing", **settings)
    for a, b in zip(kept, made, strict=True):
        assert a.equal(b)
    for name, grad in kept_grads.items():
        assert_close_to_float64(grad, made_grads[name], what=name)
    # w's gradient by a difference quotient: the logits are linear in it for a fixed draw.
    given = problem(2)
    cotangents = [normal(*output.shape, seed=99 + i) for i, output in enumerate(kept)]

    def loss(w: Tensor) -> float:
        outputs = ours(**{**given, "weight_w": w}, **settings)
        filled = [torch.where(o > -torch.inf, o, 0.0) for o in outputs]
        return float(sum((o * c).double().sum() for o, c in zip(filled, cotangents, strict=True)))

    w = given["weight_w"]
    assert w is not None
    for unit in (0, GATES - 1):
        step = torch.zeros_like(w)
        step[0, unit] = 5e-3
        slope = (loss(w + step) - loss(w - step)) / 1e-2
        assert made_grads["weight_w"][0, unit].item() == pytest.approx(slope, rel=2e-2, abs=5e-2)
