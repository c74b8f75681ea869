"""Attention that pays for distance: its formula in float64, and what every operation holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bagscope.kernels.varlen_self_attention import alibi
from bagscope.kernels.varlen_self_attention.alibi import (
    alibi_attention,
    alibi_attention_reference,
)
from tests.kernels.packed import (
    RAGGED,
    assert_close_to_float64,
    borders,
    doubled,
    gradients,
    normal,
)


def case(
    lengths: tuple[int, ...] = RAGGED, heads: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    tiles = sum(lengths)
    places = normal(tiles, 3, seed=3, dtype=dtype, scale=2.0)
    places[::5] = torch.nan
    return {
        "q": normal(tiles, heads, 8, dtype=dtype),
        "k": normal(tiles, heads, 8, seed=1, dtype=dtype),
        "v": normal(tiles, heads, 5, seed=2, dtype=dtype),
        "cu_seqlens": borders(lengths),
        "places": places,
        "slopes": torch.tensor([0.5, 0.25], dtype=dtype)[:heads],
    }


def check(inputs: dict[str, Tensor | None], rtol: float = 1e-5) -> None:
    found, grads = gradients(alibi_attention, inputs)
    truth, true_grads = gradients(alibi_attention_reference, doubled(inputs), scale=8**-0.5)
    assert_close_to_float64(found[0], truth[0], rtol=rtol)
    for name in "qkv":
        assert_close_to_float64(grads[name], true_grads[name], rtol=rtol, atol=1e-6, what=name)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", [RAGGED, (0,), (1,), (0, 300, 0, 1)])
def test_outputs_and_gradients(lengths: tuple[int, ...]) -> None:
    check(case(lengths))


def test_bags_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alibi, "_QUERIES", 16)
    monkeypatch.setattr(alibi, "_KEYS", 24)
    check(case((3, 130, 24, 16)))


def test_places_far_from_the_origin_cost_no_accuracy() -> None:
    inputs = case((0, 90))
    places = inputs["places"]
    assert places is not None
    inputs["places"] = places + 2.0**14
    near, far = case((0, 90)), inputs
    near["places"] = inputs["places"] - 2.0**14
    assert_close_to_float64(alibi_attention(**far), alibi_attention(**near), rtol=1e-6)  # type: ignore[arg-type]


def test_without_slopes_it_is_plain_attention() -> None:
    inputs: dict[str, Any] = case()
    inputs["slopes"] = torch.zeros(2)
    parts = []
    for a, b in zip(inputs["cu_seqlens"][:-1], inputs["cu_seqlens"][1:], strict=True):
        q, k, v = (inputs[name][a:b].transpose(0, 1)[None].double() for name in "qkv")
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        parts.append(out[0].transpose(0, 1))
    assert_close_to_float64(alibi_attention(**inputs), torch.cat(parts), rtol=1e-5)


def attending() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return attention of q, k and v, and these in float64."""
    inputs: dict[str, Any] = case((1, 5), dtype=torch.float64)
    leaves = tuple(inputs.pop(name).requires_grad_() for name in "qkv")
    return lambda q, k, v: alibi_attention(q, k, v, **inputs), leaves


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(*attending())


@pytest.mark.slow
def test_compilation() -> None:
    attend, leaves = attending()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), attend(*leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_bags(dtype: torch.dtype) -> None:
    inputs = case(dtype=dtype)
    inputs["places"] = case()["places"]
    found = alibi_attention(**inputs)  # type: ignore[arg-type]
    truth = alibi_attention_reference(**doubled(inputs), scale=8**-0.5)  # type: ignore[arg-type]
    assert found.dtype == dtype
    assert_close_to_float64(found, truth, rtol=torch.finfo(dtype).eps)


def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs: dict[str, Any] = case()
    with pytest.raises(ValueError, match=r"slopes are .*\(3,\); pass"):
        alibi_attention(**{**inputs, "slopes": torch.ones(3)})
