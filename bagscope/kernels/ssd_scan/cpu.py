"""The scan of Mamba-2 on the CPU: chunks by matrix products, states kept at chunk borders only.

Chunks go across bags: a row looks back as far as its bag's start, and a bag that begins in a chunk
takes nothing of the state that enters it. With c the sums of Δ·A within the chunk, X̃ = Δ·x:

    Y = (C Bᵀ ⊙ L) X̃ + e ⊙ (C Sᵀ),            L[l, s] = exp(c_l − c_s), s ≤ l in the same bag
    S' = k·S + X̃ᵀ (w ⊙ B),                    e_l = exp(c_l), w_s = exp(c_last − c_s)

The sums are float64, so their differences are as exact as sums over the rows between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.segments import bag_of_tile


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One chunk of L rows, heads first; G groups of heads share B and C.

    Attributes:
        values: (H, L, P) x̃.
        B: (G, L, N).
        C: (G, L, N).
        within: (H, L, L), the decay from row s to row l.
        entering: (H, L), the decay from the chunk's border to each row; 0 past a bag's start.
        leaving: (H, L), the decay from each row to the chunk's end; 0 before a bag's start.
        through: (H,), the decay across the chunk; 0 where a bag starts in it.
    """

    values: Tensor
    B: Tensor
    C: Tensor
    within: Tensor
    entering: Tensor
    leaving: Tensor
    through: Tensor

    def for_heads(self, grouped: Tensor) -> Tensor:
        """Return what groups share, once per head."""
        return grouped.repeat_interleave(len(self.values) // len(grouped), 0)

    def for_groups(self, headed: Tensor) -> Tensor:
        """Return the sum over the heads of each group."""
        return headed.view(len(self.B), -1, *headed.shape[1:]).sum(1)


def _read(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bag: Tensor, start: int, stop: int
) -> _Chunk:
    wide = A.dtype
    step = dt[start:stop].to(wide)
    sums = (step.double() * A.double()).cumsum(0).t()
    own = bag[start:stop]
    rows = torch.arange(stop - start)
    reaches = (own[:, None] == own[None]) & (rows[:, None] >= rows[None])
    within = (sums[:, :, None] - sums[:, None]).masked_fill_(~reaches, -torch.inf)
    first = own == (bag[start - 1] if start else -1)
    last = own == own[-1]
    return _Chunk(
        values=(step[:, :, None] * x[start:stop].to(wide)).transpose(0, 1),
        B=B[start:stop].to(wide).transpose(0, 1),
        C=C[start:stop].to(wide).transpose(0, 1),
        within=within.to(wide).exp_(),
        entering=sums.masked_fill(~first, -torch.inf).exp().to(wide),
        leaving=(sums[:, -1:] - sums).masked_fill(~last, -torch.inf).exp().to(wide),
        through=(sums[:, -1].exp() * first[-1]).to(wide),
    )


def _onward(chunk: _Chunk, state: Tensor) -> Tensor:
    """Return the state (H, P, N) that leaves a chunk, given the one that enters."""
    weighted = chunk.values * chunk.leaving[:, :, None]
    added = weighted.transpose(1, 2) @ chunk.for_heads(chunk.B)
    # A state that does not pass is left out: zero times NaN is NaN.
    passes = chunk.through[:, None, None]
    return torch.where(passes > 0, passes * state, 0.0) + added


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the ungated output where there is a gate, the border states, flat."""
    out = torch.empty(x.shape, dtype=x.dtype)
    ungated = out if z is None else torch.empty(x.shape, dtype=x.dtype)
    rates = A.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    starts = range(0, len(x), chunk)
    states = rates.new_empty(len(starts), *x.shape[1:], B.shape[2])
    bag = bag_of_tile(cu_seqlens, len(x))
    state = rates.new_zeros(*x.shape[1:], B.shape[2])
    for index, start in enumerate(starts):
        stop = min(start + chunk, len(x))
        part = _read(x, dt, rates, B, C, bag, start, stop)
        states[index] = state
        weights = part.for_heads(part.C @ part.B.transpose(1, 2)) * part.within
        y = weights @ part.values
        seen = part.for_heads(part.C) @ state.transpose(1, 2)
        y += torch.where(part.entering[:, :, None] > 0, seen * part.entering[:, :, None], 0.0)
        y = y.transpose(0, 1)
        if D is not None:
            y = torch.addcmul(y, D.to(rates.dtype)[:, None], x[start:stop].to(rates.dtype))
        ungated[start:stop] = y
        if z is not None:
            out[start:stop] = y * F.silu(z[start:stop].to(rates.dtype))
        state = _onward(part, state)
    return out, x.new_empty(0) if z is None else ungated, states.flatten()


def backward(
    dout: Tensor,
    ungated: Tensor,
    kept: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B, C, D and z (empty where absent)."""
    wide = kept.dtype
    states = kept.view(-1, *x.shape[1:], B.shape[2])
    rates, bag = A.to(wide), bag_of_tile(cu_seqlens, len(x))
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype) for t in (x, dt, B, C))
    dz = x.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype)
    dA, dD = torch.zeros_like(rates), torch.zeros_like(rates)
    onward = torch.zeros(states.shape[1:], dtype=wide)
    for index in reversed(range(len(states))):
        start = index * chunk
        here = slice(start, min(start + chunk, len(x)))
        part = _read(x, dt, rates, B, C, bag, here.start, here.stop)
        dy = dout[here].to(wide)
        if z is not None:
            gate = z[here].to(wide)
            sigma = torch.sigmoid(gate)
            slope = sigma * (1 + gate * (1 - sigma))
            dz[here] = dy * ungated[here].to(wide) * slope
            dy = dy * (gate * sigma)
        values, step = x[here].to(wide), dt[here].to(wide)
        dvalues, db, dc, dsums, before = _gradients(part, dy.transpose(0, 1), states[index], onward)
        onward = before
        dvalues = dvalues.transpose(0, 1)
        # Every row's exponent is a sum from the chunk's border on.
        drate = dsums.flip(1).cumsum(1).flip(1).t().to(wide)
        ddt[here] = (dvalues * values).sum(2) + drate * rates
        dA += (drate * step).sum(0)
        shown = dvalues * step[:, :, None]
        if D is not None:
            shown = shown + D.to(wide)[:, None] * dy
            dD += (dy * values).sum((0, 2))
        dx[here] = shown
        dB[here], dC[here] = db.transpose(0, 1), dc.transpose(0, 1)
    return dx, ddt, dA.to(A.dtype), dB, dC, x.new_empty(0) if D is None else dD.to(D.dtype), dz


