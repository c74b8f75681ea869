"""Agent attention on bags (Han et al. 2023): tiles ask a few agents, which have asked the tiles.

    A   = means of n contiguous groups of the bag's queries
    V_A = softmax(s A Kᵀ) V          out_i = softmax(s q_i Aᵀ) V_A

The groups are as equal as they can be, longer ones first, and do not overlap; a bag of fewer tiles
than n has an agent per tile. T tiles, H heads: 8·T·n·H·d operations forward. Kept for backward: the
inputs, A, V_A and out; weights are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagscope.kernels.cross_attention_pool import cross_attention_pool
from bagscope.kernels.dispatch import choose, own_arithmetic
from bagscope.kernels.linear_attention.halves import bag_mean
from bagscope.kernels.segments import pieces


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    agents: int = 49,
    scale: float | None = None,
    skip: int = 0,
) -> Tensor:
    """Return (T, H, dv).

    Args:
        q: queries, (T, H, d).
        k: keys, (T, H, d).
        v: values, (T, H, dv).
        cu_seqlens: (B + 1,) int32.
        agents: n.
        scale: s, 1/√d by default.
        skip: first rows of each bag that are no tiles (class tokens): they ask and are asked, but
            are left out of the agents. A bag of nothing else gets 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sizes = _group_sizes(cu_seqlens, agents, skip)
    groups = torch.nn.functional.pad(sizes.flatten().cumsum(0), (1, 0)).int()
    means = bag_mean(q, groups).view(*sizes.shape, *q.shape[1:])[:, 1:]
    told, _, _ = cross_attention_pool(means, k, v, cu_seqlens, scale=scale)
    found: Tensor = _tell(
        q, means.contiguous(), told.to(means.dtype), sizes[:, 1:] > 0, cu_seqlens, scale
    )
    return found.to(v.dtype)


def ask_agents(
    q: Tensor,
    agents: Tensor,
    told: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    used: Tensor | None = None,
) -> Tensor:
    """Return softmax(s q_i Aᵀ) V_A of every tile, for agents of its bag: (T, H, dv).

    The second half of `agent_attention`, for agents that come from elsewhere, as inducing points.

    Args:
        q: queries, (T, H, d).
        agents: A, (B, n, H, d).
        told: V_A, (B, n, H, dv).
        cu_seqlens: (B + 1,) int32.
        scale: s, 1/√d by default.
        used: (B, n) bool, which agents a bag has; all if None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if used is None:
        used = torch.ones(agents.shape[:2], dtype=torch.bool, device=agents.device)
    found: Tensor = _tell(q, agents.contiguous(), told.contiguous(), used, cu_seqlens, scale)
    return found


def _group_sizes(cu_seqlens: Tensor, agents: int, skip: int) -> Tensor:
    """Return the rows left out and those of each group: (B, 1 + n)."""
    many = cu_seqlens.diff().long()
    pooled = (many - skip).clamp(min=0)[:, None]
    index = torch.arange(agents, device=many.device)
    equal = pooled // agents + (index < pooled % agents).long()
    return torch.cat([many[:, None] - pooled, equal], 1)


def _weights(queries: Tensor, agents: Tensor, used: Tensor) -> Tensor:
    """Return softmax of (H, rows, n) over the agents that exist; 0 where none does."""
    scores = (queries @ agents.mT).masked_fill_(~used, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill(top.isinf(), 0.0)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny))


@torch.library.custom_op("bagscope::agents_tell", mutates_args=())
def _tell(
    q: Tensor, agents: Tensor, told: Tensor, used: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    choose("agent_attention", q)
    out = told.new_empty(*q.shape[:2], told.shape[-1])
    agents, told = agents.transpose(1, 2), told.transpose(1, 2)
    with own_arithmetic():
        for start, stop, parts in pieces(cu_seqlens):
            queries = scale * q[start:stop].to(agents.dtype).transpose(0, 1)
            for bag, a, b in parts:
                weights = _weights(queries[:, a - start : b - start], agents[bag], used[bag])
                out[a:b] = (weights @ told[bag]).transpose(0, 1)
    return out


@torch.library.custom_op("bagscope::agents_tell_backward", mutates_args=())
def _tell_backward(
    q: Tensor, agents: Tensor, told: Tensor, used: Tensor, cu_seqlens: Tensor, scale: float,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    agents, told = agents.transpose(1, 2), told.transpose(1, 2)
    grad_q, grad_agents, grad_told = (
        q.new_empty(q.shape),
        torch.zeros_like(agents),
        torch.zeros_like(told),
    )
    with own_arithmetic():
        for start, stop, parts in pieces(cu_seqlens):
            queries = scale * q[start:stop].to(agents.dtype).transpose(0, 1)
            grads = grad[start:stop].transpose(0, 1)
            for bag, a, b in parts:
                rows = slice(a - start, b - start)
                weights = _weights(queries[:, rows], agents[bag], used[bag])
                grad_told[bag] += weights.mT @ grads[:, rows]
                along = grads[:, rows] @ told[bag].mT
                along -= (along * weights).sum(-1, keepdim=True)
                along *= weights
                grad_q[a:b] = scale * (along @ agents[bag]).transpose(0, 1)
                grad_agents[bag] += along.mT @ queries[:, rows]
    return grad_q, *(g.transpose(1, 2).contiguous() for g in (grad_agents, grad_told))  # type: ignore[return-value]


@_tell.register_fake
def _(
    q: Tensor, agents: Tensor, told: Tensor, used: Tensor, cu_seqlens: Tensor, scale: float
) -> Tensor:
    return told.new_empty(*q.shape[:2], told.shape[-1])


@_tell_backward.register_fake
def _(
    q: Tensor, agents: Tensor, told: Tensor, used: Tensor, cu_seqlens: Tensor, scale: float,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), agents.new_empty(agents.shape), told.new_empty(told.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return *_tell_backward(*ctx.saved_tensors, ctx.scale, grad.contiguous()), None, None, None


_tell.register_autograd(_differentiate, setup_context=_keep)
