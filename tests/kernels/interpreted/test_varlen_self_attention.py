"""The kernels of neighbourhood attention, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_varlen_self_attention import case, check, ragged_tissue


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "heads", "d", "dv", "r"),
    [((0, 1, 2, 0, 63, 100), 2, 8, 5, 2), ((300, 1), 1, 16, 20, 0), ((200,), 1, 4, 4, 50)],
)
def test_outputs_and_gradients(
    lengths: tuple[int, ...], heads: int, d: int, dv: int, r: int, dtype: torch.dtype
) -> None:
    rtol = 1e-5 if dtype is torch.float32 else 5e-3
    check(case(lengths, heads, d, dv, dtype), (ragged_tissue(sum(lengths)), r), rtol)
