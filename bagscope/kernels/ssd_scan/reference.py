"""The scan of Mamba-2 in plain torch: one row after the other, differentiable by autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor,
    chunk: int = 64,
) -> Tensor:
    """Return the scan's output, (T, H, P); see `ssd_scan` for the arguments."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads, width = x.shape[1:]
    shared = heads // max(1, B.shape[1])
    outputs: list[Tensor] = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        state = torch.zeros(heads, width, B.shape[2], dtype=wide, device=x.device)
        for row in range(start, stop):
            step, value = dt[row].to(wide), x[row].to(wide)
            b = B[row].to(wide).repeat_interleave(shared, 0)
            c = C[row].to(wide).repeat_interleave(shared, 0)
            state = torch.exp(step * A.to(wide))[:, None, None] * state
            state = state + (step[:, None] * value)[:, :, None] * b[:, None]
            y = (state @ c[:, :, None])[:, :, 0]
            outputs.append(y if D is None else y + D.to(wide)[:, None] * value)
    if not outputs:
        return x.clone()
    y = torch.stack(outputs)
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)