def _gradients(
    part: _Chunk, dy: Tensor, state: Tensor, onward: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x̃, B, C, of the sums c (H, L), and of the entering state.

    Args:
        part: the chunk.
        dy: (H, L, P).
        state: (H, P, N), what entered.
        onward: (H, P, N), the gradient of what left.
    """
    B, C = part.for_heads(part.B), part.for_heads(part.C)
    products = part.for_heads(part.C @ part.B.transpose(1, 2))
    entering, leaving = part.entering[:, :, None], part.leaving[:, :, None]
    # `entering` is zero for the bags that begin here; a NaN in the state is none of theirs.
    state = torch.where(part.entering[:, :1, None] > 0, state, 0.0)
    dweights = (dy @ part.values.transpose(1, 2)) * part.within
    dproducts = part.for_groups(dweights)
    # A row's own weight has no exponent. The sums cancel, but for what lies between: float64.
    dexponent = (dweights * products).tril_(-1)
    rows, columns = (dexponent.sum(side, dtype=torch.float64) for side in (2, 1))
    returned = B @ onward.transpose(1, 2)
    dvalues = (products * part.within).transpose(1, 2) @ dy + leaving * returned
    weighted = entering * dy
    dC = dproducts @ part.B + part.for_groups(weighted @ state)
    dB = dproducts.transpose(1, 2) @ part.C + part.for_groups((leaving * part.values) @ onward)
    seen = (weighted * (C @ state.transpose(1, 2))).sum(2)
    left = part.leaving * (part.values * returned).sum(2)
    dsums = rows - columns + seen - left
    dsums[:, -1] += left.double().sum(1) + part.through * (state * onward).sum((1, 2))
    before = part.through[:, None, None] * onward + weighted.transpose(1, 2) @ C
    return dvalues, dB, dC, dsums, before
