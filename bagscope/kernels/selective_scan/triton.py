"""The selective scan on a GPU: chunks of rows in parallel, in three passes each way.

1. `ends`: each chunk's last state if it began at zero, and the sum of its step sizes;
2. `carry`: over the chunks, one after the other, the state that enters each;
3. `scan`: each chunk's rows by an associative scan, state by state, from the state that enters.

Backward goes the same way from the last row to the first. A chunk knows nothing of bags: a row that
begins one has decay zero. States and sums are float32.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _BLOCK_D = 64, 32
_SMALL_ROWS, _SMALL_BLOCK_D = 16, 16


def blocks(tiles: int, features: int, on_gpu: bool) -> tuple[int, int, int]:
    """Return rows per chunk, channels per block and warps; the interpreter takes small ones."""
    if not on_gpu:
        return _SMALL_ROWS, _SMALL_BLOCK_D, 4
    return _ROWS, min(_BLOCK_D, max(16, triton.next_power_of_2(features))), 8


@triton.jit
def _compose(decay_a, state_a, decay_b, state_b):
    # Zero times NaN is NaN: where nothing passes, nothing is multiplied.
    closed = decay_b == 0.0
    decay = tl.where(closed, 0.0, decay_b * decay_a)
    return decay, tl.where(closed, state_b, decay_b * state_a + state_b)


@triton.jit
def _row_of(position, order_ptr, T, REVERSE: tl.constexpr, HAS_ORDER: tl.constexpr):
    """Return the row that is visited at a position."""
    row = position.to(tl.int64)
    if REVERSE:
        row = T - 1 - row
    if HAS_ORDER:
        row = tl.load(order_ptr + row, mask=(position >= 0) & (position < T), other=0)
    return row


@triton.jit
def _raw_step(delta_ptr, bias_ptr, row, d, inside, D, HAS_BIAS: tl.constexpr):
    raw = tl.load(delta_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return raw


@triton.jit
def _step(raw, inside, SOFTPLUS: tl.constexpr):
    """Return the step size; log1p by its quotient, since log(1 + e) loses what is small."""
    dt = raw
    if SOFTPLUS:
        e = tl.exp(tl.minimum(raw, 20.0))
        one_e = 1.0 + e
        rest = one_e - 1.0
        log1p = tl.where(rest == 0.0, e, tl.log(one_e) * (e / tl.where(rest == 0.0, 1.0, rest)))
        dt = tl.where(raw > 20.0, raw, log1p)
    return tl.where(inside, dt, 0.0)


@triton.jit
def selective_scan_ends_kernel(
    u_ptr, delta_ptr, rates_ptr, B_ptr, C_ptr, bias_ptr, z_ptr, dout_ptr, fresh_ptr, order_ptr,
    ends_ptr, spans_ptr, broken_ptr, T, D, N,
    BACKWARD: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    REVERSE: tl.constexpr, HAS_ORDER: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write what each chunk adds to the state (backward: to the gradient) that leaves it."""
    chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = chunk * ROWS + tl.arange(0, ROWS)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, channel = position < T, d < D
    inside = real[:, None] & channel[None, :]
    row = _row_of(position, order_ptr, T, REVERSE, HAS_ORDER)
    at = row[:, None] * D + d[None, :]
    fresh = tl.load(fresh_ptr + position, mask=real, other=0).to(tl.int32)
    raw = _raw_step(delta_ptr, bias_ptr, row, d, inside, D, HAS_BIAS)
    dt = _step(raw, inside, SOFTPLUS)
    if BACKWARD:
        source = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_Z:
            z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
            source *= z * tl.sigmoid(z)
        span = tl.cumsum(dt, 0)
        alive = tl.cumsum(fresh, 0) == 0
        weights_ptr = C_ptr
    else:
        source = dt * tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
        span = tl.cumsum(dt, 0, reverse=True) - dt
        alive = tl.cumsum(fresh, 0, reverse=True) - fresh == 0
        weights_ptr = B_ptr
        tl.store(spans_ptr + chunk * D + d, tl.sum(dt, 0), mask=channel)
        if block == 0:
            tl.store(broken_ptr + chunk, tl.sum(fresh, 0))
    for n in range(N):
        rate = tl.load(rates_ptr + n * D + d, mask=channel, other=0.0)
        weight = tl.load(weights_ptr + row * N + n, mask=real, other=0.0).to(tl.float32)
        part = tl.exp(span * rate[None, :]) * source * weight[:, None]
        total = tl.sum(tl.where(alive[:, None], part, 0.0), 0)
        tl.store(ends_ptr + (chunk * N + n) * D + d, total, mask=channel)


