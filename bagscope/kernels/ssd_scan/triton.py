"""The scan of Mamba-2 on a GPU: one program per chunk and head, every step a matrix product.

`ends` writes what each chunk adds to the state that leaves it, `carry` goes over the chunks, the
last kernel writes the rows; backward likewise from the last chunk to the first. Names as in
`ssd_scan.cpu`. Sums are float32; float32 inputs are multiplied exactly, shorter ones as tf32.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagscope.kernels.segments import bag_of_tile

_CARRY_BLOCK = 512


def blocks(width: int, states: int, on_gpu: bool) -> tuple[int, int, int]:
    """Return rows per chunk, and width and states rounded up to what a product takes."""
    block_p, block_n = (max(16, triton.next_power_of_2(size)) for size in (width, states))
    rows = 64 if max(block_p, block_n) <= 64 else 32
    return rows if on_gpu else 16, block_p, block_n


@triton.jit
def _decays(dt_ptr, A_ptr, bag_ptr, position, chunk, head, T, H, ROWS: tl.constexpr):
    """Return step sizes, and the decays within, into, out of and across the chunk."""
    real = position < T
    dt = tl.load(dt_ptr + position * H + head, mask=real, other=0.0).to(tl.float32)
    exponent = dt * tl.load(A_ptr + head).to(tl.float32)
    bag = tl.load(bag_ptr + position, mask=real, other=-2)
    before = tl.load(bag_ptr + chunk * ROWS - 1, mask=chunk > 0, other=-1)
    last = tl.load(bag_ptr + tl.minimum(chunk * ROWS + ROWS, T) - 1)
    place = tl.arange(0, ROWS)
    # Sums over the rows between, not differences of sums from the border.
    between = tl.where(place[:, None] > place[None, :], exponent[:, None], 0.0)
    reaches = (bag[:, None] == bag[None, :]) & (place[:, None] >= place[None, :])
    within = tl.where(reaches, tl.exp(tl.cumsum(between, 0)), 0.0)
    entering = tl.where(bag == before, tl.exp(tl.cumsum(exponent, 0)), 0.0)
    rest = tl.cumsum(exponent, 0, reverse=True) - exponent
    leaving = tl.where(bag == last, tl.exp(rest), 0.0)
    through = tl.where(before == last, tl.exp(tl.sum(exponent, 0)), 0.0)
    return dt, within, entering, leaving, through


@triton.jit
def _rows(ptr, position, item, items, size, T, BLOCK: tl.constexpr):
    """Return (rows, BLOCK) of a (T, items, size) tensor."""
    column = tl.arange(0, BLOCK)
    at = (position * items + item)[:, None] * size + column[None, :]
    mask = (position < T)[:, None] & (column < size)[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put_rows(ptr, values, position, item, items, size, T, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at = (position * items + item)[:, None] * size + column[None, :]
    mask = (position < T)[:, None] & (column < size)[None, :]
    tl.store(ptr + at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _state(ptr, index, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a (P, N) state."""
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask = (p < P)[:, None] & (n < N)[None, :]
    return tl.load(ptr + index * P * N + p[:, None] * N + n[None, :], mask=mask, other=0.0)


