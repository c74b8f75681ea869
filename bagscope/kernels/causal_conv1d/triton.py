"""The causal depthwise convolution on a GPU: a block of rows and channels per program.

The backward pass computes the pre-activation of a row's takers again: W × W loads, from the cache.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _BLOCK_D = 64, 64
_SMALL_ROWS, _SMALL_BLOCK_D = 16, 16


def blocks(features: int, on_gpu: bool) -> tuple[int, int]:
    """Return rows and channels per program; the interpreter takes small ones."""
    if not on_gpu:
        return _SMALL_ROWS, _SMALL_BLOCK_D
    return _ROWS, min(_BLOCK_D, max(16, triton.next_power_of_2(features)))


@triton.jit
def _lagged(x_ptr, rows_ptr, position, within, lag: tl.constexpr, T, D, d):
    """Return x `lag` positions before each position, zero where another bag lies."""
    real = (position < T) & (within >= lag)
    row = tl.load(rows_ptr + position - lag, mask=real, other=0)
    mask = real[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _convolved(
    x_ptr, weight_ptr, bias_ptr, rows_ptr, position, within, T, D, d, HAS_BIAS: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    y = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for lag in tl.static_range(TAPS):
        tap = tl.load(weight_ptr + d * TAPS + (TAPS - 1 - lag), mask=d < D, other=0.0)
        x = _lagged(x_ptr, rows_ptr, position, within, lag, T, D, d)
        y += x * tap.to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, rows_ptr, within_ptr, out_ptr, T, D,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the convolution of a block."""
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = position < T
    within = tl.load(within_ptr + position, mask=real, other=-1)
    y = _convolved(
        x_ptr, weight_ptr, bias_ptr, rows_ptr, position, within, T, D, d, HAS_BIAS, TAPS, ROWS,
        BLOCK_D,
    )  # fmt: skip
    if SILU:
        y *= tl.sigmoid(y)
    row = tl.load(rows_ptr + position, mask=real, other=0)
    at = out_ptr + row[:, None] * D + d[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


@triton.jit
def causal_conv1d_bwd_kernel(
    x_ptr, weight_ptr, bias_ptr, rows_ptr, within_ptr, dout_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    T, D, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a block's rows, and its share of the taps' gradients."""
    block = tl.program_id(0).to(tl.int64)
    position = block * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = d < D
    dx = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for lag in tl.static_range(TAPS):
        taker = position + lag
        real = taker < T
        within = tl.load(within_ptr + taker, mask=real, other=-1)
        row = tl.load(rows_ptr + taker, mask=real, other=0)
        at = dout_ptr + row[:, None] * D + d[None, :]
        # A taker in another bag, or behind the end, has no place that far from its bag's start.
        takes = (within >= lag)[:, None] & channel[None, :]
        grad = tl.load(at, mask=takes, other=0.0).to(tl.float32)
        if SILU:
            y = _convolved(
                x_ptr, weight_ptr, bias_ptr, rows_ptr, taker, within, T, D, d, HAS_BIAS, TAPS,
                ROWS, BLOCK_D,
            )  # fmt: skip
            sigma = tl.sigmoid(y)
            # Where it does not take, y may be another bag's NaN.
            grad = tl.where(takes, grad * sigma * (1.0 + y * (1.0 - sigma)), 0.0)
        tap = tl.load(weight_ptr + d * TAPS + (TAPS - 1 - lag), mask=channel, other=0.0)
        dx += grad * tap.to(tl.float32)[None, :]
        if lag == 0:
            if HAS_BIAS:
                tl.store(dbias_ptr + block * D + d, tl.sum(grad, 0), mask=channel)
            for back in tl.static_range(TAPS):
                x = _lagged(x_ptr, rows_ptr, position, within, back, T, D, d)
                share = dweight_ptr + (block * D + d) * TAPS + (TAPS - 1 - back)
                tl.store(share, tl.sum(grad * x, 0), mask=channel)
    real = position < T
    row = tl.load(rows_ptr + position, mask=real, other=0)
    at = dx_ptr + row[:, None] * D + d[None, :]
    tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=real[:, None] & channel[None, :])


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, rows: Tensor, within: Tensor
) -> Tensor:
    """Return the convolution; `rows` and `within` as `visits` gives them."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    (tiles, features), taps = x.shape, weight.shape[1]
    height, width = blocks(features, x.is_cuda)
    causal_conv1d_fwd_kernel[(triton.cdiv(tiles, height), triton.cdiv(features, width))](
        x, weight, bias if bias is None else bias.contiguous(), rows.contiguous(), within, out,
        tiles, features, SILU=silu, HAS_BIAS=bias is not None, TAPS=taps, ROWS=height,
        BLOCK_D=width,
    )  # fmt: skip
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    rows: Tensor,
    within: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias (empty where absent)."""
    x, weight = x.contiguous(), weight.contiguous()
    (tiles, features), taps = x.shape, weight.shape[1]
    height, width = blocks(features, x.is_cuda)
    side = triton.cdiv(tiles, height)
    dx = torch.empty_like(x)
    dweight = torch.empty(side, features, taps, dtype=torch.float32, device=x.device)
    dbias = torch.empty(side if bias is not None else 0, features, device=x.device)
    causal_conv1d_bwd_kernel[(side, triton.cdiv(features, width))](
        x, weight, bias if bias is None else bias.contiguous(), rows.contiguous(), within,
        dout.contiguous(), dx, dweight, dbias, tiles, features, SILU=silu,
        HAS_BIAS=bias is not None, TAPS=taps, ROWS=height, BLOCK_D=width,
    )  # fmt: skip
    found = x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dweight.sum(0).to(weight.dtype), found