@triton.jit
def selective_scan_carry_kernel(
    ends_ptr, spans_ptr, broken_ptr, rates_ptr, chunks, D, N,
    BACKWARD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Replace what each chunk adds by what enters it."""
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = d < D
    rate = tl.load(rates_ptr + n * D + d, mask=channel, other=0.0)
    state = tl.zeros((BLOCK_D,), dtype=tl.float32)
    chunk, ahead = n * 0, 1
    if BACKWARD:
        chunk, ahead = chunk + chunks - 1, -1
    for _ in range(chunks):
        at = ends_ptr + (chunk * N + n) * D + d
        added = tl.load(at, mask=channel, other=0.0)
        tl.store(at, state, mask=channel)
        span = tl.load(spans_ptr + chunk * D + d, mask=channel, other=0.0)
        closed = tl.load(broken_ptr + chunk) > 0
        state = tl.where(closed, 0.0, tl.exp(rate * span) * state) + added
        chunk += ahead


@triton.jit
def selective_scan_fwd_kernel(
    u_ptr, delta_ptr, rates_ptr, B_ptr, C_ptr, skip_ptr, bias_ptr, z_ptr, fresh_ptr, order_ptr,
    states_ptr, out_ptr, ungated_ptr, T, D, N,
    SOFTPLUS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    REVERSE: tl.constexpr, HAS_ORDER: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the outputs of a chunk of rows."""
    chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = chunk * ROWS + tl.arange(0, ROWS)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, channel = position < T, d < D
    inside = real[:, None] & channel[None, :]
    row = _row_of(position, order_ptr, T, REVERSE, HAS_ORDER)
    at = row[:, None] * D + d[None, :]
    fresh = tl.load(fresh_ptr + position, mask=real, other=0) != 0
    raw = _raw_step(delta_ptr, bias_ptr, row, d, inside, D, HAS_BIAS)
    dt = _step(raw, inside, SOFTPLUS)
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for n in range(N):
        rate = tl.load(rates_ptr + n * D + d, mask=channel, other=0.0)
        b = tl.load(B_ptr + row * N + n, mask=real, other=0.0).to(tl.float32)
        c = tl.load(C_ptr + row * N + n, mask=real, other=0.0).to(tl.float32)
        enters = tl.load(states_ptr + (chunk * N + n) * D + d, mask=channel, other=0.0)
        decay = tl.where(fresh[:, None], 0.0, tl.exp(dt * rate[None, :]))
        decay, state = tl.associative_scan((decay, dt * u * b[:, None]), 0, _compose)
        state += tl.where(decay == 0.0, 0.0, decay * enters[None, :])
        y += state * c[:, None]
    if HAS_SKIP:
        y += tl.load(skip_ptr + d, mask=channel, other=0.0).to(tl.float32)[None, :] * u
    if HAS_Z:
        tl.store(ungated_ptr + at, y.to(ungated_ptr.dtype.element_ty), mask=inside)
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def selective_scan_bwd_kernel(
    u_ptr, delta_ptr, rates_ptr, B_ptr, C_ptr, skip_ptr, bias_ptr, z_ptr, fresh_ptr, order_ptr,
    states_ptr, grads_ptr, dout_ptr, ungated_ptr,
    du_ptr, ddelta_ptr, drates_ptr, dB_ptr, dC_ptr, dskip_ptr, dz_ptr, dbias_ptr, T, D, N,
    SOFTPLUS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    REVERSE: tl.constexpr, HAS_ORDER: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk's rows, and its share of the gradients of what rows share."""
    chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, ROWS)
    position = chunk * ROWS + place
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, channel = position < T, d < D
    inside = real[:, None] & channel[None, :]
    row = _row_of(position, order_ptr, T, REVERSE, HAS_ORDER)
    at = row[:, None] * D + d[None, :]
    fresh = tl.load(fresh_ptr + position, mask=real, other=0) != 0
    raw = _raw_step(delta_ptr, bias_ptr, row, d, inside, D, HAS_BIAS)
    dt = _step(raw, inside, SOFTPLUS)
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # The decay of a row's successor passes its gradient on; the chunk's last row has its
    # successor's share in `grads` already.
    has_next = (position + 1 < T) & (place < ROWS - 1)
    next_inside = has_next[:, None] & channel[None, :]
    next_row = _row_of(position + 1, order_ptr, T, REVERSE, HAS_ORDER)
    next_raw = _raw_step(delta_ptr, bias_ptr, next_row, d, next_inside, D, HAS_BIAS)
    next_dt = _step(next_raw, next_inside, SOFTPLUS)
    next_fresh = tl.load(fresh_ptr + position + 1, mask=has_next, other=0) != 0
    dy = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_Z:
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sigma = tl.sigmoid(z)
        y = tl.load(ungated_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dz = dy * y * sigma * (1.0 + z * (1.0 - sigma))
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        dy *= z * sigma
    dx = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    ddt = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    share = block.to(tl.int64) * T * N
    for n in range(N):
        rate = tl.load(rates_ptr + n * D + d, mask=channel, other=0.0)
        b = tl.load(B_ptr + row * N + n, mask=real, other=0.0).to(tl.float32)
        c = tl.load(C_ptr + row * N + n, mask=real, other=0.0).to(tl.float32)
        ends = (chunk * N + n) * D + d
        enters = tl.load(states_ptr + ends, mask=channel, other=0.0)
        returns = tl.load(grads_ptr + ends, mask=channel, other=0.0)
        added = dt * u * b[:, None]
        decay = tl.where(fresh[:, None], 0.0, tl.exp(dt * rate[None, :]))
        decay, state = tl.associative_scan((decay, added), 0, _compose)
        state += tl.where(decay == 0.0, 0.0, decay * enters[None, :])
        onward = tl.where(next_fresh[:, None], 0.0, tl.exp(next_dt * rate[None, :]))
        onward, grad = tl.associative_scan((onward, dy * c[:, None]), 0, _compose, reverse=True)
        grad += tl.where(onward == 0.0, 0.0, onward * returns[None, :])
        tl.store(dC_ptr + share + row * N + n, tl.sum(dy * state, 1), mask=real)
        tl.store(dB_ptr + share + row * N + n, tl.sum(grad * dt * u, 1), mask=real)
        dx += grad * b[:, None]
        # The state less what the row added is the decayed state before it.
        dexponent = tl.where(fresh[:, None], 0.0, grad * (state - added))
        ddt += dexponent * rate[None, :]
        tl.store(drates_ptr + ends, tl.sum(dexponent * dt, 0), mask=channel)
    ddt += dx * u
    du = dx * dt
    if HAS_SKIP:
        du += tl.load(skip_ptr + d, mask=channel, other=0.0).to(tl.float32)[None, :] * dy
        tl.store(dskip_ptr + chunk * D + d, tl.sum(dy * u, 0), mask=channel)
    if SOFTPLUS:
        ddt = tl.where(raw > 20.0, ddt, ddt * tl.sigmoid(raw))
    if HAS_BIAS:
        tl.store(dbias_ptr + chunk * D + d, tl.sum(tl.where(inside, ddt, 0.0), 0), mask=channel)
    tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=inside)
    tl.store(ddelta_ptr + at, ddt.to(ddelta_ptr.dtype.element_ty), mask=inside)


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
    """Return the output, the ungated output if there is a gate, and chunk facts for `backward`."""
    out = u.new_empty(u.shape)
    ungated = u.new_empty(0 if z is None else u.shape)
    if not u.numel():
        return out, ungated, u.new_empty(0, dtype=torch.float32)
    given = [t if t is None else t.contiguous() for t in (u, delta, B, C, D, z, delta_bias, order)]
    x, step, b, c, skip, gate, bias, turn = given
    rates, fresh = A.t().float().contiguous(), _fresh(cu_seqlens, len(u), reverse)
    (tiles, features), states = u.shape, A.shape[1]
    rows, block, warps = blocks(tiles, features, u.is_cuda)
    chunks = triton.cdiv(tiles, rows)
    grid = (chunks, triton.cdiv(features, block))
    kept, ends, spans, broken = _facts(u, chunks, states)
    settings: dict[str, Any] = {
        "SOFTPLUS": delta_softplus, "HAS_BIAS": bias is not None, "HAS_Z": gate is not None,
        "REVERSE": reverse, "HAS_ORDER": turn is not None, "ROWS": rows, "BLOCK_D": block,
        "num_warps": warps,
    }  # fmt: skip
    selective_scan_ends_kernel[grid](
        x, step, rates, b, c, bias, gate, None, fresh, turn, ends, spans, broken,
        tiles, features, states, BACKWARD=False, **settings,
    )  # fmt: skip
    selective_scan_carry_kernel[(states, grid[1])](
        ends, spans, broken, rates, chunks, features, states, BACKWARD=False, BLOCK_D=block
    )
    selective_scan_fwd_kernel[grid](
        x, step, rates, b, c, skip, bias, gate, fresh, turn, ends, out, ungated,
        tiles, features, states, HAS_SKIP=skip is not None, **settings,
    )  # fmt: skip
    return out, ungated, kept


def backward(
    dout: Tensor,
    ungated: Tensor,
    kept: Tensor,
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
    if not u.numel():
        every = (u, delta, A, B, C, D, z, delta_bias)
        return tuple(u.new_empty(0) if t is None else torch.zeros_like(t) for t in every)
    tensors = [
        t if t is None else t.contiguous() for t in (u, delta, B, C, D, z, delta_bias, order)
    ]
    x, step, b, c, skip, gate, bias, turn = tensors
    rates, fresh = A.t().float().contiguous(), _fresh(cu_seqlens, len(u), reverse)
    dout = dout.contiguous()
    (tiles, features), states = u.shape, A.shape[1]
    rows, block, warps = blocks(tiles, features, u.is_cuda)
    chunks, side = triton.cdiv(tiles, rows), triton.cdiv(features, block)
    _, ends, spans, broken = _facts(u, chunks, states, kept)
    like: dict[str, Any] = {"dtype": u.dtype, "device": u.device}
    new: dict[str, Any] = {"dtype": torch.float32, "device": u.device}
    grads = torch.empty(chunks, states, features, **new)
    du, ddelta = torch.empty(u.shape, **like), torch.empty(u.shape, **like)
    dz = u.new_empty(0) if z is None else torch.empty(z.shape, **like)
    drates = torch.empty(chunks, states, features, **new)
    dB = torch.empty(side, tiles, states, **new)
    dC = torch.empty(side, tiles, states, **new)
    dskip = torch.empty(chunks if skip is not None else 0, features, **new)
    dbias = torch.empty(chunks if bias is not None else 0, features, **new)
    settings: dict[str, Any] = {
        "SOFTPLUS": delta_softplus, "HAS_BIAS": bias is not None, "HAS_Z": gate is not None,
        "REVERSE": reverse, "HAS_ORDER": turn is not None, "ROWS": rows, "BLOCK_D": block,
        "num_warps": warps,
    }  # fmt: skip
    selective_scan_ends_kernel[(chunks, side)](
        x, step, rates, b, c, bias, gate, dout, fresh, turn, grads, spans, broken,
        tiles, features, states, BACKWARD=True, **settings,
    )  # fmt: skip
    selective_scan_carry_kernel[(states, side)](
        grads, spans, broken, rates, chunks, features, states, BACKWARD=True, BLOCK_D=block
    )
    selective_scan_bwd_kernel[(chunks, side)](
        x, step, rates, b, c, skip, bias, gate, fresh, turn, ends, grads, dout, ungated,
        du, ddelta, drates, dB, dC, dskip, dz, dbias, tiles, features, states,
        HAS_SKIP=skip is not None, **settings,
    )  # fmt: skip
    return (
        du,
        ddelta,
        drates.sum(0).t().to(A.dtype).contiguous(),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        u.new_empty(0) if D is None else dskip.sum(0).to(D.dtype),
        dz,
        u.new_empty(0) if delta_bias is None else dbias.sum(0).to(delta_bias.dtype),
    )


def _fresh(cu_seqlens: Tensor, tiles: int, reverse: bool) -> Tensor:
    """Return (T + 1,) int8: 1 at each position where a bag begins; the last entry is no row's."""
    fresh = torch.zeros(tiles + 1, dtype=torch.int8, device=cu_seqlens.device)
    borders = cu_seqlens.long()
    return fresh.index_fill_(0, tiles - borders if reverse else borders, 1)


def _facts(u: Tensor, chunks: int, states: int, kept: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return one buffer, and its parts: entering states, sums of step sizes, bags that begin."""
    features = u.shape[1]
    sizes = [chunks * states * features, chunks * features, chunks]
    if kept is None:
        kept = torch.empty(sum(sizes), dtype=torch.float32, device=u.device)
    return (kept, *torch.split(kept, sizes))
