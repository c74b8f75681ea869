from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bagscope.kernels.gated_scores import gated_scores
from bagscope.kernels.gated_scores import triton as kernels
from bagscope.kernels.gated_scores.reference import gated_scores_reference
from tests.kernels.packed import assert_close_to_float64, doubled, gradients, normal, strided

TILES, FEATURES, HIDDEN = 130, 20, 40


def problem(
    branches: int, *, is_gated: bool, has_biases: bool, tiles: int = TILES
) -> dict[str, Tensor | None]:
    return {
        "h": normal(tiles, FEATURES, seed=1),
        "weight_v": normal(HIDDEN, FEATURES, seed=2, scale=0.3),
        "bias_v": normal(HIDDEN, seed=3) if has_biases else None,
        "weight_u": normal(HIDDEN, FEATURES, seed=4, scale=0.3) if is_gated else None,
        "bias_u": None,
        "weight_w": normal(branches, HIDDEN, seed=6),
        "bias_w": normal(branches, seed=7) if has_biases else None,
    }


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize(
    ("branches", "gate", "is_gated", "has_biases"),
    [(1, "tanh", True, True), (5, "tanh", True, False), (16, "relu", False, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    branches: int,
    gate: str,
    is_gated: bool,
    has_biases: bool,
    keep: str,
) -> None:
    monkeypatch.setattr(kernels, "CHUNK_TILES", 96)
    given = problem(branches, is_gated=is_gated, has_biases=has_biases)
    low = {name: None if t is None else t.to(dtype) for name, t in given.items()}
    found, grads = gradients(gated_scores, low, gate=gate, keep=keep)
    truth, true_grads = gradients(gated_scores_reference, doubled(low), gate=gate)
    rtol = 1e-5 if dtype == torch.float32 else 5e-3
    assert_close_to_float64(found[0], truth[0], rtol=rtol)
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], rtol=rtol, what=name)


@pytest.mark.parametrize("tiles", [0, 1, 63])
def test_any_number_of_strided_tiles(tiles: int) -> None:
    given = problem(2, is_gated=True, has_biases=True, tiles=tiles)
    assert given["h"] is not None
    found, grads = gradients(gated_scores, {**given, "h": strided(given["h"])})
    truth, true_grads = gradients(gated_scores_reference, doubled(given))
    assert_close_to_float64(found[0], truth[0])
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], what=name)


@pytest.mark.parametrize("keep", ["all", "nothing"])
def test_dropout_is_drawn_the_same_in_both_passes(
    monkeypatch: pytest.MonkeyPatch, keep: Any
) -> None:
    monkeypatch.setattr(kernels, "CHUNK_TILES", 64)
    given = problem(1, is_gated=True, has_biases=True)
    eye: dict[str, Tensor | None] = {**given, "bias_w": None}
    settings: dict[str, Any] = {"dropout_p": 0.3, "seed": 5, "keep": keep}
    # One branch per hidden unit shows the dropout; the kernel takes sixteen at a time.
    seen = torch.cat(
        [
            gated_scores(**{**eye, "weight_w": torch.eye(HIDDEN)[i : i + 8]}, **settings)
            for i in range(0, HIDDEN, 8)
        ],
        1,
    )
    whole = torch.cat(
        [
            gated_scores(**{**eye, "weight_w": torch.eye(HIDDEN)[i : i + 8]})
            for i in range(0, HIDDEN, 8)
        ],
        1,
    )
    scale = 1 / 0.7**2
    kept = seen != 0
    assert_close_to_float64(seen[kept], whole[kept] * scale)
    assert kept.double().mean().item() == pytest.approx(0.49, abs=0.03)
    # Linear in w: its gradient is the dropped activations, weighted by the cotangent.
    found, grads = gradients(gated_scores, given, **settings)
    cotangent = normal(*found[0].shape, seed=99)
    assert_close_to_float64(grads["weight_w"], (cotangent.T @ seen).double(), rtol=1e-5)
    # V's bias, by difference quotients: backward drew what forward drew.
    step = 1e-2
    for unit in (0, HIDDEN - 1):
        shifted = []
        for sign in (1, -1):
            assert given["bias_v"] is not None
            bias = given["bias_v"].clone()
            bias[unit] += sign * step
            shifted.append(
                (gated_scores(**{**given, "bias_v": bias}, **settings) * cotangent).double().sum()
            )
        slope = (shifted[0] - shifted[1]) / (2 * step)
        assert grads["bias_v"][unit].item() == pytest.approx(slope.item(), rel=2e-2, abs=2e-2)
