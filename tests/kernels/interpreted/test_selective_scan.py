"""The kernels of selective_scan, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from bagscope.kernels.selective_scan import selective_scan
from tests.kernels.packed import assert_close_to_float64, gradients
from tests.kernels.test_selective_scan import problem, settings

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("lengths", "features", "dtype", "reverse", "bare"),
    [
        ((20, 0, 1, 15), 3, torch.float32, False, False),
        ((5, 28), 3, torch.float16, True, False),
        ((33,), 17, torch.float32, True, True),
    ],
)
def test_outputs_and_gradients(
    lengths: tuple[int, ...],
    features: int,
    dtype: torch.dtype,
    reverse: bool,
    bare: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = problem(sum(lengths), features, 2, dtype)
    options = settings(lengths, reverse, shuffled=not bare)
    if bare:
        inputs |= {"D": None, "z": None, "delta_bias": None}
        assert inputs["delta"] is not None
        inputs["delta"], options["delta_softplus"] = inputs["delta"].abs(), False
    (found,), grads = gradients(selective_scan, inputs, **options)
    monkeypatch.setenv("BAGSCOPE_KERNELS", "cpu")
    (expected,), expected_grads = gradients(selective_scan, inputs, **options)
    rtol = 1e-5 if dtype is torch.float32 else 2e-3
    assert found.dtype == dtype
    assert_close_to_float64(found, expected, rtol=rtol)
    for name in grads:
        assert_close_to_float64(grads[name], expected_grads[name], rtol=rtol, what=name)


def test_a_broken_bag_leaves_the_others_alone() -> None:
    inputs, options = problem(12, 2, 1), settings((5, 7), False, False)
    (clean,), _ = gradients(selective_scan, inputs, **options)
    assert inputs["u"] is not None
    inputs["u"][2] = float("nan")
    (found,), grads = gradients(selective_scan, inputs, **options)
    torch.testing.assert_close(found[5:], clean[5:])
    assert found[4].isnan().all() and grads["u"][5:].isfinite().all()
