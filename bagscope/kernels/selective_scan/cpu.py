"""The selective scan on the CPU: chunks that fit the cache, states kept at chunk borders only.

A chunk holds decay, state and gradient of its positions as (steps, lanes, N, channels), so that
every product runs along the channels; the recurrence itself is one fused product per step. Nothing
is divided and no product of decays is formed, so nothing underflows that matters.

Each span of channels has its own thread and its own buffers. Two threads of Python get in each
other's way between any two calls, so calls are few and long: what has no states (gates, step
sizes) is done for a block of several chunks, and the steps of a chunk are one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.selective_scan.lanes import Block, cut_blocks, lay_lanes
from bagscope.kernels.selective_scan.spans import add_products_in_turn, over_spans, spans_of

_CHUNK_ELEMENTS = 1 << 19
"""Elements of (steps, lanes, N, D). Smaller chunks stay in nearer caches, but each is some twenty
calls, at which the threads wait for each other: half and twice of this were slower."""
_MOST_STEPS = 256
_CHUNKS_PER_BLOCK = 8


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
class _Plan:
    """Blocks of rows; a chunk is `steps` of all lanes, and there are `chunks` in all."""

    blocks: list[Block]
    steps: int
    lanes: int
    chunks: int


class _Span:
    """A thread's channels: the inputs cut to them, and its buffers.

    A block's rows are in `u`, `raw`, `dt`, `x` (rows, channels) and `B`, `C` (rows, N); positions
    after the last are zero, so that the state stays there as it is. A chunk's are in `decay` and
    `state`, whose first step holds what comes in. Names with `_of` list the chunks of a block.
    """

    def __init__(self, given: _Inputs, channels: slice, plan: _Plan) -> None:
        self.given, self.channels = given, channels
        self.rates = given.rates[:, channels].contiguous()
        self.fastest = self.rates.amin(0)
        self.bias = None if given.delta_bias is None else given.delta_bias[channels]
        self.skip = None if given.D is None else given.D[channels]
        self.chunks = _CHUNKS_PER_BLOCK
        self.size = plan.steps * plan.lanes
        states, width = self.rates.shape
        self.dt, self.x = self.rows(width), self.rows(width)
        self.B, self.C = self.rows(states), self.rows(states)
        self.dt_of, self.x_of = self.parts(self.dt), self.parts(self.x)
        self.B_of, self.C_of = self.parts(self.B), self.parts(self.C)
        shape = (plan.lanes, states, width)
        self.decay = self.rates.new_empty(plan.steps, *shape)
        self.state = self.rates.new_zeros(plan.steps + 1, *shape)
        self.decays, self.states = self.decay.unbind(0), self.state.unbind(0)
        self.decay_lines, self.state_lines = self.lines(self.decay), self.lines(self.state[1:])
        self.before_lines = self.lines(self.state[:-1])

    def rows(self, width: int) -> Tensor:
        """Return a line per position of a block."""
        return self.rates.new_zeros(self.chunks * self.size, width)

    def parts(self, rows: Tensor) -> list[Tensor]:
        """Return a block's rows chunk by chunk, each (positions, 1, width)."""
        return list(rows.view(self.chunks, self.size, 1, -1).unbind(0))

    def lines(self, buffer: Tensor) -> Tensor:
        """Return a chunk's buffer with a line (N, channels) per position."""
        return buffer.view(-1, *self.rates.shape)

    def take(self, source: Tensor, block: Block) -> Tensor:
        """Return the block's rows, widened; idle ones are zero."""
        wide = self.rates.dtype
        if isinstance(block.rows, slice):
            return source[block.rows].to(wide)
        values = source.index_select(0, block.rows).to(wide)
        # An idle position must not bring another bag's values, NaN among them, into a lane.
        return values if block.idle is None else values.masked_fill_(block.idle[:, None], 0.0)

    def gather(self, block: Block) -> tuple[Tensor, Tensor, bool]:
        """Fill the block's buffers; return u, the biased step sizes, and whether a decay is nil."""
        given = self.given
        u = self.take(given.u[:, self.channels], block)
        raw = self.take(given.delta[:, self.channels], block)
        if self.bias is not None:
            raw = raw + self.bias
        dt = F.softplus(raw) if given.delta_softplus else raw
        rows = len(u)
        self.dt[:rows].copy_(dt)
        torch.mul(dt, u, out=self.x[:rows])
        self.B[:rows].copy_(self.take(given.B, block))
        self.C[:rows].copy_(self.take(given.C, block))
        for buffer in (self.dt, self.x, self.B, self.C):
            buffer[rows:].zero_()
        return u, raw, not (dt * self.fastest).amin().item() >= _least_exponent(dt.dtype)

    def run(self, block: Block, part: int, is_nil: bool) -> None:
        """Fill a chunk's decays, and its states from what came in on."""
        torch.mul(self.dt_of[part], self.rates, out=self.decay_lines)
        if is_nil:
            self.decay_lines.clamp_min_(_least_exponent(self.decay.dtype))
        self.decay_lines.exp_()
        torch.mul(self.x_of[part], self.B_of[part].transpose(1, 2), out=self.state_lines)
        carries = block.carries[part]
        if carries is None:
            add_products_in_turn(self.states[1:], self.decays, self.states[:-1])
            return
        for t, carry in enumerate(carries):
            _carry_on(self.states[t + 1], self.decays[t], self.states[t], carry)


