"""A bag of 50,000 tiles beside ten small ones: every operation against its formula in float64.

The truths take one bag, or are the scans' recurrence row by row with an adjoint of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.topk_mask import topk_mask, topk_mask_reference
from bagscope.kernels.varlen_self_attention import varlen_self_attention
from tests.kernels.every_op import OPS
from tests.kernels.packed import assert_close_to_float64, borders, doubled, gradients, normal
from tests.kernels.test_linear_attention import plain_agent, plain_flow

LENGTHS = (3, 1, 50_000, 5, 9, 2, 6, 0, 3, 5, 8)
TILES = sum(LENGTHS)


class Recurrence(torch.autograd.Function):
    """s_t = a_t s_{t−1} + b_t, row by row, and backwards g_t = ∂s_t + a_{t+1} g_{t+1}."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        decay, state = a.numpy(), np.zeros(b.shape[1:])
        states = b.numpy().copy()
        for t in range(len(states)):
            states[t] += decay[t] * state
            state = states[t]
        found = torch.from_numpy(states)
        ctx.save_for_backward(a, found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, states = ctx.saved_tensors
        decay, total = a.numpy(), grad.numpy().copy()
        for t in range(len(total) - 2, -1, -1):
            total[t] += decay[t + 1] * total[t + 1]
        g = torch.from_numpy(total)
        return g * F.pad(states, (0, 0) * (states.ndim - 1) + (1, -1)), g


def scanned(decay: Tensor, fed: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the states; a bag's first row knows nothing of the row before."""
    first = torch.zeros(TILES + 1, dtype=torch.bool)
    first[cu_seqlens.long()] = True
    kept = decay * ~first[:TILES].view(-1, *[1] * (decay.ndim - 1))
    states: Tensor = Recurrence.apply(kept.expand_as(fed).contiguous(), fed)  # type: ignore[no-untyped-call]
    return states


def plain_s6(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    delta_bias: Tensor, cu_seqlens: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    dt = F.softplus(delta + delta_bias)[..., None]
    s = scanned(torch.exp(dt * A), dt * u[..., None] * B[:, None], cu_seqlens)
    return (((s * C[:, None]).sum(-1) + D * u) * F.silu(z),)


def plain_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, ...]:
    fed = (dt[..., None] * x)[..., None] * B[:, :, None]
    s = scanned(torch.exp(dt * A)[..., None, None], fed, cu_seqlens)
    return (((s * C[:, :, None]).sum(-1) + D[:, None] * x) * F.silu(z),)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    taps = weight.shape[1]
    rows = F.pad(x.T[None], (taps - 1, 0))
    return F.silu(F.conv1d(rows, weight[:, None], bias, groups=len(weight)))[0].T


def plain_segment(scores: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    log_a = scores.log_softmax(0)
    lse = scores.logsumexp(0).nan_to_num(neginf=0.0) if len(scores) else scores.sum(0)
    return log_a.exp().T @ h, lse, -(log_a.exp() * log_a).sum(0)


def plain_scores(
    h: Tensor, weight_v: Tensor, bias_v: Tensor, weight_u: Tensor, bias_u: Tensor,
    weight_w: Tensor, bias_w: Tensor,
) -> Tensor:  # fmt: skip
    gate = torch.tanh(h @ weight_v.T + bias_v) * torch.sigmoid(h @ weight_u.T + bias_u)
    return gate @ weight_w.T + bias_w


def plain_pool(x: Tensor, **gates: Tensor) -> tuple[Tensor, ...]:
    return plain_segment(plain_scores(x, **gates), x)


def plain_cross(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    scores = torch.einsum("mhd,thd->tmh", q, k) * q.shape[-1] ** -0.5
    pooled = torch.einsum("tmh,the->mhe", scores.softmax(0), v)
    return pooled, scores.logsumexp(0) if len(k) else scores.sum(0)


def plain_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    mixed = torch.einsum("ihd,hde->ihe", q, torch.einsum("jhd,jhe->hde", k, v))
    return mixed / (torch.einsum("ihd,hd->ih", q, k.sum(0)) + 1e-6)[..., None]


def plain_inline(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * q.shape[-1] ** -0.5
    told = torch.einsum("ihd,hde->ihe", q, torch.einsum("jhd,jhe->hde", k, v) / len(k))
    return told + (1 - torch.einsum("ihd,hd->ih", q, k.mean(0)))[..., None] * v.mean(0)


ONE_BAG: dict[str, Callable[..., Any]] = {
    "agent_attention": plain_agent,
    "causal_conv1d": plain_conv,
    "cross_attention_pool": plain_cross,
    "flow_attention": plain_flow,
    "gated_attention_pool": plain_pool,
    "gated_scores": plain_scores,
    "inline_attention": plain_inline,
    "linear_attention": plain_linear,
    "segment_softmax_pool": plain_segment,
}


def bag_by_bag(name: str) -> Callable[..., tuple[Tensor, ...]]:
    op, plain = OPS[name], ONE_BAG[name]

    def whole(cu_seqlens: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        parts = []
        for a, b in pairwise(cu_seqlens.tolist()):
            if b > a or op.pools:
                bag = {n: x[a:b] if n in op.per_tile else x for n, x in inputs.items()}
                found = plain(**bag)
                parts.append(found if isinstance(found, tuple) else (found,))
        join = torch.stack if op.pools else torch.cat
        return tuple(join(column) for column in zip(*parts, strict=True))

    return whole


@pytest.mark.parametrize("name", [*ONE_BAG, "selective_scan", "ssd_scan"])
def test_outputs_and_gradients(name: str) -> None:
    scans = {"selective_scan": plain_s6, "ssd_scan": plain_ssd}
    inputs = OPS[name].inputs(LENGTHS, heads=1, width=4)
    found, grads = gradients(OPS[name].call, inputs)
    truth, true_grads = gradients(scans.get(name) or bag_by_bag(name), doubled(inputs))
    for a, b in zip(found, truth, strict=True):
        assert_close_to_float64(a, b)
    for key, grad in grads.items():
        assert_close_to_float64(grad, true_grads[key], rtol=2e-5, what=key)


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.slow
def test_attention_of_some_tiles(r: int | None) -> None:
    inputs: dict[str, Any] = OPS["neighbourhood_attention"].inputs(LENGTHS, heads=1, width=8)
    grid, cu = inputs.pop("grid"), inputs.pop("cu_seqlens")
    some = torch.cat([torch.arange(4), torch.arange(4, 50_004, 997), torch.arange(50_004, TILES)])
    weights = normal(len(some), 1, 8, seed=9)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = None if r is None else (grid, r)
        return varlen_self_attention(q, k, v, cu, neighbours=near)[some]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for a, b in pairwise(cu.tolist()):
            rows = some[(some >= a) & (some < b)]
            scores = torch.einsum("ihd,jhd->hij", q[rows], k[a:b]) * q.shape[-1] ** -0.5
            if r is not None:
                far = (grid[rows, None] - grid[None, a:b]).abs().amax(-1) > r
                scores = scores.masked_fill(far, -torch.inf)
            parts.append(torch.einsum("hij,jhe->ihe", scores.softmax(-1), v[a:b]))
        return torch.cat(parts)

    def step(attend: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [inputs[n].to(dtype).requires_grad_() for n in "qkv"]
        out = attend(*leaves)
        return out, *torch.autograd.grad((out * weights.to(dtype)).sum(), leaves)

    found, truth = step(ours, torch.float32), step(plain, torch.float64)
    for name, a, b in zip(("out", "q", "k", "v"), found, truth, strict=True):
        assert_close_to_float64(a, b, rtol=2e-5, what=name)


def test_masks() -> None:
    scores, cu = normal(TILES, 3, seed=1), borders(LENGTHS)
    ids = torch.arange(len(LENGTHS))
    found = topk_mask(scores, cu, 10, 0.6, seed=3, step=7)
    assert found.equal(topk_mask_reference(scores, cu, ids, 10, 0.6, 3, 7, False))
    assert int(found[4:50_004].sum()) > 0
