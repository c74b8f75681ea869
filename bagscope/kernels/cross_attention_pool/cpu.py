"""`cross_attention_pool` in chunks of rows: nothing of the bag's size but what is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from bagscope.kernels.segments import pieces


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, return_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the reference does, by an online softmax over the chunks."""
    bags, m, heads, _ = q.shape
    queries = (q * scale).transpose(1, 2)
    peak = q.new_full((bags, heads, m, 1), float("-inf"))
    mass = q.new_zeros(bags, heads, m, 1)
    mixed = q.new_zeros(bags, heads, m, v.shape[-1])
    weights = q.new_empty(len(k) if return_weights else 0, m, heads)
    for start, stop, parts in pieces(cu_seqlens):
        keys, values = k[start:stop].to(q.dtype), v[start:stop].to(q.dtype)
        for bag, a, b in parts:
            rows = slice(a - start, b - start)
            scores = queries[bag] @ keys[rows].permute(1, 2, 0)
            if return_weights:
                weights[a:b] = scores.permute(2, 1, 0)
            top = torch.maximum(peak[bag], scores.amax(-1, keepdim=True))
            shrink = torch.exp(peak[bag] - top)
            scores.sub_(top).exp_()
            mass[bag].mul_(shrink).add_(scores.sum(-1, keepdim=True))
            mixed[bag].mul_(shrink).add_(scores @ values[rows].transpose(0, 1))
            peak[bag] = top
    mixed /= mass.masked_fill(mass == 0, 1.0)
    lse = (mass.log() + peak).squeeze(-1).transpose(1, 2).contiguous()
    if return_weights:
        for _start, _stop, parts in pieces(cu_seqlens):
            for bag, a, b in parts:
                weights[a:b].sub_(lse[bag]).exp_()
    return mixed.transpose(1, 2).contiguous(), lse, weights


def backward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, lse: Tensor,
    grad: Tensor, delta: Tensor, grad_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v; the weights are computed again from lse.

    `grad` is that of pooled, `delta` (B, m, H) what the gradient of every score loses, and
    `grad_weights` is (T, m, H), or (0, m, H) where none come in.
    """
    queries, grads = q.transpose(1, 2), grad.transpose(1, 2)
    lse, delta = lse.transpose(1, 2)[..., None], delta.transpose(1, 2)[..., None]
    grad_q = torch.zeros_like(queries)
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    for start, stop, parts in pieces(cu_seqlens):
        keys, values = k[start:stop].to(q.dtype), v[start:stop].to(q.dtype)
        for bag, a, b in parts:
            rows = slice(a - start, b - start)
            weights = scale * (queries[bag] @ keys[rows].permute(1, 2, 0))
            weights.sub_(lse[bag]).exp_()
            grad_v[a:b] = (weights.mT @ grads[bag]).transpose(0, 1)
            along = grads[bag] @ values[rows].permute(1, 2, 0)
            if len(grad_weights):
                along += grad_weights[a:b].permute(2, 1, 0)
            along.sub_(delta[bag]).mul_(weights).mul_(scale)
            grad_q[bag] += along @ keys[rows].transpose(0, 1)
            grad_k[a:b] = (along.mT @ queries[bag]).transpose(0, 1)
    return grad_q.transpose(1, 2).contiguous(), grad_k, grad_v
