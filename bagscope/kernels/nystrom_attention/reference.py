"""Nyström attention in plain torch: zeros in front, every matrix whole, gradients by autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional


def nystrom_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    landmarks: int = 256,
    iterations: int = 6,
    zero_pads: bool = False,
    shared_start: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return (T, H, d), bag by bag."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = [v.new_zeros(0, *v.shape[1:])]
    for a, b in pairwise(cu_seqlens.tolist()):
        if b > a:
            weights = attention_matrix(
                scale * q[a:b], k[a:b], landmarks, iterations, zero_pads, shared_start
            )
            # Zeros in front are keys without a value.
            mine = weights[:, a - b :, a - b :]
            out.append((mine @ v[a:b].to(mine.dtype).transpose(0, 1)).transpose(0, 1).to(v.dtype))
    return torch.cat(out)


def attention_matrix(
    q: Tensor, k: Tensor, landmarks: int, iterations: int, zero_pads: bool, shared_start: bool
) -> Tensor:
    """Return what stands for softmax(q kᵀ) of one bag (n, H, d): (H, p + n, p + n), p zeros first.

    Without `zero_pads` they weigh nothing, and a bag of n ≤ `landmarks` rows gets the softmax.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(exact).transpose(0, 1), k.to(exact).transpose(0, 1)
    rows = q.shape[1]
    if rows <= landmarks and not zero_pads:
        return (q @ k.mT).softmax(-1)
    pads = -rows % landmarks
    q, k = (functional.pad(x, (0, 0, pads, 0)) for x in (q, k))
    is_row = torch.arange(rows + pads, device=q.device) >= pads
    runs = is_row.view(landmarks, -1)
    divisor = runs.shape[1] if zero_pads else runs.sum(1).clamp(min=1)[:, None]
    q_means, k_means = (x.view(len(x), *runs.shape, -1).sum(2) / divisor for x in (q, k))
    hidden = q.new_zeros(rows + pads)
    if not zero_pads:
        there = runs.any(1)
        q_means, k_means = q_means[:, there], k_means[:, there]
        hidden = hidden.masked_fill(~is_row, float("-inf"))
    s1 = (q @ k_means.mT).softmax(-1)
    s2 = (q_means @ k_means.mT).softmax(-1)
    s3 = (q_means @ k.mT + hidden).softmax(-1)
    found: Tensor = s1 @ pseudo_inverse(s2, iterations, shared_start) @ s3
    return found


def pseudo_inverse(s: Tensor, iterations: int, shared_start: bool) -> Tensor:
    """Return Z (H, m, m), each iteration as it is written."""
    columns, rows = s.sum(-2), s.sum(-1)
    dims = (0, 1) if shared_start else 1
    z = s.mT / (columns.amax(dims, keepdim=True) * rows.amax(dims, keepdim=True))[..., None]
    identity = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    for _ in range(iterations):
        a = s @ z
        z = 0.25 * z @ (13 * identity - a @ (15 * identity - a @ (7 * identity - a)))
    return z
