"""The selective scan in plain torch: one row after the other, differentiable by autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor,
    reverse: bool = False,
    order: Tensor | None = None,
) -> Tensor:
    """Return the scan's output, (T, D); see `selective_scan` for the arguments."""
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    rows = torch.arange(len(u), device=u.device) if order is None else order
    step = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)
    step = F.softplus(step) if delta_softplus else step
    outputs: list[Tensor] = []
    positions: list[Tensor] = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        state = torch.zeros(A.shape, dtype=wide, device=u.device)
        bag = rows[start:stop].flip(0) if reverse else rows[start:stop]
        positions.append(bag)
        for row in bag.tolist():
            x, dt = u[row].to(wide), step[row]
            state = torch.exp(dt[:, None] * A.to(wide)) * state
            state = state + (dt * x)[:, None] * B[row].to(wide)
            y = state @ C[row].to(wide)
            outputs.append(y if D is None else y + D.to(wide) * x)
    if not outputs:
        return u.clone()
    y = torch.stack(outputs)[torch.argsort(torch.cat(positions))]
    return (y if z is None else y * F.silu(z.to(wide))).to(u.dtype)
