"""A few queries over long ragged bags: against the formula in float64, and against originals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.cross_attention_pool import (
    cross_attention_pool,
    cross_attention_pool_reference,
)
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


def case(
    lengths: tuple[int, ...] = RAGGED,
    m: int = 3,
    heads: int = 2,
    d: int = 8,
    dv: int = 5,
    dtype: torch.dtype = torch.float32,
    shared: bool = False,
) -> dict[str, Tensor | None]:
    tiles, shape = sum(lengths), (m, heads, d)
    return {
        "q": normal(*(shape if shared else (len(lengths), *shape)), dtype=dtype, scale=2),
        "k": normal(tiles, heads, d, seed=1, dtype=dtype),
        "v": normal(tiles, heads, dv, seed=2, dtype=dtype),
        "cu_seqlens": borders(lengths),
    }


def with_weights(**inputs: Any) -> tuple[Tensor, ...]:
    pooled, lse, weights = cross_attention_pool(**inputs, return_weights=True)
    assert weights is not None
    # An empty bag's lse is −inf: no loss can hold it.
    return pooled, lse.masked_fill(lse.isinf(), 0.0), weights


def without_weights(**inputs: Any) -> tuple[Tensor, ...]:
    pooled, lse, weights = cross_attention_pool(**inputs)
    assert weights is None
    return pooled, lse.masked_fill(lse.isinf(), 0.0)


def reference(**inputs: Any) -> tuple[Tensor, ...]:
    q, k = inputs["q"], inputs["k"]
    if q.ndim == 3:
        q = q.expand(len(inputs["cu_seqlens"]) - 1, *q.shape)
    pooled, lse, weights = cross_attention_pool_reference(
        q, k, inputs["v"], inputs["cu_seqlens"], k.shape[-1] ** -0.5, True
    )
    return pooled, lse.masked_fill(lse.isinf(), 0.0), weights


def check(inputs: dict[str, Tensor | None], rtol: float = 1e-5) -> None:
    for ours, count in ((with_weights, 3), (without_weights, 2)):
        found, grads = gradients(ours, inputs)
        truth, true_grads = gradients(lambda **x: reference(**x)[:count], doubled(inputs))  # noqa: B023
        for output, expected in zip(found, truth, strict=True):
            assert_close_to_float64(output, expected, rtol=rtol)
        for name in ("q", "k", "v"):
            assert_close_to_float64(grads[name], true_grads[name], rtol=rtol, what=name)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("m", "heads", "d", "dv"), [(1, 1, 16, 16), (3, 2, 8, 5), (70, 1, 4, 128)])
def test_outputs_and_gradients(m: int, heads: int, d: int, dv: int, shared: bool) -> None:
    check(case(m=m, heads=heads, d=d, dv=dv, shared=shared))


def test_a_long_bag_beside_short_ones() -> None:
    check(case(LONG_BESIDE_SHORT))


@pytest.mark.parametrize("lengths", [(0,), (1,), (0, 0)])
def test_tiny(lengths: tuple[int, ...]) -> None:
    check(case(lengths))


def test_gradcheck() -> None:
    inputs = case((2, 1, 4), m=2, d=3, dv=2, dtype=torch.float64)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")  # type: ignore[union-attr]
    cu = inputs["cu_seqlens"]

    def all_three(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return with_weights(q=q, k=k, v=v, cu_seqlens=cu)

    assert torch.autograd.gradcheck(all_three, (q, k, v))


def test_weights_sum_to_one_and_empty_bags_give_zero() -> None:
    inputs: dict[str, Any] = case()
    pooled, lse, weights = cross_attention_pool(**inputs, return_weights=True)
    assert weights is not None
    parts = weights.split(list(RAGGED))
    for bag, part in enumerate(parts):
        torch.testing.assert_close(part.sum(0), torch.full((3, 2), float(len(part) > 0)))
        assert bool(lse[bag].isinf().all()) == (len(part) == 0)
    assert not pooled[0].any()


def test_packed_is_one_by_one_and_order_within_a_bag_does_not_matter() -> None:
    inputs: dict[str, Any] = case(dtype=torch.float64)
    pooled, lse, _ = cross_attention_pool(**inputs)
    parts = zip(inputs["q"], inputs["k"].split(RAGGED), inputs["v"].split(RAGGED), strict=True)
    for bag, (q, k, v) in enumerate(parts):
        alone, alone_lse, _ = cross_attention_pool(q, k, v, borders([len(k)]))
        torch.testing.assert_close(alone[0], pooled[bag])
        torch.testing.assert_close(alone_lse[0], lse[bag])
    order = shuffle_within(inputs["cu_seqlens"])
    shuffled = {**inputs, "k": inputs["k"][order], "v": inputs["v"][order]}
    torch.testing.assert_close(cross_attention_pool(**shuffled)[0], pooled)


@pytest.mark.usefixtures("poisoned_memory")
def test_strides_and_unwritten_memory_do_not_matter_and_bits_repeat() -> None:
    inputs = case(dtype=torch.float32)
    cu = inputs.pop("cu_seqlens")
    spread = {name: strided(value) for name, value in inputs.items() if value is not None}
    runs = [gradients(with_weights, {**x, "cu_seqlens": cu}) for x in (inputs, inputs, spread)]
    for found, grads in runs[1:]:
        for a, b in zip(
            [*found, *grads.values()], [*runs[0][0], *runs[0][1].values()], strict=True
        ):
            torch.testing.assert_close(a, b)
    for a, b in zip(runs[0][1].values(), runs[1][1].values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    inputs = case((100, 1, 63), dtype=dtype, d=16, dv=16)

    def plain(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        bags = zip(q, k.split([100, 1, 63]), v.split([100, 1, 63]), strict=True)
        return torch.stack(
            [
                torch.softmax((qb.transpose(0, 1) @ kb.permute(1, 2, 0)) * 16**-0.5, -1)
                @ vb.transpose(0, 1)
                for qb, kb, vb in bags
            ]
        ).transpose(1, 2)

    found, grads = gradients(lambda **x: cross_attention_pool(**x)[0], inputs)
    rough, rough_grads = gradients(plain, inputs)
    truth, true_grads = gradients(lambda **x: reference(**x)[0], doubled(inputs))
    assert found[0].dtype == dtype
    assert_at_most_twice(found[0], rough[0], truth[0])
    for name in ("q", "k", "v"):
        assert_at_most_twice(grads[name], rough_grads[name], true_grads[name], what=name)


def test_compiles_whole() -> None:
    inputs = case()
    compiled = torch.compile(with_weights, fullgraph=True, backend="aot_eager")
    found, grads = gradients(compiled, inputs)
    expected, expected_grads = gradients(with_weights, inputs)
    for a, b in zip([*found, *grads.values()], [*expected, *expected_grads.values()], strict=True):
        torch.testing.assert_close(a, b)


def test_refusals() -> None:
    inputs: dict[str, Any] = case()
    with pytest.raises(ValueError, match=r"pass \(bags, m, H, d\)"):
        cross_attention_pool(**{**inputs, "k": inputs["k"][..., :-1]})
    with pytest.raises(ValueError, match="cu_seqlens"):
        cross_attention_pool(**{**inputs, "cu_seqlens": inputs["cu_seqlens"] + 1})


@pytest.mark.parametrize("name", ["pma", "pma-ln", "mab"])
def test_set_transformer_vectors(name: str) -> None:
    tensors, meta = vectors(f"set-transformer_{name}_A")
    prefix = "mab." if name.startswith("pma") else ""
    names = [n.removeprefix("weights/") for n in tensors if n.startswith("weights/")]
    heads, width = meta["config"]["heads"], meta["config"]["dim"]

    def block(**leaves: Tensor) -> Tensor:
        def linear(which: str, x: Tensor) -> Tensor:
            return F.linear(
                x, leaves[f"{prefix}fc_{which}.weight"], leaves[f"{prefix}fc_{which}.bias"]
            )

        def norm(which: str, x: Tensor) -> Tensor:
            if f"{prefix}{which}.weight" not in leaves:
                return x
            scale, shift = leaves[f"{prefix}{which}.weight"], leaves[f"{prefix}{which}.bias"]
            return F.layer_norm(x, (width,), scale, shift)

        asked, stored = (leaves["S"][0], leaves["x"]) if prefix else (leaves["x"], leaves["keys"])
        q, k, v = linear("q", asked), linear("k", stored), linear("v", stored)
        split = [x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
        cu = borders([len(stored)])
        pooled, _, _ = cross_attention_pool(*split, cu, scale=width**-0.5)
        out = norm("ln0", q + pooled[0].flatten(1))
        return norm("ln1", out + torch.relu(linear("o", out)))

    leaves = {n: tensors[f"weights/{n}"].requires_grad_() for n in names}
    leaves["x"] = tensors["input/x"].requires_grad_()
    if not prefix:
        leaves["keys"] = tensors["input/keys"]
    compare_with_vectors(block(**leaves), tensors, leaves, names)


@pytest.mark.parametrize("name", ["one-step", "three-updates", "early-stop", "beta-two-queries"])
def test_hopfield_vectors(name: str) -> None:
    tensors, meta = vectors(f"hopfield-pooling_{name}_A")
    config = meta["config"]
    names = [n.removeprefix("weights/") for n in tensors if n.startswith("weights/")]
    leaves = {n: tensors[f"weights/{n}"].requires_grad_() for n in names}
    leaves["x"] = tensors["input/x"].requires_grad_()
    core = "hopfield.association_core."

    def norm(which: str, x: Tensor) -> Tensor:
        scale, shift = (
            leaves[f"hopfield.norm_{which}.weight"],
            leaves[f"hopfield.norm_{which}.bias"],
        )
        return F.layer_norm(x, x.shape[-1:], scale, shift)

    weights, biases = (
        leaves[core + "in_proj_weight"].chunk(3),
        leaves[core + "in_proj_bias"].chunk(3),
    )
    states = (
        norm("state_pattern", leaves["pooling_weights"][0]),
        norm("stored_pattern", leaves["x"]),
        norm("pattern_projection", leaves["x"]),
    )
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (config["num_heads"], -1))
        for x, w, b in zip(states, weights, biases, strict=True)
    )
    pooled, _, found = cross_attention_pool(
        q, k, v, borders([len(k)]), scale=config["beta"], return_weights=True,
        update_steps=config["update_steps_max"], update_eps=config["update_steps_eps"],
    )  # fmt: skip
    assert found is not None
    assert_close_to_float64(found.permute(2, 1, 0), tensors["output/association"], rtol=1e-5)
    out = F.linear(
        pooled[0].flatten(1), leaves[core + "out_proj.weight"], leaves[core + "out_proj.bias"]
    )
    compare_with_vectors(out.flatten(), tensors, leaves, names)


def compare_with_vectors(
    out: Tensor, tensors: dict[str, Tensor], leaves: dict[str, Tensor], names: list[str]
) -> None:
    assert_close_to_float64(out, tensors["output/out"], rtol=1e-5)
    (out * tensors["input/cotangent"]).sum().backward()
    for name in (*names, "x"):
        grad = leaves[name].grad
        assert grad is not None
        assert_close_to_float64(grad, tensors[f"grad/{name}"], rtol=3e-5, atol=1e-6, what=name)


def test_retrieval_stops_bag_by_bag() -> None:
    inputs: dict[str, Any] = case((20, 30), m=1, dtype=torch.float64)
    settings: dict[str, Any] = {"scale": 0.4, "update_steps": 30, "update_eps": 0.02}
    together, _, _ = cross_attention_pool(**inputs, **settings)
    for bag, rows in enumerate((slice(0, 20), slice(20, 50))):
        alone, _, _ = cross_attention_pool(
            inputs["q"][bag], inputs["k"][rows], inputs["v"][rows],
            borders([rows.stop - rows.start]), **settings,
        )  # fmt: skip
        torch.testing.assert_close(alone[0], together[bag])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = case((3, 1, 4097, 0, 100), d=64, dv=64, dtype=dtype)
    device = {name: value.cuda() for name, value in inputs.items() if value is not None}
    found, grads = gradients(with_weights, dict(device))
    truth, true_grads = gradients(reference, doubled(inputs))
    rtol = 1e-4 if dtype is torch.float32 else 3e-2
    for output, expected in zip(found, truth, strict=True):
        assert_close_to_float64(output, expected, rtol=rtol)
    for name in ("q", "k", "v"):
        assert_close_to_float64(grads[name], true_grads[name], rtol=rtol, what=name)


def test_interpreted_kernels() -> None:
    run_interpreted("test_cross_attention_pool.py")
