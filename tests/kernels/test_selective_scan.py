"""The S6 scan: against float64, against the recorded originals, and over borders of bags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.causal_conv1d import causal_conv1d
from bagscope.kernels.selective_scan import (
    cpu,
    selective_scan,
    selective_scan_reference,
    spans,
)
from bagscope.kernels.selective_scan.lanes import lay_lanes
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
    tiles: int, features: int = 6, states: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    return {
        "u": normal(tiles, features, seed=1, dtype=dtype),
        "delta": normal(tiles, features, seed=2, dtype=dtype),
        "A": -normal(features, states, seed=3, dtype=dtype).abs() - 0.01,
        "B": normal(tiles, states, seed=4, dtype=dtype),
        "C": normal(tiles, states, seed=5, dtype=dtype),
        "D": normal(features, seed=6, dtype=dtype),
        "z": normal(tiles, features, seed=7, dtype=dtype),
        "delta_bias": normal(features, seed=8, dtype=dtype),
    }


def settings(lengths: tuple[int, ...], reverse: bool, shuffled: bool) -> dict[str, Any]:
    cu_seqlens = borders(lengths)
    order = shuffle_within(cu_seqlens) if shuffled else None
    return {"delta_softplus": True, "cu_seqlens": cu_seqlens, "reverse": reverse, "order": order}


def compare(inputs: dict[str, Tensor | None], options: dict[str, Any], rtol: float = 1e-5) -> None:
    (found,), grads = gradients(selective_scan, inputs, **options)
    (truth,), expected = gradients(selective_scan_reference, doubled(inputs), **options)
    assert_close_to_float64(found, truth, rtol=rtol, what="output")
    for name in grads:
        assert_close_to_float64(grads[name], expected[name], rtol=rtol, what=name)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "lengths", [(), (0,), (1,), (2,), (63,), (100,), RAGGED, (5,) * 40, (90, 1, 1, 2)]
)
@pytest.mark.parametrize(("reverse", "shuffled"), [(False, False), (True, True)])
def test_outputs_and_gradients(lengths: tuple[int, ...], reverse: bool, shuffled: bool) -> None:
    compare(problem(sum(lengths)), settings(lengths, reverse, shuffled))


@pytest.mark.parametrize("elements", [24, 1000])
def test_chunks_of_any_size(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", elements)
    compare(problem(sum(RAGGED)), settings(RAGGED, True, False))
    compare(problem(60), settings((3,) * 20, False, True))


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(spans, "_LEAST_ELEMENTS", 8)
    try:
        torch.set_num_threads(threads)
        cu_seqlens = borders(RAGGED)
        assert len(spans.spans_of(6, 4)) == threads
        compare(problem(sum(RAGGED)), settings(RAGGED, True, True))
        with torch.inference_mode():
            assert selective_scan(*problem(sum(RAGGED)).values(), True, cu_seqlens).isfinite().all()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_without_lists_the_steps_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = problem(100), settings((100,), False, False)
    first = gradients(selective_scan, inputs, **options)
    assert spans._lists_go_in_turn()
    monkeypatch.setattr(spans, "_lists_go_in_turn", lambda: False)
    second = gradients(selective_scan, inputs, **options)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_failure_in_a_thread_comes_out_and_settings_stay() -> None:
    before = torch.get_num_threads()

    def fail(index: int, _: slice) -> None:
        raise ArithmeticError(f"span {index}")

    with pytest.raises(ArithmeticError, match="span 0"):
        spans.over_spans(fail, [slice(0, 1), slice(1, 2)])
    assert torch.get_num_threads() == before


def test_a_long_bag_beside_short_ones() -> None:
    compare(problem(sum(LONG_BESIDE_SHORT), 3, 2), settings(LONG_BESIDE_SHORT, False, True))


def test_optional_inputs_may_be_missing() -> None:
    inputs = {**problem(70), "D": None, "z": None, "delta_bias": None}
    inputs["delta"] = normal(70, 6).abs()
    compare(inputs, {**settings((30, 40), False, False), "delta_softplus": False})


def test_inputs_may_be_strided() -> None:
    inputs = {name: None if t is None else strided(t) for name, t in problem(70).items()}
    compare(inputs, settings((30, 40), True, True))


def test_gradients_by_differences() -> None:
    inputs = problem(7, 2, 3, torch.float64)
    cu_seqlens, order = borders((4, 0, 3)), torch.tensor([2, 0, 3, 1, 6, 5, 4])
    leaves = [t.requires_grad_() for t in inputs.values() if t is not None]
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan(*t, True, cu_seqlens, True, order), leaves
    )


def test_strong_decay_neither_overflows_nor_divides() -> None:
    inputs = problem(300)
    assert inputs["A"] is not None and inputs["delta"] is not None
    inputs["A"], inputs["delta"] = inputs["A"] * 1e4, inputs["delta"] + 30
    compare(inputs, settings((300,), False, False))


def test_packed_is_one_by_one_and_in_reverse_is_flipped() -> None:
    inputs, cu_seqlens = problem(sum(RAGGED), dtype=torch.float64), borders(RAGGED)
    packed = selective_scan(*inputs.values(), True, cu_seqlens, True)
    at = 0
    for length in RAGGED:
        rows = slice(at, at + length)
        bag = [
            t if t is None or len(t) != sum(RAGGED) else t[rows].flip(0) for t in inputs.values()
        ]
        alone = selective_scan(*bag, True, borders((length,))).flip(0)
        torch.testing.assert_close(packed[rows], alone, rtol=1e-12, atol=1e-12)
        at += length


@pytest.mark.parametrize("lengths", [(20, 30, 10), (3,) * 20, (20, 40)])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_broken_bag_leaves_the_others_alone(lengths: tuple[int, ...], reverse: bool) -> None:
    inputs, cu_seqlens = problem(60), borders(lengths)
    clean = selective_scan(*inputs.values(), True, cu_seqlens, reverse)
    assert inputs["u"] is not None
    inputs["u"][0] = float("nan")
    found = selective_scan(*inputs.values(), True, cu_seqlens, reverse)
    torch.testing.assert_close(found[lengths[0] :], clean[lengths[0] :])
    assert found[0].isnan().all()


def test_the_same_input_gives_the_same_bits() -> None:
    inputs, options = problem(500, 64, 16), settings((100, 400), False, True)
    first, second = (gradients(selective_scan, inputs, **options) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_plain_torch(dtype: torch.dtype) -> None:
    inputs, options = problem(80, dtype=dtype), settings((50, 30), False, False)
    wide = {name: None if t is None else t.float() for name, t in inputs.items()}
    (found,), grads = gradients(selective_scan, inputs, **options)
    (plain,), plain_grads = gradients(selective_scan_reference, inputs, **options)
    (truth,), expected = gradients(selective_scan_reference, wide, **options)
    assert found.dtype == dtype
    assert_at_most_twice(found, plain, truth)
    for name in grads:
        assert_at_most_twice(grads[name], plain_grads[name], expected[name], what=name)


def test_it_compiles_into_one_graph() -> None:
    inputs, options = problem(70), settings((30, 40), True, True)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    (found,), grads = gradients(compiled, inputs, **options)
    (expected,), expected_grads = gradients(selective_scan, inputs, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("way", ["reference", "cpu"])
def test_the_way_can_be_forced(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAGSCOPE_KERNELS", way)
    compare(problem(20), settings((20,), False, False))


def test_lanes_hold_every_row_once_and_waste_little() -> None:
    for lengths in (RAGGED, LONG_BESIDE_SHORT, (7,) * 100, (1000,), (1,) * 1000):
        cu_seqlens, tiles = borders(lengths), sum(lengths)
        lanes = lay_lanes(cu_seqlens, tiles, False, None, 1024)
        busy = lanes.rows if lanes.idle is None else lanes.rows[~lanes.idle]
        assert torch.equal(busy.flatten().sort()[0], torch.arange(tiles))
        assert lanes.rows.numel() <= 1.16 * tiles
        assert int(lanes.starts.sum()) == sum(length > 0 for length in lengths)
    for state, expected in ((16, 32), (1 << 13, 4), (1 << 20, 1)):
        lanes = lay_lanes(borders((1,) * 1000), 1000, False, None, state)
        assert lanes.rows.shape[1] == expected


def test_misuse_is_refused_in_words() -> None:
    inputs, cu_seqlens = problem(10), borders((4, 6))
    with pytest.raises(ValueError, match="must rise from 0 to the 10 tiles"):
        selective_scan(*inputs.values(), True, borders((4,)))
    with pytest.raises(ValueError, match="among themselves"):
        selective_scan(*inputs.values(), True, cu_seqlens, False, torch.arange(10).flip(0))
    with pytest.raises(ValueError, match="pass an int64 permutation"):
        selective_scan(*inputs.values(), True, cu_seqlens, False, torch.arange(10).int())
    with pytest.raises(ValueError, match=r"z is \(9, 6\)"):
        selective_scan(*{**inputs, "z": normal(9, 6)}.values(), True, cu_seqlens)


# --- recorded originals ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["bare", "no-gate", "full"])
def test_recorded_scan(variant: str) -> None:
    tensors, _ = vectors(f"selective-scan_{variant}_A")

    def packed(name: str, kind: str = "input") -> Tensor | None:
        value = tensors.get(f"{kind}/{name}")
        return value[0].t() if value is not None and value.ndim == 3 else value

    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    leaves = [None if packed(n) is None else packed(n).clone().requires_grad_() for n in names]
    y = selective_scan(*leaves, True, borders((37,)))
    y.backward(packed("cotangent"))
    assert_close_to_float64(y, packed("y", "output"), what="y")
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None:
            assert_close_to_float64(leaf.grad, packed(name, "grad"), what=name)


def core(
    xz: Tensor, weights: dict[str, Tensor], branch: str, reverse: bool, order: Tensor | None
) -> Tensor:
    """Return one branch of a Mamba block before its output projection."""
    rates = -weights["A_b_log" if branch else "A_log"].exp()
    rank, states = weights[f"dt_proj{branch}.weight"].shape[1], rates.shape[1]
    x, z = xz.chunk(2, 1)
    where = {"cu_seqlens": borders((len(xz),)), "reverse": reverse, "order": order}
    taps = weights[f"conv1d{branch}.weight"][:, 0]
    x = causal_conv1d(x, taps, weights[f"conv1d{branch}.bias"], True, **where)
    projected = x @ weights[f"x_proj{branch}.weight"].t()
    step, b, c = torch.split(projected, [rank, states, states], 1)
    step = F.linear(step, weights[f"dt_proj{branch}.weight"])
    bias = weights[f"dt_proj{branch}.bias"]
    return selective_scan(x, step, rates, b, c, weights[f"D{branch}"], z, bias, True, **where)


@pytest.mark.parametrize(
    "name",
    ["mamba-block_proper-init", "mambamil-block_plain", "mambamil-block_bi", "mambamil-block_sr"],
)
def test_recorded_block(name: str) -> None:
    tensors, meta = vectors(f"{name}_A")
    weights = {
        key.removeprefix("weights/"): value.clone().requires_grad_()
        for key, value in tensors.items()
        if key.startswith("weights/")
    }
    x = tensors["input/x"].clone().requires_grad_()
    tiles = len(x)
    xz = x @ weights["in_proj.weight"].t()
    y = core(xz, weights, "", False, None)
    if name.endswith("bi"):
        y = y + core(xz, weights, "_b", True, None)
    if name.endswith("sr"):
        rate = meta["config"]["rate"]
        side = -(-tiles // rate)
        # Zeros after the projection, and they do move the state.
        padded = F.pad(xz, (0, 0, 0, side * rate - tiles))
        order = torch.arange(side * rate).view(side, rate).t().flatten()
        y = y + core(padded, weights, "_b", False, order)[:tiles]
    out = y @ weights["out_proj.weight"].t()
    out.backward(tensors["input/cotangent"])
    assert_close_to_float64(out, tensors["output/out"], rtol=1e-4)
    assert_close_to_float64(x.grad, tensors["grad/x"], rtol=1e-4, what="x")
    for key, weight in weights.items():
        assert_close_to_float64(weight.grad, tensors[f"grad/{key}"], rtol=1e-4, what=key)


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("test_selective_scan.py")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    lengths = (0, 1, 2, 63, 100, 4097, 9)
    inputs = problem(sum(lengths), 96, 16, dtype)
    for reverse, shuffled in ((False, False), (True, True)):
        options = settings(lengths, reverse, shuffled)
        (plain,), expected = gradients(selective_scan, inputs, **options)
        there = {name: None if t is None else t.cuda() for name, t in inputs.items()}
        on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
        (found,), grads = gradients(selective_scan, there, **on_gpu)
        rtol = 1e-4 if dtype is torch.float32 else 2e-2
        assert_close_to_float64(found, plain, rtol=rtol)
        for name in grads:
            assert_close_to_float64(grads[name], expected[name], rtol=rtol, what=name)
