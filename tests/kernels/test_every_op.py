"""What holds for every operation alike: packing, repetition, widths of heads, compilation."""

from __future__ import annotations

import shutil
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.every_op import OPS, Op
from tests.kernels.packed import (
    RAGGED,
    assert_close_to_float64,
    borders,
    doubled,
    gradients,
    normal,
    run_interpreted,
)

WITH_HEADS = (
    "agent_attention", "cross_attention_pool", "flow_attention", "inline_attention",
    "linear_attention", "neighbourhood_attention", "nystrom_attention", "ssd_scan",
    "varlen_self_attention",
)  # fmt: skip
HALVES = [torch.float16, torch.bfloat16]
LONG = (3, 1, 50_000, 5, 9, 2, 6, 0, 3, 5, 8)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(autouse=True)
def deterministic_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's deterministic algorithms, and poisoned memory with them, take cuBLAS."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def step(
    op: Op, inputs: dict[str, Tensor | None], weights: list[Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the outputs, and the gradients of their sum with these weights."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in inputs.items()
        if value is not None and value.is_floating_point()
    }
    found = op.call(**{**inputs, **leaves})
    loss = torch.stack([(out * w).sum() for out, w in zip(found, weights, strict=True)]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return found, dict(zip(leaves, grads, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", OPS)
def test_packed_is_one_by_one(name: str) -> None:
    op = OPS[name]
    inputs = op.inputs(RAGGED, torch.float64)
    weights = [
        normal(*out.shape, seed=40 + i, dtype=torch.float64)
        for i, out in enumerate(op.call(**inputs))
    ]
    packed, packed_grads = step(op, inputs, weights)
    sums = {key: torch.zeros_like(grad) for key, grad in packed_grads.items()}
    for bag, (a, b) in enumerate(pairwise(borders(RAGGED).tolist())):
        rows, place = slice(a, b), slice(bag, bag + 1) if op.pools else slice(a, b)
        alone = {
            key: value[rows] if key in op.per_tile and value is not None else value
            for key, value in inputs.items()
        }
        alone["cu_seqlens"] = borders([b - a])
        found, grads = step(op, alone, [w[place] for w in weights])
        for mine, whole in zip(found, packed, strict=True):
            torch.testing.assert_close(mine, whole[place], rtol=1e-9, atol=1e-10)
        for key, grad in grads.items():
            sums[key][rows if key in op.per_tile else slice(None)] += grad
    for key, grad in packed_grads.items():
        torch.testing.assert_close(sums[key], grad, rtol=1e-8, atol=1e-9, msg=key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_the_same_input_gives_the_same_bits(name: str, device: str) -> None:
    lengths = (0, 1, 2, 63, 100, 4097) if device == "cuda" else (0, 1, 2, 63, 600)
    inputs = OPS[name].inputs(lengths, device=device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (gradients(OPS[name].call, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert all(torch.equal(first[1][key], again[1][key]) for key in first[1])


@pytest.mark.parametrize("width", [16, 24, 32, 48, 64, 80, 96, 128])
@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_of_any_width(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[name]
    inputs = op.inputs((0, 5, 70), heads=2, width=width)
    found, grads = gradients(op.call, inputs)
    monkeypatch.setenv("BAGSCOPE_KERNELS", "reference")
    truth, true_grads = gradients(op.call, doubled(inputs))
    for a, b in zip(found, truth, strict=True):
        assert_close_to_float64(a, b)
    for key, grad in grads.items():
        assert_close_to_float64(grad, true_grads[key], atol=1e-6, what=key)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.slow
def test_one_compilation_serves_every_number_of_tiles(name: str) -> None:
    torch._dynamo.reset()
    op, counter = OPS[name], CompileCounterWithBackend("aot_eager")
    # The first call tries this machine's arithmetic, which counts as a change of torch's state.
    op.call(**op.inputs((3, 30)))
    compiled = torch.compile(op.call, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for lengths in [(17, 50), (30, 61), (2, 99)]:
        inputs = op.inputs(lengths)
        found, grads = gradients(compiled, inputs)
        truth, true_grads = gradients(op.call, inputs)
        for a, b in zip(found, truth, strict=True):
            assert_close_to_float64(a, b)
        for key, grad in grads.items():
            assert_close_to_float64(grad, true_grads[key], atol=1e-6, what=key)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segment_softmax_pool", "linear_attention"])
def test_compiles_with_inductor(name: str) -> None:
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler")
    inputs = OPS[name].inputs((3, 63, 100))
    with warnings.catch_warnings():
        # Inductor's own imports warn of other packages' futures.
        warnings.simplefilter("ignore")
        found, grads = gradients(torch.compile(OPS[name].call, fullgraph=True), inputs)
    expected, expected_grads = gradients(OPS[name].call, inputs)
    for a, b in zip(found, expected, strict=True):
        assert_close_to_float64(a, b)
    for key, grad in grads.items():
        assert_close_to_float64(grad, expected_grads[key], what=key)


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    run_interpreted("test_every_op.py")


# --- on a GPU -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "width"),
    # Each form is compiled, which takes seconds.
    [*((dtype, 64) for dtype in (torch.float32, *HALVES)), (HALVES[1], 16), (HALVES[1], 128)],
    ids=str,
)
@pytest.mark.parametrize("name", OPS)
def test_on_a_gpu(name: str, width: int, dtype: torch.dtype) -> None:
    op = OPS[name]
    lengths = (1, 2, 63, 100, 4097)
    inputs = op.inputs(lengths, dtype, width=width)
    found, grads = gradients(op.call, op.inputs(lengths, dtype, width=width, device="cuda"))
    truth, true_grads = gradients(op.call, doubled(inputs))
    # Sums of 4,097 products of 10 bits.
    rtol = 1e-3 if dtype is torch.float32 else 3e-2
    for a, b in zip(found, truth, strict=True):
        assert_close_to_float64(a, b, rtol=rtol)
    for key, grad in grads.items():
        assert_close_to_float64(grad, true_grads[key], rtol=rtol, atol=1e-5, what=key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name in OPS if name != "varlen_self_attention"])
def test_a_very_long_bag_beside_ten_small_ones_on_a_gpu(name: str) -> None:
    op = OPS[name]
    found, grads = gradients(op.call, op.inputs(LONG, heads=1, device="cuda"))
    truth, true_grads = gradients(op.call, doubled(op.inputs(LONG, heads=1)))
    for a, b in zip(found, truth, strict=True):
        assert_close_to_float64(a, b, rtol=1e-3)
    for key, grad in grads.items():
        assert_close_to_float64(grad, true_grads[key], rtol=1e-3, atol=1e-5, what=key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "name", ["causal_conv1d", "cross_attention_pool", "linear_attention", "segment_softmax_pool"]
)
def test_rows_beyond_two_to_the_31st_element_on_a_gpu(name: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    op, heads, width, last = OPS[name], 16, 128, 100
    few = op.inputs((last,), torch.float16, heads=heads, width=width, device="cuda")
    before = (1 << 31) // (heads * width)
    many = {
        key: torch.cat([value.new_zeros(before, *value.shape[1:]), value])
        if key in op.per_tile and value is not None
        else value
        for key, value in few.items()
    }
    many["cu_seqlens"] = borders([before, last], "cuda")
    with torch.no_grad():
        alone, beside = op.call(**few), op.call(**many)
    for a, b in zip(alone, beside, strict=True):
        torch.testing.assert_close(b[-len(a) :], a, rtol=1e-3, atol=1e-3)
