"""The kernels of merge_partials, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from bagscope.kernels.merge_partials import merge_partials
from tests.kernels.packed import assert_close_to_float64, gradients
from tests.kernels.test_merge_partials import partials


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pieces", [1, 5])
def test_outputs_and_gradients(
    pieces: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = partials(pieces, dtype)
    found, grads = gradients(merge_partials, inputs)
    monkeypatch.setenv("BAGSCOPE_KERNELS", "cpu")
    expected, expected_grads = gradients(merge_partials, inputs)
    rtol = 1e-5 if dtype is torch.float32 else 1e-3
    assert torch.equal(found[1].isinf(), expected[1].isinf())
    for a, b in zip([*found, *grads.values()], [*expected, *expected_grads.values()], strict=True):
        assert a.dtype == b.dtype
        assert_close_to_float64(a.nan_to_num(neginf=0), b.nan_to_num(neginf=0), rtol=rtol)
