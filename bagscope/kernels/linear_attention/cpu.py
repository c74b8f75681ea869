"""The two halves of linear attention in chunks of rows: gather a bag, and ask it."""

from __future__ import annotations

import torch
from torch import Tensor

from bagscope.kernels.linear_attention.reference import feature
from bagscope.kernels.segments import pieces


def slope(x: Tensor, feature_map: str) -> Tensor:
    """Return φ'(x)."""
    if feature_map == "elu+1":
        return x.clamp(max=0.0).exp()
    if feature_map == "silu":
        gate = torch.sigmoid(x)
        return gate * (1 + x * (1 - gate))
    return (x > 0).to(x.dtype) if feature_map == "relu" else torch.ones_like(x)


def gather(k: Tensor, v: Tensor, cu_seqlens: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """Return Σ φ(k) vᵀ (B, H, d, dv) and Σ φ(k) (B, H, d) of each bag."""
    exact, bags = _exact(k), len(cu_seqlens) - 1
    kv = k.new_zeros(bags, k.shape[1], k.shape[2], v.shape[2], dtype=exact)
    total = k.new_zeros(bags, *k.shape[1:], dtype=exact)
    for start, stop, parts in pieces(cu_seqlens):
        keys = feature(k[start:stop].to(exact), feature_map)
        values = v[start:stop].to(exact)
        for bag, a, b in parts:
            rows = slice(a - start, b - start)
            kv[bag] += keys[rows].permute(1, 2, 0) @ values[rows].transpose(0, 1)
            total[bag] += keys[rows].sum(0)
    return kv, total


def gather_backward(
    k: Tensor, v: Tensor, cu_seqlens: Tensor, feature_map: str, grad_kv: Tensor, grad_total: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v."""
    exact = _exact(k)
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    for start, stop, parts in pieces(cu_seqlens):
        raw, values = k[start:stop].to(exact), v[start:stop].to(exact)
        keys, slopes = feature(raw, feature_map), slope(raw, feature_map)
        for bag, a, b in parts:
            rows = slice(a - start, b - start)
            along = values[rows].transpose(0, 1) @ grad_kv[bag].mT + grad_total[bag][:, None]
            grad_k[a:b] = along.transpose(0, 1) * slopes[rows]
            grad_v[a:b] = (keys[rows].transpose(0, 1) @ grad_kv[bag]).transpose(0, 1)
    return grad_k, grad_v


def ask(
    q: Tensor, kv: Tensor, total: Tensor, cu_seqlens: Tensor, feature_map: str,
    divide: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Return φ(q) kv, where asked divided by φ(q) · total + eps: (T, H, dv)."""
    out = q.new_empty(*q.shape[:2], kv.shape[-1])
    for start, stop, parts in pieces(cu_seqlens):
        queries = feature(q[start:stop].to(kv.dtype), feature_map).transpose(0, 1)
        for bag, a, b in parts:
            mine = queries[:, a - start : b - start]
            found = mine @ kv[bag]
            if divide:
                found /= mine @ total[bag][..., None] + eps
            out[a:b] = found.transpose(0, 1)
    return out


def ask_backward(
    q: Tensor, kv: Tensor, total: Tensor, cu_seqlens: Tensor, feature_map: str,
    divide: bool, eps: float, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, kv and total."""
    exact = kv.dtype
    grad_q, grad_kv, grad_total = (
        q.new_empty(q.shape),
        torch.zeros_like(kv),
        torch.zeros_like(total),
    )
    for start, stop, parts in pieces(cu_seqlens):
        raw, grads = q[start:stop].to(exact), grad[start:stop].to(exact).transpose(0, 1)
        queries, slopes = feature(raw, feature_map).transpose(0, 1), slope(raw, feature_map)
        for bag, a, b in parts:
            rows = slice(a - start, b - start)
            mine, along = queries[:, rows], grads[:, rows]
            if divide:
                mass = mine @ total[bag][..., None] + eps
                along = along / mass
                shrink = -(along * (mine @ kv[bag])).sum(-1, keepdim=True) / mass
                grad_mine = along @ kv[bag].mT + shrink * total[bag][:, None]
                grad_total[bag] += (mine.mT @ shrink).squeeze(-1)
            else:
                grad_mine = along @ kv[bag].mT
            grad_q[a:b] = grad_mine.transpose(0, 1) * slopes[rows]
            grad_kv[bag] += mine.mT @ along
    return grad_q, grad_kv, grad_total


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
