"""The selective scan on the CPU: chunks that fit the cache, states kept at chunk borders only.

A chunk holds decay, state and gradient of its positions as (steps, lanes, N, D), so that every
product runs along D; the recurrence itself is one fused product per step. Nothing is divided and no
product of decays is formed, so nothing underflows that matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.selective_scan.lanes import Lanes, lay_lanes

_CHUNK_ELEMENTS = 1 << 20
"""Elements of (steps, lanes, N, D). Smaller chunks stay in nearer caches, but wake the threads more
often: on a busy machine that costs more than the cache gives."""
_MOST_STEPS = 256


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What both passes read: the tensors as given, and the small ones widened."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    rates: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool

    @property
    def wide(self) -> torch.dtype:
        return self.rates.dtype


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk's rows, gathered: R = steps × lanes of them."""

    rows: Tensor
    kept: Tensor | None
    u: Tensor
    raw: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write one line per row to where the rows came from, leaving idle ones out."""
        if self.kept is not None:
            values = values[self.kept]
        rows = self.rows if self.kept is None else self.rows[self.kept]
        target.index_copy_(0, rows, values.to(target.dtype))


def forward(
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
    reverse: bool,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (T, D), the ungated output if there is a gate, the border states, flat."""
    given = _widen(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    tiles, features = u.shape
    out = u.new_empty(tiles, features)
    ungated = out if z is None else u.new_empty(tiles, features)
    if not tiles or not features:
        return out, u.new_empty(0), given.rates.new_empty(0)
    lanes = lay_lanes(cu_seqlens, tiles, reverse, order, given.rates.numel())
    shape = _chunk_shape(lanes, given.rates)
    borders = list(range(0, len(lanes.rows), shape[0]))
    states = given.rates.new_empty(len(borders), *shape[1:])
    decay, state = given.rates.new_empty(shape), given.rates.new_empty(shape)
    carried = given.rates.new_zeros(shape[1:])
    for index, first in enumerate(borders):
        chunk = _gather(given, lanes, first, shape[0])
        states[index].copy_(carried)
        carried = _states(chunk, given, lanes, first, decay, state, carried)[-1].clone()
        lines = state.view(-1, *given.rates.shape)[: len(chunk.rows)]
        y = torch.bmm(chunk.C[:, None], lines)[:, 0]
        if given.D is not None:
            y.addcmul_(chunk.u, given.D)
        chunk.put(ungated, y)
        if z is not None:
            chunk.put(out, y.mul_(F.silu(z[chunk.rows].to(given.wide))))
    return out, u.new_empty(0) if z is None else ungated, states.flatten()


def backward(
    dout: Tensor,
    ungated: Tensor,
    states: Tensor,
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
    reverse: bool,
    order: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C, D, z and delta_bias (empty where absent)."""
    given = _widen(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    du, ddelta = torch.zeros_like(u), torch.zeros_like(delta)
    dB, dC = torch.zeros_like(B), torch.zeros_like(C)
    dz = u.new_empty(0) if z is None else torch.zeros_like(z)
    drates, dskip = torch.zeros_like(given.rates), given.rates.new_zeros(u.shape[1])
    dbias = given.rates.new_zeros(u.shape[1])
    if u.numel():
        lanes = lay_lanes(cu_seqlens, len(u), reverse, order, given.rates.numel())
        shape = _chunk_shape(lanes, given.rates)
        decay, grad = given.rates.new_empty(shape), given.rates.new_empty(shape)
        state = given.rates.new_empty(shape[0] + 1, *shape[1:])
        carried = given.rates.new_zeros(shape[1:])
        borders = states.view(-1, *shape[1:])
        for index in reversed(range(len(borders))):
            chunk = _gather(given, lanes, index * shape[0], shape[0])
            dy = dout[chunk.rows].to(given.wide)
            if chunk.kept is not None:
                dy.masked_fill_(~chunk.kept[:, None], 0.0)
            if z is not None:
                gate = z[chunk.rows].to(given.wide)
                sigma = torch.sigmoid(gate)
                slope = sigma * (1 + gate * (1 - sigma))
                chunk.put(dz, dy * ungated[chunk.rows].to(given.wide) * slope)
                dy *= gate.mul_(sigma)
            state[0].copy_(borders[index])
            _states(chunk, given, lanes, index * shape[0], decay, state[1:], state[0])
            carried = _gradients(chunk, lanes, index * shape[0], dy, decay, grad, carried)
            size = (len(chunk.rows), *given.rates.shape)
            steps = len(chunk.rows) // shape[1]
            g, s = grad[:steps].view(size), state[1 : steps + 1].view(size)
            x = chunk.dt * chunk.u
            chunk.put(dC, torch.bmm(s, dy[:, :, None])[:, :, 0])
            chunk.put(dB, torch.bmm(g, x[:, :, None])[:, :, 0])
            dx = torch.bmm(chunk.B[:, None], g)[:, 0]
            # From here on `grad` is the gradient of the exponent dt·A.
            g.mul_(decay[:steps].view(size)).mul_(state[:steps].reshape(size))
            _zero_at(grad, lanes.starts, index * shape[0], steps)
            # The states are of no more use: their buffer takes the products.
            ddt = torch.mul(g, given.rates, out=s).sum(1).addcmul_(dx, chunk.u)
            drates += torch.mul(g, chunk.dt[:, None], out=s).sum(0)
            if delta_softplus:
                # torch's softplus is the identity beyond 20.
                ddt = torch.where(chunk.raw > 20, ddt, ddt * torch.sigmoid(chunk.raw))
            dx *= chunk.dt
            if given.D is not None:
                dx.addcmul_(dy, given.D)
                dskip += (dy * chunk.u).sum(0)
            if chunk.kept is not None:
                ddt.masked_fill_(~chunk.kept[:, None], 0.0)
            dbias += ddt.sum(0)
            chunk.put(du, dx)
            chunk.put(ddelta, ddt)
    return (
        du,
        ddelta,
        drates.t().to(A.dtype).contiguous(),
        dB,
        dC,
        u.new_empty(0) if D is None else dskip.to(D.dtype),
        dz,
        u.new_empty(0) if delta_bias is None else dbias.to(delta_bias.dtype),
    )


def _widen(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> _Inputs:
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    return _Inputs(
        u, delta, B, C, z, A.t().to(wide).contiguous(), None if D is None else D.to(wide),
        None if delta_bias is None else delta_bias.to(wide), delta_softplus,
    )  # fmt: skip


def _chunk_shape(lanes: Lanes, rates: Tensor) -> tuple[int, int, int, int]:
    """Return (steps, lanes, N, D) of a chunk: a pure function of the shapes."""
    side = lanes.rows.shape[1]
    steps = _CHUNK_ELEMENTS // max(1, side * rates.numel())
    return max(1, min(steps, _MOST_STEPS, len(lanes.rows))), side, *rates.shape


def _gather(given: _Inputs, lanes: Lanes, first: int, steps: int) -> _Chunk:
    rows = lanes.rows[first : first + steps].flatten()
    kept = None if lanes.idle is None else ~lanes.idle[first : first + steps].flatten()
    if kept is not None and bool(kept.all()):
        kept = None
    u, raw = given.u[rows].to(given.wide), given.delta[rows].to(given.wide)
    B, C = given.B[rows].to(given.wide), given.C[rows].to(given.wide)
    if kept is not None:
        # An idle position must not bring another bag's values, NaN among them, into a lane.
        for values in (u, raw, B, C):
            values.masked_fill_(~kept[:, None], 0.0)
    if given.delta_bias is not None:
        raw += given.delta_bias
    return _Chunk(rows, kept, u, raw, F.softplus(raw) if given.delta_softplus else raw, B, C)


def _states(
    chunk: _Chunk,
    given: _Inputs,
    lanes: Lanes,
    first: int,
    decay: Tensor,
    state: Tensor,
    carried: Tensor,
) -> Sequence[Tensor]:
    """Fill `decay` and `state`, and return the states step by step."""
    steps = len(chunk.rows) // decay.shape[1]
    size = (len(chunk.rows), *given.rates.shape)
    torch.mul(chunk.dt[:, None], given.rates, out=decay[:steps].view(size)).exp_()
    x = chunk.dt * chunk.u
    torch.mul(x[:, None], chunk.B[:, :, None], out=state[:steps].view(size))
    found = state[:steps].unbind(0)
    carries = _carries(lanes.starts, first, steps)
    for now, kept, carry in zip(found, decay[:steps].unbind(0), carries, strict=True):
        if carry is None:
            now.addcmul_(kept, carried)
        elif carry is not _NOWHERE:
            now.addcmul_(kept, torch.where(carry, carried, 0.0))
        carried = now
    return found


def _gradients(
    chunk: _Chunk,
    lanes: Lanes,
    first: int,
    dy: Tensor,
    decay: Tensor,
    grad: Tensor,
    carried: Tensor,
) -> Tensor:
    """Fill `grad` with the states' gradients, and return what goes on to the chunk before."""
    steps = len(chunk.rows) // grad.shape[1]
    size = (len(chunk.rows), *grad.shape[2:])
    torch.mul(dy[:, None], chunk.C[:, :, None], out=grad[:steps].view(size))
    found, kept = grad[:steps].unbind(0), decay[:steps].unbind(0)
    carries = list(_carries(lanes.starts, first, steps))
    found[-1].add_(carried)
    for t in range(steps - 1, 0, -1):
        carry = carries[t]
        if carry is None:
            found[t - 1].addcmul_(kept[t], found[t])
        elif carry is not _NOWHERE:
            found[t - 1].addcmul_(kept[t], torch.where(carry, found[t], 0.0))
    carry = carries[0]
    if carry is None:
        return kept[0] * found[0]
    if carry is _NOWHERE:
        return torch.zeros_like(found[0])
    return torch.where(carry, kept[0] * found[0], 0.0)


_NOWHERE = torch.zeros(0, dtype=torch.bool)


def _carries(starts: Tensor, first: int, steps: int) -> Iterator[Tensor | None]:
    """Yield per step which lanes carry their state on, (lanes, 1, 1): None all, `_NOWHERE` none.

    At a bag's start the state is left out rather than multiplied by zero: zero times NaN is NaN.
    """
    part = starts[first : first + steps]
    some, every = part.any(1).tolist(), part.all(1).tolist()
    for t in range(steps):
        if not some[t]:
            yield None
        elif every[t]:
            yield _NOWHERE
        else:
            yield ~part[t][:, None, None]


def _zero_at(grad: Tensor, starts: Tensor, first: int, steps: int) -> None:
    """Leave nothing at bag starts: no state came in there."""
    where = starts[first : first + steps]
    if bool(where.any()):
        grad[:steps][where] = 0.0