def _least_exponent(dtype: torch.dtype) -> float:
    """Return below what exp gives no normal number, for which it takes a hundred times as long."""
    return math.log(torch.finfo(dtype).tiny)


def _carry_on(target: Tensor, decay: Tensor, source: Tensor, carry: Tensor | bool) -> None:
    if carry is True:
        target.addcmul_(decay, source)
    elif carry is not False:
        target.addcmul_(decay, torch.where(carry, source, 0.0))


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
    plan = _plan(cu_seqlens, tiles, reverse, order, given.rates)
    borders = given.rates.new_empty(plan.chunks, plan.lanes, *given.rates.shape)

    def work(_: int, channels: slice) -> None:
        span = _Span(given, channels, plan)
        y, entering = span.rows(span.rates.shape[1]), iter(borders[..., channels].unbind(0))
        y_of = span.parts(y)
        for block in plan.blocks:
            x, _raw, is_nil = span.gather(block)
            for part in range(len(block.carries)):
                next(entering).copy_(span.states[0])
                span.run(block, part, is_nil)
                torch.bmm(span.C_of[part], span.state_lines, out=y_of[part])
                span.states[0].copy_(span.states[-1])
            found = y[: len(x)]
            if span.skip is not None:
                found.addcmul_(x, span.skip)
            block.put(ungated[:, channels], found)
            if z is not None:
                gate = F.silu(span.take(z[:, channels], block))
                block.put(out[:, channels], gate.mul_(found))

    with _exact_products():
        over_spans(work, spans_of(features, A.shape[1]))
    return out, u.new_empty(0) if z is None else ungated, borders.flatten()


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
    if not u.numel():
        every = (u, delta, A, B, C, D, z, delta_bias)
        return tuple(u.new_empty(0) if t is None else torch.zeros_like(t) for t in every)
    du, ddelta = u.new_empty(u.shape), delta.new_empty(u.shape)
    dz = u.new_empty(0) if z is None else z.new_empty(u.shape)
    drates = torch.empty_like(given.rates)
    dskip, dbias = (given.rates.new_zeros(u.shape[1]) for _ in range(2))
    plan = _plan(cu_seqlens, len(u), reverse, order, given.rates)
    borders = states.view(plan.chunks, plan.lanes, *given.rates.shape)
    spans = spans_of(u.shape[1], A.shape[1])
    dB, dC = (given.rates.new_empty(len(spans), *B.shape) for _ in range(2))

    def work(index: int, channels: slice) -> None:
        span = _Span(given, channels, plan)
        chunk = _Gradients(span)
        entering = reversed(borders[..., channels].unbind(0))
        for block in reversed(plan.blocks):
            x, raw, is_nil = span.gather(block)
            dy = span.take(dout[:, channels], block)
            if z is not None:
                gate = span.take(z[:, channels], block)
                sigma = torch.sigmoid(gate)
                through = dy * sigma
                slope = sigma.neg_().add_(1).mul_(gate).add_(1).mul_(through)
                block.put(dz[:, channels], slope.mul_(span.take(ungated[:, channels], block)))
                dy = through.mul_(gate)
            rows = len(x)
            chunk.dy[:rows].copy_(dy)
            chunk.dy[rows:].zero_()
            for part in reversed(range(len(block.carries))):
                span.states[0].copy_(next(entering))
                span.run(block, part, is_nil)
                chunk.run(block, part)
            block.put(dB[index], chunk.dB[:rows])
            block.put(dC[index], chunk.dC[:rows])
            dx, ddt = chunk.dx[:rows], chunk.ddt[:rows]
            ddt.addcmul_(dx, x)
            if delta_softplus:
                ddt.mul_(torch.sigmoid(raw))
            dx.mul_(span.dt[:rows])
            if span.skip is not None:
                dx.addcmul_(dy, span.skip)
                dskip[channels] += (dy * x).sum(0)
            if block.idle is not None:
                ddt.masked_fill_(block.idle[:, None], 0.0)
            dbias[channels] += ddt.sum(0)
            block.put(du[:, channels], dx)
            block.put(ddelta[:, channels], ddt)
        drates[:, channels] = chunk.drates.sum(0)

    with _exact_products():
        over_spans(work, spans)
    return (
        du,
        ddelta,
        drates.t().to(A.dtype).contiguous(),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        u.new_empty(0) if D is None else dskip.to(D.dtype),
        dz,
        u.new_empty(0) if delta_bias is None else dbias.to(delta_bias.dtype),
    )


