"""What the kernels' tests share: ragged bags, truths to compare with, recorded vectors.

Shapes: T tiles of all bags together, B bags. `cu_seqlens` is (B + 1,) int32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BAGSCOPE_DATA", ROOT.parent / "shared/data"))
INTERPRETED = Path(__file__).parent / "interpreted"

RAGGED = (0, 1, 2, 63, 0, 100, 7)
"""Lengths that divide no block, with empty bags at the front and inside."""
LONG_BESIDE_SHORT = (3, 1, 4097, 5, 9, 2, 6, 5, 3, 5, 8)
FLOOR = 1e-12


def borders(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    """Return the (B + 1,) int32 borders of bags of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    """Return normal numbers that are the same in every dtype but for its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def bags_of(packed: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Return the rows of each bag."""
    return [packed[a:b] for a, b in pairwise(cu_seqlens.tolist())]


def shuffle_within(cu_seqlens: Tensor, seed: int = 0) -> Tensor:
    """Return a (T,) permutation of the tiles that keeps each inside its bag."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        a + torch.randperm(b - a, generator=generator) for a, b in pairwise(cu_seqlens.tolist())
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def strided(tensor: Tensor) -> Tensor:
    """Return the same values, not contiguous in any dimension."""
    wide = tensor.new_full([2 * size for size in tensor.shape], float("nan"))
    wide[tuple(slice(None, None, 2) for _ in tensor.shape)] = tensor
    return wide[tuple(slice(None, None, 2) for _ in tensor.shape)]


def gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: dict[str, Tensor | None],
    cotangent_seed: int = 99,
    **settings: Any,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return outputs and the gradients of sum(output × fixed random numbers), by input name.

    Floating-point inputs get gradients; the rest, and `settings`, are handed on as they are.
    """
    leaves = {
        name: value.detach().clone().requires_grad_() if _is_real(value) else value
        for name, value in inputs.items()
    }
    found = function(**leaves, **settings)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    loss: Tensor = torch.zeros((), dtype=torch.float64)
    for index, output in enumerate(outputs):
        if not output.requires_grad:
            continue
        weights = normal(*output.shape, seed=cotangent_seed + index).to(output)
        loss = loss + (output * weights).double().sum().cpu()
    loss.backward()
    grads = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in leaves.items()
        if _is_real(value)
    }
    return [output.detach() for output in outputs], grads


def doubled(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Return the inputs with every floating-point tensor in float64."""
    return {name: value.double() if _is_real(value) else value for name, value in inputs.items()}


def _is_real(value: Tensor | None) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return max |found − truth| over max |truth|."""
    if not truth.numel():
        return 0.0
    difference = (found.detach().double().cpu() - truth.detach().double().cpu()).abs().max()
    return float(difference / truth.detach().double().abs().max().cpu().clamp_min(FLOOR))


def assert_close_to_float64(
    found: Tensor, truth: Tensor, *, rtol: float = 1e-5, atol: float = 0.0, what: str = ""
) -> None:
    """Check max |found − truth| ≤ rtol · max |truth| + atol, and that shapes agree."""
    assert found.shape == truth.shape, f"{what}: {tuple(found.shape)} for {tuple(truth.shape)}"
    if not truth.numel():
        return
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    worst = (found - truth).abs().max()
    allowed = rtol * truth.abs().max() + atol
    assert worst <= allowed, f"{what}: off by {worst:.3e}, allowed {allowed:.3e}"


def assert_at_most_twice(
    found: Tensor, plain: Tensor, truth: Tensor, *, allowance: float = 1e-3, what: str = ""
) -> None:
    """Check that `found` errs at most twice as much as `plain` torch in the same dtype does."""
    ours, theirs = relative_error(found, truth), relative_error(plain, truth)
    assert ours <= 2 * theirs + allowance, f"{what}: error {ours:.2e}, plain torch {theirs:.2e}"


def vectors(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a recorded file; skip the test where it is absent.

    `config` and `label` of the metadata are parsed.
    """
    path = DATA / "vectors" / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no recorded vectors ({path.name})")
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        meta: dict[str, Any] = dict(handle.metadata())
    for key in ("config", "label"):
        if key in meta:
            meta[key] = json.loads(meta[key])
    return tensors, meta


def run_interpreted(file: str, timeout_s: float = 280) -> None:
    """Run tests/kernels/interpreted/`file` with Triton's interpreter, in a process of its own.

    Triton reads the switch when it is imported, so a process has it or has it not.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", INTERPRETED / file],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "BAGSCOPE_KERNELS": "interpret"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2000:]
