"""Kernels at every width of heads and far into memory, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.every_op import OPS
from tests.kernels.packed import assert_close_to_float64, borders, doubled, gradients, normal


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("width", [16, 48, 128])
@pytest.mark.parametrize(
    "name", ["cross_attention_pool", "linear_attention", "neighbourhood_attention", "ssd_scan"]
)
def test_heads_of_any_width(name: str, width: int) -> None:
    op = OPS[name]
    inputs = op.inputs((0, 5, 70), width=width)
    found, grads = gradients(op.call, inputs)
    truth, true_grads = gradients(op.call, doubled(inputs))
    for a, b in zip(found, truth, strict=True):
        assert_close_to_float64(a, b)
    for key, grad in grads.items():
        assert_close_to_float64(grad, true_grads[key], atol=1e-6, what=key)


def far_apart(rows: Tensor) -> Tensor:
    """Return the same rows so far from each other that the last is beyond 2³¹ elements.

    The system gives memory to the few pages that are written.
    """
    step = (1 << 31) // (len(rows) - 1) + 64
    where = torch.empty_strided(rows.shape, (step, *rows.stride()[1:]), dtype=rows.dtype)
    return where.copy_(rows)


@pytest.mark.parametrize(
    "name", ["cross_attention_pool", "linear_attention", "segment_softmax_pool"]
)
def test_offsets_beyond_two_to_the_31st_element(name: str) -> None:
    op = OPS[name]
    inputs = op.inputs((3, 2), torch.float16)
    apart = {
        key: far_apart(value) if key in op.per_tile and value is not None else value
        for key, value in inputs.items()
    }
    with torch.no_grad():
        found, expected = op.call(**apart), op.call(**inputs)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("branches", range(1, 17))
def test_any_number_of_branches(branches: int) -> None:
    op = OPS["segment_softmax_pool"]
    inputs: dict[str, Tensor | None] = {
        "scores": normal(20, branches, seed=1),
        "h": normal(20, 16, seed=2),
        "cu_seqlens": borders((0, 17, 3)),
    }
    found, grads = gradients(op.call, inputs)
    truth, true_grads = gradients(op.call, doubled(inputs))
    for a, b in zip(found, truth, strict=True):
        assert_close_to_float64(a, b)
    for key, grad in grads.items():
        assert_close_to_float64(grad, true_grads[key], atol=1e-6, what=key)
