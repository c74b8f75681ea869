"""The kernels of linear attention, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_linear_attention import RELATIVES, bag_by_bag, case, check, check_linear

LENGTHS = (0, 1, 63, 200)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("feature_map", "normalise", "d", "dv"),
    [("elu+1", "denominator", 8, 5), ("silu", "none", 16, 1), ("relu", "length", 1, 20)],
)
def test_outputs_and_gradients(
    feature_map: str, normalise: str, d: int, dv: int, dtype: torch.dtype
) -> None:
    rtol = 1e-5 if dtype is torch.float32 else 3e-3
    check_linear(case(LENGTHS, 2, d, dv, dtype), feature_map, normalise, rtol)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", RELATIVES)
def test_relatives(name: str) -> None:
    ours, plain = RELATIVES[name]
    check(ours, lambda **x: bag_by_bag(plain, **x), case((0, 5, 140), heads=1, dv=5))
