"""The kernels of ssd_scan, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from bagscope.kernels.ssd_scan import ssd_scan
from tests.kernels.packed import assert_close_to_float64, borders, gradients
from tests.kernels.test_ssd_scan import problem

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "bare"), [((20, 0, 1, 130, 2, 3), False), ((70,), True), ((16, 16), False)]
)
def test_outputs_and_gradients(
    lengths: tuple[int, ...], bare: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem(sum(lengths), dtype=dtype)
    if bare:
        inputs |= {"D": None, "z": None}
    (found,), grads = gradients(ssd_scan, inputs, cu_seqlens=borders(lengths))
    monkeypatch.setenv("BAGSCOPE_KERNELS", "cpu")
    (expected,), expected_grads = gradients(ssd_scan, inputs, cu_seqlens=borders(lengths))
    rtol = 1e-5 if dtype is torch.float32 else 2e-3
    assert found.dtype == dtype
    assert_close_to_float64(found, expected, rtol=rtol)
    for name in grads:
        assert_close_to_float64(grads[name], expected_grads[name], rtol=rtol, what=name)
