"""The kernels of causal_conv1d, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from bagscope.kernels.causal_conv1d import causal_conv1d
from tests.kernels.packed import assert_close_to_float64, gradients
from tests.kernels.test_causal_conv1d import problem, settings

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "taps", "reverse", "bare"),
    [((20, 0, 1, 130, 2, 3), 4, True, False), ((70,), 2, False, True)],
)
def test_outputs_and_gradients(
    lengths: tuple[int, ...],
    taps: int,
    reverse: bool,
    bare: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = problem(sum(lengths), 17, taps, dtype)
    options = settings(lengths, reverse, shuffled=not bare)
    if bare:
        inputs["bias"], options["silu"] = None, False
    (found,), grads = gradients(causal_conv1d, inputs, **options)
    monkeypatch.setenv("BAGSCOPE_KERNELS", "cpu")
    (expected,), expected_grads = gradients(causal_conv1d, inputs, **options)
    rtol = 1e-5 if dtype is torch.float32 else 2e-3
    assert found.dtype == dtype
    assert_close_to_float64(found, expected, rtol=rtol)
    for name in grads:
        assert_close_to_float64(grads[name], expected_grads[name], rtol=rtol, what=name)


def test_a_broken_bag_leaves_the_others_alone() -> None:
    inputs, options = problem(30, 2), settings((10, 20), False, False)
    (clean,), clean_grads = gradients(causal_conv1d, inputs, **options)
    assert inputs["x"] is not None
    inputs["x"][10] = float("nan")
    (found,), grads = gradients(causal_conv1d, inputs, **options)
    assert torch.equal(found[:10], clean[:10]) and found[10].isnan().all()
    assert torch.equal(grads["x"][:10], clean_grads["x"][:10])
