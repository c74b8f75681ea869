"""Linear attention and its relatives, against their formulas in float64 and against originals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.linear_attention import (
    agent_attention,
    flow_attention,
    inline_attention,
    linear_attention,
    linear_attention_reference,
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

MAPS = ("elu+1", "silu", "identity", "relu")


def case(
    lengths: tuple[int, ...] = RAGGED,
    heads: int = 2,
    d: int = 8,
    dv: int = 8,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    tiles = sum(lengths)
    return {
        "q": normal(tiles, heads, d, dtype=dtype),
        "k": normal(tiles, heads, d, seed=1, dtype=dtype),
        "v": normal(tiles, heads, dv, seed=2, dtype=dtype),
        "cu_seqlens": borders(lengths),
    }


def plain_agent(q: Tensor, k: Tensor, v: Tensor, agents: int = 9, skip: int = 0) -> Tensor:
    """Return agent attention of one bag: (N, H, dv)."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    groups = [part.mean(1) for part in torch.tensor_split(q[:, skip:], agents, 1) if part.shape[1]]
    means = torch.stack(groups, 1)
    told = torch.softmax(scale * means @ k.mT, -1) @ v
    return (torch.softmax(scale * q @ means.mT, -1) @ told).transpose(0, 1)


def plain_flow(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    many = len(k)
    incoming = torch.einsum("ihd,hd->ih", q + eps, k.sum(0) + eps)
    outgoing = torch.einsum("jhd,hd->jh", k + eps, q.sum(0) + eps)
    into = torch.einsum("ihd,hd->ih", q + eps, (k / outgoing[..., None]).sum(0) + eps)
    out = torch.einsum("jhd,hd->jh", k + eps, (q / incoming[..., None]).sum(0) + eps)
    compete = many * torch.softmax(out.clamp(-1, 1), 0)
    kv = torch.einsum("jhd,jh,jhe->hde", k, compete, v)
    mixed = torch.einsum("ihd,hde->ihe", q / incoming[..., None], kv)
    return torch.sigmoid(into * len(q) / many)[..., None] * mixed


def plain_inline(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return InLine attention by its weights: s q·k / N + (1 − s q·k̄) / N."""
    scale = q.shape[-1] ** -0.5
    scores = scale * torch.einsum("ihd,jhd->hij", q, k)
    weights = (scores + 1 - scores.mean(-1, keepdim=True)) / max(1, len(k))
    return torch.einsum("hij,jhe->ihe", weights, v)


RELATIVES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "agent": (lambda **x: agent_attention(**x, agents=9), plain_agent),
    "flow": (flow_attention, plain_flow),
    "inline": (inline_attention, plain_inline),
}


def bag_by_bag(plain: Callable[..., Tensor], cu_seqlens: Tensor, **inputs: Any) -> Tensor:
    parts = [inputs["v"][:0]]
    for a, b in pairwise(cu_seqlens.tolist()):
        if b > a:
            parts.append(plain(**{name: value[a:b] for name, value in inputs.items()}))
    return torch.cat(parts)


def check(
    ours: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    inputs: dict[str, Tensor | None],
    rtol: float = 1e-5,
) -> None:
    found, grads = gradients(ours, inputs)
    expected, true_grads = gradients(truth, doubled(inputs))
    assert_close_to_float64(found[0], expected[0], rtol=rtol)
    for name in ("q", "k", "v"):
        assert_close_to_float64(grads[name], true_grads[name], rtol=rtol, atol=1e-6, what=name)


def check_linear(
    inputs: dict[str, Tensor | None], feature_map: Any, normalise: Any, rtol: float = 1e-5
) -> None:
    # A denominator that may be near zero is nobody's fault: a large ε keeps the problem well posed.
    eps = 1e-6 if feature_map == "elu+1" else 1e3
    check(
        lambda **x: linear_attention(**x, feature_map=feature_map, normalise=normalise, eps=eps),
        lambda **x: linear_attention_reference(
            **x, feature_map=feature_map, normalise=normalise, eps=eps
        ),
        inputs,
        rtol,
    )


@pytest.mark.parametrize("normalise", ["denominator", "none", "length"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_outputs_and_gradients(feature_map: str, normalise: str) -> None:
    check_linear(case(dv=5), feature_map, normalise)


@pytest.mark.parametrize(("heads", "d", "dv"), [(1, 128, 16), (3, 1, 1), (1, 16, 64)])
def test_widths(heads: int, d: int, dv: int) -> None:
    check_linear(case(heads=heads, d=d, dv=dv), "elu+1", "denominator")


def test_a_long_bag_beside_short_ones() -> None:
    check_linear(case(LONG_BESIDE_SHORT), "elu+1", "denominator")
    check_linear(case(LONG_BESIDE_SHORT), "silu", "length")


@pytest.mark.parametrize("lengths", [(0,), (1,), (0, 0)])
def test_tiny(lengths: tuple[int, ...]) -> None:
    check_linear(case(lengths), "elu+1", "denominator")
    for ours, plain in RELATIVES.values():
        check(ours, lambda **x: bag_by_bag(plain, **x), case(lengths))  # noqa: B023


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives(name: str) -> None:
    ours, plain = RELATIVES[name]
    for lengths in (RAGGED, (3, 2500, 9)):
        check(ours, lambda **x: bag_by_bag(plain, **x), case(lengths, dv=5))


@pytest.mark.parametrize("name", ["linear", *RELATIVES])
def test_gradcheck(name: str) -> None:
    inputs: dict[str, Any] = case((1, 4), heads=1, d=2, dv=2, dtype=torch.float64)
    cu = inputs.pop("cu_seqlens")
    ours = linear_attention if name == "linear" else RELATIVES[name][0]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours(q=q, k=k, v=v, cu_seqlens=cu)

    assert torch.autograd.gradcheck(attend, tuple(x.requires_grad_() for x in inputs.values()))


def test_order_within_a_bag_does_not_matter() -> None:
    inputs: dict[str, Any] = case(dtype=torch.float64)
    order = shuffle_within(inputs["cu_seqlens"])
    shuffled = {n: x if n == "cu_seqlens" else x[order] for n, x in inputs.items()}
    for attend in (linear_attention, flow_attention, inline_attention):
        torch.testing.assert_close(attend(**shuffled), attend(**inputs)[order])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["linear", *RELATIVES])
def test_strides_and_unwritten_memory_do_not_matter_and_bits_repeat(name: str) -> None:
    ours = linear_attention if name == "linear" else RELATIVES[name][0]
    inputs = case()
    cu = inputs.pop("cu_seqlens")
    spread = {n: strided(value) for n, value in inputs.items() if value is not None}
    runs = [gradients(ours, {**x, "cu_seqlens": cu}) for x in (inputs, inputs, spread)]
    assert bool(runs[0][0][0].isfinite().all())
    for a, b in zip(runs[0][1].values(), runs[1][1].values(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(runs[2][0][0], runs[0][0][0])
    for a, b in zip(runs[0][1].values(), runs[2][1].values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    lengths = (100, 1, 63)
    inputs = case(lengths, d=16, dv=16, dtype=dtype)

    def plain(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return linear_attention_reference(q, k, v, cu_seqlens, "elu+1", "denominator", 1e-6)

    pairs = [(linear_attention, plain)]
    for ours, one in RELATIVES.values():
        pairs.append((ours, lambda one=one, **x: bag_by_bag(one, **x)))
    for ours, rough_ours in pairs:
        found, grads = gradients(ours, inputs)
        rough, rough_grads = gradients(rough_ours, inputs)
        truth, true_grads = gradients(rough_ours, doubled(inputs))
        assert found[0].dtype == dtype
        assert_at_most_twice(found[0], rough[0], truth[0])
        for name in ("q", "k", "v"):
            assert_at_most_twice(grads[name], rough_grads[name], true_grads[name], what=name)


@pytest.mark.parametrize("name", ["linear", *RELATIVES])
def test_compiles_whole(name: str) -> None:
    ours = linear_attention if name == "linear" else RELATIVES[name][0]

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return ours(q=q, k=k, v=v, cu_seqlens=cu_seqlens)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, grads = gradients(compiled, case())
    expected, expected_grads = gradients(attend, case())
    torch.testing.assert_close(found[0], expected[0])
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key])


def test_refusals() -> None:
    inputs: dict[str, Any] = case()
    with pytest.raises(ValueError, match=r"pass \(T, H, d\)"):
        linear_attention(**{**inputs, "k": inputs["k"][:-1]})
    with pytest.raises(ValueError, match="cu_seqlens"):
        linear_attention(**{**inputs, "cu_seqlens": inputs["cu_seqlens"] + 1})
    with pytest.raises(ValueError, match="'gelu' is not known; choose one of elu"):
        linear_attention(**inputs, feature_map="gelu")


class Recorded:
    """A recorded layer: its leaves, and the comparison with what was recorded."""

    def __init__(self, name: str) -> None:
        self.tensors, self.meta = vectors(name)
        self.heads: int = self.meta["config"]["heads"]
        self.leaves = {
            key.removeprefix("weights/"): value.requires_grad_()
            for key, value in self.tensors.items()
            if key.startswith("weights/")
        }
        self.leaves["x"] = self.tensors["input/x"].requires_grad_()
        self.cu = borders([len(self.leaves["x"])])

    def linear(self, layer: str, x: Tensor) -> Tensor:
        return F.linear(x, self.leaves[f"{layer}.weight"], self.leaves.get(f"{layer}.bias"))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def qkv(self) -> list[Tensor]:
        return [self.split(part) for part in self.linear("qkv", self.leaves["x"]).chunk(3, -1)]

    def compare(self, out: Tensor) -> None:
        assert_close_to_float64(out, self.tensors["output/out"], rtol=1e-5)
        (out * self.tensors["input/cotangent"]).sum().backward()
        for name, leaf in self.leaves.items():
            if leaf.grad is not None:
                expected = self.tensors[f"grad/{name}"]
                assert_close_to_float64(leaf.grad, expected, rtol=1e-5, atol=1e-6, what=name)


def test_agent_vectors() -> None:
    layer = Recorded("agent-attention_1d-core_A")
    agents = layer.meta["config"]["agents"]
    out = agent_attention(*layer.qkv(), layer.cu, agents=agents, skip=1)
    layer.compare(layer.linear("proj", out.flatten(1)))


def test_inline_vectors() -> None:
    layer = Recorded("inline-attention_1d-core_A")
    layer.compare(layer.linear("proj", inline_attention(*layer.qkv(), layer.cu).flatten(1)))


@pytest.mark.parametrize("which", ["self", "cross"])
def test_flow_vectors(which: str) -> None:
    layer = Recorded(f"flow-attention_{which}_A")
    stored = layer.tensors.get("input/keys", layer.leaves["x"])
    q = layer.split(layer.linear("query_projection", layer.leaves["x"]))
    k, v = (layer.split(layer.linear(f"{n}_projection", stored)) for n in ("key", "value"))
    out = flow_attention(q, k, v, layer.cu, borders([len(stored)]))
    layer.compare(layer.linear("out_projection", out.flatten(1)))


def test_lightning_vectors() -> None:
    layer = Recorded("lightning-attention_noncausal_A")
    q, k, v = (layer.split(layer.linear(f"{n}_proj", layer.leaves["x"])) for n in "qkv")
    out = linear_attention(q, k, F.silu(v), layer.cu, feature_map="silu", normalise="none")
    scale, shift = layer.leaves["norm.weight"], layer.leaves["norm.bias"]
    out = F.layer_norm(out.flatten(1), scale.shape, scale, shift)
    gate = layer.linear("output_gate.1", layer.linear("output_gate.0", layer.leaves["x"]))
    layer.compare(layer.linear("o_proj", out * torch.sigmoid(gate)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", *RELATIVES])
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    inputs = case((3, 1, 4097, 0, 100), d=64, dv=64, dtype=dtype)
    device = {key: value.cuda() for key, value in inputs.items() if value is not None}
    ours = linear_attention if name == "linear" else RELATIVES[name][0]
    found, grads = gradients(ours, dict(device))
    truth, true_grads = gradients(ours, doubled(inputs))
    rtol = 1e-4 if dtype is torch.float32 else 3e-2
    assert_close_to_float64(found[0], truth[0], rtol=rtol)
    for key in ("q", "k", "v"):
        assert_close_to_float64(grads[key], true_grads[key], rtol=rtol, atol=1e-6, what=key)


def test_interpreted_kernels() -> None:
    run_interpreted("test_linear_attention.py")
