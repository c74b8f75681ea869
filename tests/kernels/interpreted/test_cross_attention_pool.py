"""The kernels of cross_attention_pool, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.packed import assert_close_to_float64, doubled, gradients
from tests.kernels.test_cross_attention_pool import case, reference, with_weights, without_weights


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "m", "heads", "d", "dv"),
    [((0, 1, 2, 0, 63, 100, 300), 3, 2, 8, 5), ((513, 1), 1, 1, 16, 20), ((40,), 70, 1, 16, 4)],
)
def test_outputs_and_gradients(
    lengths: tuple[int, ...], m: int, heads: int, d: int, dv: int, dtype: torch.dtype
) -> None:
    inputs = case(lengths, m, heads, d, dv, dtype)
    rtol = 1e-5 if dtype is torch.float32 else 4e-3
    for ours, count in ((with_weights, 3), (without_weights, 2)):
        found, grads = gradients(ours, inputs)
        truth, true_grads = gradients(lambda **x: reference(**x)[:count], doubled(inputs))  # noqa: B023
        for output, expected in zip(found, truth, strict=True):
            assert_close_to_float64(output, expected, rtol=rtol)
        for name in ("q", "k", "v"):
            assert_close_to_float64(grads[name], true_grads[name], rtol=rtol, what=name)
