"""The float32 policy: what it takes from a trial, and that what it takes is float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bagscope.kernels import dispatch


@pytest.fixture(autouse=True)
def _own_trial() -> Iterator[None]:
    dispatch.float32_policy.cache_clear()
    yield
    dispatch.float32_policy.cache_clear()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize(
    ("medium", "wanted"),
    [
        ((0.4, 4e-7), "medium"),
        ((0.95, 4e-7), "highest"),
        ((0.4, 2e-3), "highest"),
    ],
    ids=["fast and exact", "no faster", "bfloat16 in disguise"],
)
def test_only_products_that_are_faster_and_as_exact_are_taken(
    medium: tuple[float, float], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = {"highest": dispatch._Trial(1.0, 3e-7), "medium": dispatch._Trial(*medium)}
    monkeypatch.setattr(dispatch, "_trials", lambda: trials)
    assert dispatch.float32_policy()[0] == wanted


@pytest.mark.parametrize("depth", [64, 512, 4096])
def test_products_under_the_policy_err_as_float32_does(depth: int) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(96, depth, generator=generator)
    before = torch.get_float32_matmul_precision()
    with dispatch.own_arithmetic():
        found = a @ a.T
    exact = a.double() @ a.T.double()
    assert float((found.double() - exact).norm() / exact.norm()) < 2e-6
    assert torch.get_float32_matmul_precision() == before
