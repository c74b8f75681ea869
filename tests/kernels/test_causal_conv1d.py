"""The causal convolution: against torch's own bag by bag, and against the recorded original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bagscope.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference
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
    shuffle_within,
    strided,
    vectors,
)


def problem(
    tiles: int, features: int = 5, taps: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    return {
        "x": normal(tiles, features, seed=1, dtype=dtype),
        "weight": normal(features, taps, seed=2, dtype=dtype),
        "bias": normal(features, seed=3, dtype=dtype),
    }


def settings(lengths: tuple[int, ...], reverse: bool, shuffled: bool) -> dict[str, Any]:
    cu_seqlens = borders(lengths)
    order = shuffle_within(cu_seqlens) if shuffled else None
    return {"silu": True, "cu_seqlens": cu_seqlens, "reverse": reverse, "order": order}


def compare(inputs: dict[str, Tensor | None], options: dict[str, Any]) -> None:
    (found,), grads = gradients(causal_conv1d, inputs, **options)
    (truth,), expected = gradients(causal_conv1d_reference, doubled(inputs), **options)
    assert_close_to_float64(found, truth, what="output")
    for name in grads:
        assert_close_to_float64(grads[name], expected[name], what=name)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "lengths", [(), (0,), (1,), (2,), (63,), (100,), RAGGED, (1,) * 40, LONG_BESIDE_SHORT]
)
@pytest.mark.parametrize(("reverse", "shuffled"), [(False, False), (True, True)])
def test_outputs_and_gradients(lengths: tuple[int, ...], reverse: bool, shuffled: bool) -> None:
    compare(problem(sum(lengths)), settings(lengths, reverse, shuffled))


@pytest.mark.parametrize("taps", [1, 2, 7])
def test_any_taps_with_and_without_bias_and_activation(taps: int) -> None:
    options = {**settings((3, 30), False, True), "silu": False}
    compare({**problem(33, taps=taps), "bias": None}, options)


def test_chunks_meet_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagscope.kernels.causal_conv1d.CHUNK_ROWS", 2)
    compare(problem(sum(RAGGED)), settings(RAGGED, True, True))


def test_inputs_may_be_strided() -> None:
    inputs = {name: None if t is None else strided(t) for name, t in problem(40).items()}
    compare(inputs, settings((25, 15), True, True))


def test_gradients_by_differences() -> None:
    leaves = [t.requires_grad_() for t in problem(9, 2, 3, torch.float64).values() if t is not None]
    cu_seqlens = borders((4, 0, 5))
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, True, cu_seqlens, True), leaves)


def test_a_broken_bag_leaves_the_others_alone() -> None:
    inputs, options = problem(30), settings((10, 3, 17), False, False)
    (clean,), clean_grads = gradients(causal_conv1d, inputs, **options)
    assert inputs["x"] is not None
    inputs["x"][9] = float("nan")
    (found,), grads = gradients(causal_conv1d, inputs, **options)
    assert torch.equal(found[10:], clean[10:]) and found[9].isnan().all()
    assert torch.equal(grads["x"][10:], clean_grads["x"][10:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_plain_torch(dtype: torch.dtype) -> None:
    inputs, options = problem(200, dtype=dtype), settings((150, 50), False, False)
    wide = {name: None if t is None else t.float() for name, t in inputs.items()}
    (found,), grads = gradients(causal_conv1d, inputs, **options)
    (plain,), plain_grads = gradients(causal_conv1d_reference, inputs, **options)
    (truth,), expected = gradients(causal_conv1d_reference, wide, **options)
    assert found.dtype == dtype
    assert_at_most_twice(found, plain, truth)
    for name in grads:
        assert_at_most_twice(grads[name], plain_grads[name], expected[name], what=name)


def test_it_compiles_into_one_graph() -> None:
    inputs, options = problem(70), settings((30, 40), True, True)
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    (found,), grads = gradients(compiled, inputs, **options)
    (expected,), expected_grads = gradients(causal_conv1d, inputs, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_misuse_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"pass \(tiles, D\) and \(D, taps\)"):
        causal_conv1d(normal(4, 3), normal(4, 2), None, True, borders((4,)))
    with pytest.raises(ValueError, match="bias is"):
        causal_conv1d(normal(4, 3), normal(3, 2), normal(2), True, borders((4,)))
    with pytest.raises(ValueError, match="must rise"):
        causal_conv1d(normal(4, 3), normal(3, 2), None, True, borders((5,)))


def test_recorded_convolution() -> None:
    tensors, _ = vectors("causal-conv1d_width4-silu_A")
    x = tensors["input/x"][0].t().clone().requires_grad_()
    weight = tensors["weights/weight"][:, 0].clone().requires_grad_()
    bias = tensors["weights/bias"].clone().requires_grad_()
    y = causal_conv1d(x, weight, bias, True, borders((len(x),)))
    y.backward(tensors["input/cotangent"][0].t())
    assert_close_to_float64(y, tensors["output/y"][0].t())
    assert_close_to_float64(x.grad, tensors["grad/x"][0].t(), what="x")
    assert_close_to_float64(weight.grad, tensors["grad/weight"][:, 0], what="weight")
    assert_close_to_float64(bias.grad, tensors["grad/bias"], what="bias")


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("test_causal_conv1d.py")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    inputs, options = problem(4200, 96), settings((0, 1, 2, 100, 4097), True, True)
    (plain,), expected = gradients(causal_conv1d, inputs, **options)
    there = {name: None if t is None else t.cuda() for name, t in inputs.items()}
    on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    (found,), grads = gradients(causal_conv1d, there, **on_gpu)
    assert_close_to_float64(found, plain)
    for name in grads:
        assert_close_to_float64(grads[name], expected[name], rtol=1e-4, what=name)