class _Gradients:
    """A thread's buffers of the backward pass: of a block's rows, and of a chunk's states."""

    def __init__(self, span: _Span) -> None:
        self.span = span
        states, width = span.rates.shape
        self.dy, self.dx, self.ddt = span.rows(width), span.rows(width), span.rows(width)
        self.dB, self.dC = span.rows(states), span.rows(states)
        self.dy_of, self.dx_of = span.parts(self.dy), span.parts(self.dx)
        self.ddt_of = [rows[:, 0] for rows in span.parts(self.ddt)]
        self.dB_of, self.dC_of = span.parts(self.dB), span.parts(self.dC)
        self.grad, drates = torch.empty_like(span.decay), torch.zeros_like(span.decay)
        self.lines, self.drates = span.lines(self.grad), span.lines(drates)
        self.backwards = self.grad.unbind(0)[::-1]
        self.decays_backwards = span.decays[::-1]
        self.leaving = torch.zeros_like(span.decay[0])

    def run(self, block: Block, part: int) -> None:
        """Go back through a chunk whose decays and states are there."""
        span, g = self.span, self.lines
        torch.bmm(self.dy_of[part], span.state_lines.transpose(1, 2), out=self.dC_of[part])
        torch.mul(self.dy_of[part], span.C_of[part].transpose(1, 2), out=g)
        self._carry(block.carries[part])
        torch.bmm(span.x_of[part], g.transpose(1, 2), out=self.dB_of[part])
        torch.bmm(span.B_of[part], g, out=self.dx_of[part])
        # From here on `g` is the gradient of the exponent dt·A.
        g.mul_(span.decay_lines).mul_(span.before_lines)
        if (starts := block.starts[part]) is not None:
            # No state came in there.
            g[starts] = 0.0
        self.drates.addcmul_(g, span.dt_of[part])
        # The decays are of no more use: their buffer takes the products.
        torch.sum(torch.mul(g, span.rates, out=span.decay_lines), 1, out=self.ddt_of[part])

    def _carry(self, carries: list[Tensor | bool] | None) -> None:
        """Add to each state's gradient what the next state's brings."""
        grads, decays = self.backwards, self.decays_backwards
        grads[0].add_(self.leaving)
        if carries is None:
            if len(grads) > 1:
                add_products_in_turn(grads[1:], decays[:-1], grads[:-1])
            torch.mul(decays[-1], grads[-1], out=self.leaving)
            return
        targets = (*grads[1:], self.leaving.zero_())
        for t, carry in enumerate(reversed(carries)):
            _carry_on(targets[t], decays[t], grads[t], carry)


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


def _plan(
    cu_seqlens: Tensor, tiles: int, reverse: bool, order: Tensor | None, rates: Tensor
) -> _Plan:
    """Return how to go through the rows: a pure function of the shapes, not of the threads."""
    lanes = lay_lanes(cu_seqlens, tiles, reverse, order, rates.numel())
    length, side = lanes.rows.shape
    steps = _CHUNK_ELEMENTS // max(1, side * rates.numel())
    steps = max(1, min(steps, _MOST_STEPS, length))
    blocks = cut_blocks(lanes, steps, _CHUNKS_PER_BLOCK)
    return _Plan(blocks, steps, side, -(-length // steps))


@contextmanager
def _exact_products() -> Iterator[None]:
    """Keep oneDNN out: it takes longer to begin than these small products last."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
