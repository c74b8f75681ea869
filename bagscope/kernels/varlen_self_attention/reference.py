"""`varlen_self_attention` in plain torch: every score of a bag at once."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def varlen_self_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    neighbours: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Return (T, H, dv)."""
    out = [v.new_zeros(0, *v.shape[1:])]
    for a, b in pairwise(cu_seqlens.tolist()):
        scores = scale * torch.einsum("ihd,jhd->hij", q[a:b], k[a:b])
        if neighbours is not None:
            grid, r = neighbours
            steps = (grid[a:b, None] - grid[None, a:b]).abs().amax(-1)
            scores = scores.masked_fill(steps > r, float("-inf"))
        out.append(torch.einsum("hij,jhe->ihe", torch.softmax(scores, -1), v[a:b]))
    return torch.cat(out)