@triton.jit
def ssd_scan_ends_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, z_ptr, dout_ptr, bag_ptr, ends_ptr, through_ptr,
    T, H, P, G, N,
    BACKWARD: tl.constexpr, HAS_Z: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write what a chunk adds to the state (backward: to the gradient) that leaves it."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // (H // G)
    position = chunk * ROWS + tl.arange(0, ROWS)
    dt, _, entering, leaving, through = _decays(
        dt_ptr, A_ptr, bag_ptr, position, chunk, head, T, H, ROWS
    )
    index = chunk * H + head
    if BACKWARD:
        left = _rows(dout_ptr, position, head, H, P, T, BLOCK_P) * entering[:, None]
        if HAS_Z:
            z = _rows(z_ptr, position, head, H, P, T, BLOCK_P)
            left *= z * tl.sigmoid(z)
        right = _rows(C_ptr, position, group, G, N, T, BLOCK_N)
    else:
        left = _rows(x_ptr, position, head, H, P, T, BLOCK_P) * (dt * leaving)[:, None]
        right = _rows(B_ptr, position, group, G, N, T, BLOCK_N)
        tl.store(through_ptr + index, through)
    added = tl.dot(tl.trans(left), right, input_precision=PRECISION)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    at = ends_ptr + index * P * N + p[:, None] * N + n[None, :]
    tl.store(at, added, mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit
def ssd_scan_carry_kernel(
    ends_ptr, through_ptr, chunks, H, SIZE, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    """Replace what each chunk adds by what enters it."""
    head = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < SIZE
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    chunk, ahead = head * 0, 1
    if BACKWARD:
        chunk, ahead = chunk + chunks - 1, -1
    for _ in range(chunks):
        at = ends_ptr + (chunk * H + head) * SIZE + element
        added = tl.load(at, mask=mask, other=0.0)
        tl.store(at, state, mask=mask)
        through = tl.load(through_ptr + chunk * H + head)
        state = tl.where(through == 0.0, 0.0, through * state) + added
        chunk += ahead


@triton.jit
def ssd_scan_fwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bag_ptr, states_ptr, out_ptr, ungated_ptr,
    T, H, P, G, N,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the outputs of a chunk."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // (H // G)
    position = chunk * ROWS + tl.arange(0, ROWS)
    dt, within, entering, _, _ = _decays(dt_ptr, A_ptr, bag_ptr, position, chunk, head, T, H, ROWS)
    x = _rows(x_ptr, position, head, H, P, T, BLOCK_P)
    b = _rows(B_ptr, position, group, G, N, T, BLOCK_N)
    c = _rows(C_ptr, position, group, G, N, T, BLOCK_N)
    state = _state(states_ptr, chunk * H + head, P, N, BLOCK_P, BLOCK_N)
    weights = tl.dot(c, tl.trans(b), input_precision=PRECISION) * within
    y = tl.dot(weights, x * dt[:, None], input_precision=PRECISION)
    seen = tl.dot(c, tl.trans(state), input_precision=PRECISION)
    y += tl.where(entering[:, None] == 0.0, 0.0, seen * entering[:, None])
    if HAS_D:
        y += tl.load(D_ptr + head).to(tl.float32) * x
    if HAS_Z:
        _put_rows(ungated_ptr, y, position, head, H, P, T, BLOCK_P)
        z = _rows(z_ptr, position, head, H, P, T, BLOCK_P)
        y *= z * tl.sigmoid(z)
    _put_rows(out_ptr, y, position, head, H, P, T, BLOCK_P)


@triton.jit
def ssd_scan_bwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bag_ptr, states_ptr, onward_ptr, dout_ptr,
    ungated_ptr, dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, T, H, P, G, N,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk's rows, and its share of the gradients of A and D."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, index = head // (H // G), chunk * H + head
    position = chunk * ROWS + tl.arange(0, ROWS)
    dt, within, entering, leaving, through = _decays(
        dt_ptr, A_ptr, bag_ptr, position, chunk, head, T, H, ROWS
    )
    x = _rows(x_ptr, position, head, H, P, T, BLOCK_P)
    dy = _rows(dout_ptr, position, head, H, P, T, BLOCK_P)
    if HAS_Z:
        z = _rows(z_ptr, position, head, H, P, T, BLOCK_P)
        sigma = tl.sigmoid(z)
        y = _rows(ungated_ptr, position, head, H, P, T, BLOCK_P)
        dz = dy * y * sigma * (1.0 + z * (1.0 - sigma))
        _put_rows(dz_ptr, dz, position, head, H, P, T, BLOCK_P)
        dy *= z * sigma
    b = _rows(B_ptr, position, group, G, N, T, BLOCK_N)
    c = _rows(C_ptr, position, group, G, N, T, BLOCK_N)
    values = x * dt[:, None]
    products = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    dweights = tl.dot(dy, tl.trans(values), input_precision=PRECISION) * within
    dvalues = tl.dot(tl.trans(products * within), dy, input_precision=PRECISION)
    dc = tl.dot(dweights, b, input_precision=PRECISION)
    db = tl.dot(tl.trans(dweights), c, input_precision=PRECISION)
    # A row's rate counts for every pair of rows around it: sums that don't cancel.
    place = tl.arange(0, ROWS)
    dexponent = tl.where(place[:, None] > place[None, :], dweights * products, 0.0)
    around = tl.cumsum(dexponent, 1) - dexponent
    drate = tl.sum(tl.where(place[:, None] >= place[None, :], around, 0.0), 0)
    # What leaves: through the rows of the chunk's last bag.
    onward = _state(onward_ptr, index, P, N, BLOCK_P, BLOCK_N)
    returned = tl.dot(b, tl.trans(onward), input_precision=PRECISION) * leaving[:, None]
    dvalues += returned
    weighted = values * leaving[:, None]
    db += tl.dot(weighted, onward, input_precision=PRECISION)
    left = tl.sum(values * returned, 1)
    # What entered: the bag that was open at the chunk's border, if its rows are here.
    opened = tl.sum((entering > 0.0).to(tl.int32), 0) > 0
    state = tl.where(opened, _state(states_ptr, index, P, N, BLOCK_P, BLOCK_N), 0.0)
    weighted = dy * entering[:, None]
    dc += tl.dot(weighted, state, input_precision=PRECISION)
    seen = tl.dot(c, tl.trans(state), input_precision=PRECISION)
    entered = tl.sum(weighted * seen, 1)
    whole = through * tl.sum(tl.sum(state * onward, 1), 0)
    drate += tl.cumsum(entered, 0, reverse=True) + tl.cumsum(left, 0) - left + whole
    drate = tl.where(position < T, drate, 0.0)
    rate = tl.load(A_ptr + head).to(tl.float32)
    ddt = tl.sum(dvalues * x, 1) + drate * rate
    at = ddt_ptr + position * H + head
    tl.store(at, ddt.to(ddt_ptr.dtype.element_ty), mask=position < T)
    tl.store(dA_ptr + index, tl.sum(drate * dt, 0))
    dx = dvalues * dt[:, None]
    if HAS_D:
        dx += tl.load(D_ptr + head).to(tl.float32) * dy
        tl.store(dD_ptr + index, tl.sum(tl.sum(dy * x, 1), 0))
    _put_rows(dx_ptr, dx, position, head, H, P, T, BLOCK_P)
    _put_rows(dB_ptr, db, position, head, H, N, T, BLOCK_N)
    _put_rows(dC_ptr, dc, position, head, H, N, T, BLOCK_N)


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
    """Return the output, the ungated output where there is a gate, the states at the borders.

    The kernels choose the chunk themselves.
    """
    out = x.new_empty(x.shape)
    ungated = x.new_empty(0 if z is None else x.shape)
    given = [t if t is None else t.contiguous() for t in (x, dt, A, B, C, D, z)]
    values, step, rates, b, c, skip, gate = given
    (tiles, heads, width), (groups, size) = x.shape, B.shape[1:]
    settings, grid = _settings(x, B, z)
    states = torch.empty(grid[0], heads, width, size, dtype=torch.float32, device=x.device)
    through = torch.empty(grid, dtype=torch.float32, device=x.device)
    bag = bag_of_tile(cu_seqlens, tiles).int()
    shapes = (tiles, heads, width, groups, size)
    ssd_scan_ends_kernel[grid](
        values, step, rates, b, c, gate, None, bag, states, through, *shapes, BACKWARD=False,
        **settings,
    )  # fmt: skip
    _carry(states, through, backward=False)
    ssd_scan_fwd_kernel[grid](
        values, step, rates, b, c, skip, gate, bag, states, out, ungated, *shapes,
        HAS_D=D is not None, **settings,
    )  # fmt: skip
    # The decays across chunks go along: backward needs them again.
    return out, ungated, torch.cat([states.flatten(), through.flatten()])


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
    given = [t if t is None else t.contiguous() for t in (x, dt, A, B, C, D, z)]
    values, step, rates, b, c, skip, gate = given
    (tiles, heads, width), (groups, size) = x.shape, B.shape[1:]
    settings, grid = _settings(x, B, z)
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    through = kept[-grid[0] * heads :]
    bag, dout = bag_of_tile(cu_seqlens, tiles).int(), dout.contiguous()
    onward = torch.empty(grid[0], heads, width, size, **new)
    shapes = (tiles, heads, width, groups, size)
    ssd_scan_ends_kernel[grid](
        values, step, rates, b, c, gate, dout, bag, onward, through, *shapes, BACKWARD=True,
        **settings,
    )  # fmt: skip
    _carry(onward, through, backward=True)
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    dB, dC = torch.empty(tiles, heads, size, **new), torch.empty(tiles, heads, size, **new)
    dA, dD = torch.empty(grid, **new), torch.empty(grid, **new)
    ssd_scan_bwd_kernel[grid](
        values, step, rates, b, c, skip, gate, bag, kept, onward, dout, ungated,
        dx, ddt, dA, dB, dC, dD, dz, *shapes, HAS_D=D is not None, **settings,
    )  # fmt: skip
    grouped = (tiles, groups, heads // groups, size)
    return (
        dx,
        ddt,
        dA.sum(0).to(A.dtype),
        dB.view(grouped).sum(2).to(B.dtype),
        dC.view(grouped).sum(2).to(C.dtype),
        x.new_empty(0) if D is None else dD.sum(0).to(D.dtype),
        dz,
    )


def _settings(x: Tensor, B: Tensor, z: Tensor | None) -> tuple[dict[str, Any], tuple[int, int]]:
    rows, block_p, block_n = blocks(x.shape[2], B.shape[2], x.is_cuda)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    settings = {
        "HAS_Z": z is not None, "PRECISION": precision, "ROWS": rows, "BLOCK_P": block_p,
        "BLOCK_N": block_n, "num_warps": 8 if max(block_p, block_n) > 32 else 4,
    }  # fmt: skip
    return settings, (triton.cdiv(len(x), rows), x.shape[1])


def _carry(states: Tensor, through: Tensor, *, backward: bool) -> None:
    chunks, heads, *_ = states.shape
    size = states[0, 0].numel()
    ssd_scan_carry_kernel[(heads, triton.cdiv(size, _CARRY_BLOCK))](
        states, through, chunks, heads, size, BACKWARD=backward, BLOCK=_CARRY_BLOCK
    )
