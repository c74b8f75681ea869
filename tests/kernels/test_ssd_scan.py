"""The scan of Mamba-2: against float64, against the recorded originals, over borders of bags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.causal_conv1d import causal_conv1d
from bagscope.kernels.ssd_scan import ssd_scan, ssd_scan_reference
from tests.kernels.packed import (
    LONG_BESIDE_SHORT,
    RAGGED,
    assert_at_most_twice,
    assert_close_to_float64,
    borders,
    doubled,
    gradients,
    normal,
    run_interpreted,
    strided,
    vectors,
)


def problem(
    tiles: int,
    heads: int = 4,
    width: int = 5,
    groups: int = 2,
    states: int = 3,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    return {
        "x": normal(tiles, heads, width, seed=1, dtype=dtype),
        "dt": normal(tiles, heads, seed=2, dtype=dtype).abs(),
        "A": -normal(heads, seed=3, dtype=dtype).abs() - 0.01,
        "B": normal(tiles, groups, states, seed=4, dtype=dtype),
        "C": normal(tiles, groups, states, seed=5, dtype=dtype),
        "D": normal(heads, seed=6, dtype=dtype),
        "z": normal(tiles, heads, width, seed=7, dtype=dtype),
    }


def compare(inputs: dict[str, Tensor | None], options: dict[str, Any], rtol: float = 1e-5) -> None:
    (found,), grads = gradients(ssd_scan, inputs, **options)
    (truth,), expected = gradients(ssd_scan_reference, doubled(inputs), **options)
    assert_close_to_float64(found, truth, rtol=rtol, what="output")
    for name in grads:
        assert_close_to_float64(grads[name], expected[name], rtol=rtol, what=name)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (2,), (63,), (100,), RAGGED, (3,) * 30])
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_outputs_and_gradients(lengths: tuple[int, ...], chunk: int) -> None:
    compare(problem(sum(lengths)), {"cu_seqlens": borders(lengths), "chunk": chunk})


def test_a_long_bag_beside_short_ones() -> None:
    options = {"cu_seqlens": borders(LONG_BESIDE_SHORT), "chunk": 256}
    compare(problem(sum(LONG_BESIDE_SHORT), 2, 3, 1, 2), options)


def test_optional_inputs_may_be_missing_and_the_rest_strided() -> None:
    inputs = {name: None if t is None else strided(t) for name, t in problem(70).items()}
    compare({**inputs, "D": None, "z": None}, {"cu_seqlens": borders((30, 40))})


def test_gradients_by_differences() -> None:
    inputs = problem(7, 2, 2, 1, 3, torch.float64)
    leaves = [t.requires_grad_() for t in inputs.values() if t is not None]
    cu_seqlens = borders((4, 0, 3))
    assert torch.autograd.gradcheck(lambda *t: ssd_scan(*t, cu_seqlens, 3), leaves)


def test_large_sums_lose_nothing() -> None:
    # Sums of thousands, whose neighbours differ by little: their differences must be exact.
    inputs = problem(256)
    assert inputs["dt"] is not None and inputs["A"] is not None
    inputs["dt"], inputs["A"] = inputs["dt"] * 0 + 1e-3, inputs["A"] * 0 - 1
    inputs["dt"][:200] = 50.0
    compare(inputs, {"cu_seqlens": borders((256,)), "chunk": 256})


def test_packed_is_one_by_one() -> None:
    inputs, options = problem(sum(RAGGED), dtype=torch.float64), {"chunk": 16}
    packed = ssd_scan(*inputs.values(), borders(RAGGED), **options)
    at = 0
    for length in RAGGED:
        rows = slice(at, at + length)
        bag = [t if t is None or len(t) != sum(RAGGED) else t[rows] for t in inputs.values()]
        alone = ssd_scan(*bag, borders((length,)), **options)
        torch.testing.assert_close(packed[rows], alone, rtol=1e-11, atol=1e-12)
        at += length


def test_the_same_input_gives_the_same_bits() -> None:
    inputs, options = problem(300), {"cu_seqlens": borders((100, 200))}
    first, second = (gradients(ssd_scan, inputs, **options) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_plain_torch(dtype: torch.dtype) -> None:
    inputs, options = problem(80, dtype=dtype), {"cu_seqlens": borders((50, 30)), "chunk": 16}
    wide = {name: None if t is None else t.float() for name, t in inputs.items()}
    (found,), grads = gradients(ssd_scan, inputs, **options)
    (plain,), plain_grads = gradients(ssd_scan_reference, inputs, **options)
    (truth,), expected = gradients(ssd_scan_reference, wide, **options)
    assert found.dtype == dtype
    assert_at_most_twice(found, plain, truth)
    for name in grads:
        assert_at_most_twice(grads[name], plain_grads[name], expected[name], what=name)


def test_it_compiles_into_one_graph() -> None:
    inputs, options = problem(70), {"cu_seqlens": borders((30, 40)), "chunk": 16}
    compiled = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")
    (found,), grads = gradients(compiled, inputs, **options)
    (expected,), expected_grads = gradients(ssd_scan, inputs, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_misuse_is_refused_in_words() -> None:
    inputs = problem(10)
    with pytest.raises(ValueError, match="must rise"):
        ssd_scan(*inputs.values(), borders((4,)))
    with pytest.raises(ValueError, match="chunk is 0"):
        ssd_scan(*inputs.values(), borders((10,)), 0)
    with pytest.raises(ValueError, match="a divisor of H"):
        ssd_scan(*{**inputs, "B": normal(10, 3, 3)}.values(), borders((10,)))
    with pytest.raises(ValueError, match=r"dt is \(10, 3\)"):
        ssd_scan(*{**inputs, "dt": normal(10, 3)}.values(), borders((10,)))


# --- recorded originals ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["short", "long"])
def test_recorded_scan(variant: str) -> None:
    tensors, meta = vectors(f"ssd_{variant}_A")
    names = ("x", "dt", "A", "B", "C")
    given = {n: tensors[f"input/{n}"] for n in names}
    leaves = {n: (t if n == "A" else t[0]).clone().requires_grad_() for n, t in given.items()}
    cu_seqlens = borders((leaves["x"].shape[0],))
    y = ssd_scan(*leaves.values(), None, None, cu_seqlens, meta["config"]["chunk"])
    y.backward(tensors["input/cotangent"][0])
    assert_close_to_float64(y, tensors["output/y"][0])
    for name, leaf in leaves.items():
        expected = tensors[f"grad/{name}"]
        assert_close_to_float64(
            leaf.grad, expected if name == "A" else expected[0], rtol=1e-4, what=name
        )


def test_recorded_block() -> None:
    tensors, meta = vectors("mamba2-block_simple_A")
    config = meta["config"]
    weights = {
        key.removeprefix("weights/"): value.clone().requires_grad_()
        for key, value in tensors.items()
        if key.startswith("weights/")
    }
    x = tensors["input/x"].clone().requires_grad_()
    tiles, inner, states = len(x), config["expand"] * config["d_model"], config["d_state"]
    heads, cu_seqlens = inner // config["headdim"], borders((tiles,))
    z, mixed, dt = torch.split(
        x @ weights["in_proj.weight"].t(), [inner, inner + 2 * states, heads], 1
    )
    taps = weights["conv1d.weight"][:, 0]
    mixed = causal_conv1d(mixed, taps, weights["conv1d.bias"], True, cu_seqlens)
    values, b, c = torch.split(mixed, [inner, states, states], 1)
    y = ssd_scan(
        values.unflatten(1, (heads, -1)), F.softplus(dt + weights["dt_bias"]),
        -weights["A_log"].exp(), b[:, None], c[:, None], weights["D"],
        z.unflatten(1, (heads, -1)), cu_seqlens, config["chunk"],
    ).flatten(1)  # fmt: skip
    y = F.rms_norm(y, (inner,), weights["norm.weight"], 1e-5)
    out = y @ weights["out_proj.weight"].t()
    out.backward(tensors["input/cotangent"])
    assert_close_to_float64(out, tensors["output/out"], rtol=1e-4)
    assert_close_to_float64(x.grad, tensors["grad/x"], rtol=1e-4, what="x")
    for key, weight in weights.items():
        assert_close_to_float64(weight.grad, tensors[f"grad/{key}"], rtol=1e-4, what=key)


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("test_ssd_scan.py")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    inputs, lengths = problem(4200, 4, 64, 2, 128, dtype), (0, 1, 2, 100, 4097)
    (plain,), expected = gradients(ssd_scan, inputs, cu_seqlens=borders(lengths))
    there = {name: None if t is None else t.cuda() for name, t in inputs.items()}
    (found,), grads = gradients(ssd_scan, there, cu_seqlens=borders(lengths, "cuda"))
    rtol = 1e-4 if dtype is torch.float32 else 2e-2
    assert_close_to_float64(found, plain, rtol=rtol)
    for name in grads:
        assert_close_to_float64(grads[name], expected[name], rtol=rtol, what=name)
