"""The two halves of linear attention compiled: a program per chunk of rows and head."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagscope.kernels.chunks import cut

_PROGRAMS = 2048


@triton.jit
def _feature(x, MAP: tl.constexpr):
    """Return φ(x), float32."""
    if MAP == "elu+1":
        return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "silu":
        return x * tl.sigmoid(x)
    elif MAP == "relu":
        return tl.maximum(x, 0.0)
    else:
        return x


@triton.jit
def _slope(x, MAP: tl.constexpr):
    """Return φ'(x), float32."""
    if MAP == "elu+1":
        return tl.exp(tl.minimum(x, 0.0))
    elif MAP == "silu":
        gate = tl.sigmoid(x)
        return gate * (1 + x * (1 - gate))
    elif MAP == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def linear_attention_fwd_kernel_gather(
    k_ptr, v_ptr, start_ptr, stop_ptr, kv_ptr, total_ptr,
    stride_kt, stride_kh, stride_vt, stride_vh, H,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gather one chunk: grid (C, H)."""
    c, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, stop = tl.load(start_ptr + c), tl.load(stop_ptr + c)
    d, e, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_T)
    kv = tl.zeros((BLOCK_D, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, stop, BLOCK_T):
        row = (first + t).to(tl.int64)
        inside = row[:, None] < stop
        is_k, is_v = inside & (d[None, :] < D), inside & (e[None, :] < DV)
        k_at = row[:, None] * stride_kt + h * stride_kh + d[None, :]
        k = tl.load(k_ptr + k_at, mask=is_k, other=0.0).to(tl.float32)
        v_at = row[:, None] * stride_vt + h * stride_vh + e[None, :]
        v = tl.load(v_ptr + v_at, mask=is_v, other=0.0).to(tl.float32)
        k = tl.where(is_k, _feature(k, MAP), 0.0)
        kv += tl.dot(tl.trans(k), v, input_precision=PRECISION)
        total += tl.sum(k, 0)
    at = (c * H + h) * D + d
    tl.store(total_ptr + at, total, mask=d < D)
    used = (d[:, None] < D) & (e[None, :] < DV)
    tl.store(kv_ptr + at[:, None] * DV + e[None, :], kv, mask=used)


@triton.jit
def linear_attention_bwd_kernel_gather(
    k_ptr, v_ptr, bag_ptr, start_ptr, stop_ptr, grad_kv_ptr, grad_total_ptr,
    grad_k_ptr, grad_v_ptr, stride_kt, stride_kh, stride_vt, stride_vh, H,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk's k and v: grid (C, H)."""
    c, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bag, start, stop = tl.load(bag_ptr + c), tl.load(start_ptr + c), tl.load(stop_ptr + c)
    d, e, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_T)
    at = (bag * H + h) * D + d
    used = (d[:, None] < D) & (e[None, :] < DV)
    grad_kv = tl.load(grad_kv_ptr + at[:, None] * DV + e[None, :], mask=used, other=0.0)
    grad_total = tl.load(grad_total_ptr + at, mask=d < D, other=0.0)
    for first in range(start, stop, BLOCK_T):
        row = (first + t).to(tl.int64)
        inside = row[:, None] < stop
        is_k, is_v = inside & (d[None, :] < D), inside & (e[None, :] < DV)
        k_at = row[:, None] * stride_kt + h * stride_kh + d[None, :]
        k = tl.load(k_ptr + k_at, mask=is_k, other=0.0).to(tl.float32)
        v_at = row[:, None] * stride_vt + h * stride_vh + e[None, :]
        v = tl.load(v_ptr + v_at, mask=is_v, other=0.0).to(tl.float32)
        along = tl.dot(v, tl.trans(grad_kv), input_precision=PRECISION) + grad_total[None, :]
        grad_k = along * _slope(k, MAP)
        keys = tl.where(is_k, _feature(k, MAP), 0.0)
        grad_v = tl.dot(keys, grad_kv, input_precision=PRECISION)
        out = row[:, None] * H + h
        grad_k = grad_k.to(grad_k_ptr.dtype.element_ty)
        tl.store(grad_k_ptr + out * D + d[None, :], grad_k, mask=is_k)
        grad_v = grad_v.to(grad_v_ptr.dtype.element_ty)
        tl.store(grad_v_ptr + out * DV + e[None, :], grad_v, mask=is_v)


@triton.jit
def linear_attention_fwd_kernel_ask(
    q_ptr, kv_ptr, total_ptr, bag_ptr, start_ptr, stop_ptr, out_ptr,
    stride_qt, stride_qh, eps, H,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """Answer the queries of one chunk: grid (C, H)."""
    c, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bag, start, stop = tl.load(bag_ptr + c), tl.load(start_ptr + c), tl.load(stop_ptr + c)
    d, e, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_T)
    at = (bag * H + h) * D + d
    used = (d[:, None] < D) & (e[None, :] < DV)
    kv = tl.load(kv_ptr + at[:, None] * DV + e[None, :], mask=used, other=0.0)
    total = tl.load(total_ptr + at, mask=d < D, other=0.0)
    for first in range(start, stop, BLOCK_T):
        row = (first + t).to(tl.int64)
        inside = row[:, None] < stop
        is_q, is_out = inside & (d[None, :] < D), inside & (e[None, :] < DV)
        q_at = row[:, None] * stride_qt + h * stride_qh + d[None, :]
        q = tl.load(q_ptr + q_at, mask=is_q, other=0.0).to(tl.float32)
        q = tl.where(is_q, _feature(q, MAP), 0.0)
        out = tl.dot(q, kv, input_precision=PRECISION)
        if DIVIDE:
            mass = tl.sum(q * total[None, :], 1)[:, None] + eps
            out = out / tl.where(inside, mass, 1.0)
        out_at = (row[:, None] * H + h) * DV + e[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=is_out)


@triton.jit
def linear_attention_bwd_kernel_ask(
    q_ptr, kv_ptr, total_ptr, bag_ptr, start_ptr, stop_ptr, grad_ptr,
    grad_q_ptr, grad_kv_ptr, grad_total_ptr, stride_qt, stride_qh, eps, H,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one chunk's q, and its share of the sums' gradients: grid (C, H)."""
    c, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bag, start, stop = tl.load(bag_ptr + c), tl.load(start_ptr + c), tl.load(stop_ptr + c)
    d, e, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_T)
    at = (bag * H + h) * D + d
    used = (d[:, None] < D) & (e[None, :] < DV)
    kv = tl.load(kv_ptr + at[:, None] * DV + e[None, :], mask=used, other=0.0)
    total = tl.load(total_ptr + at, mask=d < D, other=0.0)
    grad_kv = tl.zeros((BLOCK_D, BLOCK_DV), tl.float32)
    grad_total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, stop, BLOCK_T):
        row = (first + t).to(tl.int64)
        inside = row[:, None] < stop
        is_q, is_out = inside & (d[None, :] < D), inside & (e[None, :] < DV)
        q_at = row[:, None] * stride_qt + h * stride_qh + d[None, :]
        raw = tl.load(q_ptr + q_at, mask=is_q, other=0.0).to(tl.float32)
        q = tl.where(is_q, _feature(raw, MAP), 0.0)
        out_at = (row[:, None] * H + h) * DV + e[None, :]
        grad = tl.load(grad_ptr + out_at, mask=is_out, other=0.0).to(tl.float32)
        if DIVIDE:
            mass = tl.where(inside, tl.sum(q * total[None, :], 1)[:, None] + eps, 1.0)
            grad = grad / mass
            found = tl.dot(q, kv, input_precision=PRECISION)
            shrink = -tl.sum(grad * found, 1)[:, None] / mass
            grad_total += tl.sum(q * shrink, 0)
            along = tl.dot(grad, tl.trans(kv), input_precision=PRECISION)
            along += shrink * total[None, :]
        else:
            along = tl.dot(grad, tl.trans(kv), input_precision=PRECISION)
        grad_kv += tl.dot(tl.trans(q), grad, input_precision=PRECISION)
        grad_q = (along * _slope(raw, MAP)).to(grad_q_ptr.dtype.element_ty)
        tl.store(grad_q_ptr + (row[:, None] * H + h) * D + d[None, :], grad_q, mask=is_q)
    at = (c * H + h) * D + d
    tl.store(grad_total_ptr + at, grad_total, mask=d < D)
    tl.store(grad_kv_ptr + at[:, None] * DV + e[None, :], grad_kv, mask=used)


def sizes(x: Tensor, d: int, dv: int, feature_map: str) -> dict[str, int | str]:
    """Return the block sizes for heads of these widths, and how exact the products must be."""
    # tf32 products pass through shared memory; beside sums of 128 × 128, an A100 has no room for
    # more rows.
    wide_rows = 32 if x.dtype == torch.float32 else 16
    return {
        "D": d,
        "DV": dv,
        "MAP": feature_map,
        # Sixteen-bit inputs have no more digits than tf32, and their sums need its range.
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
        "BLOCK_T": 64 if max(d, dv) <= 64 else wide_rows,
        "num_warps": 4 if max(d, dv) <= 64 else 8,
        "num_stages": 2 if max(d, dv) <= 64 else 1,
    }


def rows_per_chunk(tiles: int, heads: int, d: int, dv: int) -> int:
    """Return the rows of a chunk: many chunks for few heads, sums small beside the rows."""
    wanted = triton.next_power_of_2(max(1, tiles * heads // _PROGRAMS))
    return int(min(8192, max(128, 8 * min(d, dv), wanted)))


def gather(k: Tensor, v: Tensor, cu_seqlens: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """Return what the streaming path does."""
    (tiles, heads, d), dv = k.shape, v.shape[2]
    k, v = _dense(k), _dense(v)
    chunks = cut(cu_seqlens, tiles, rows_per_chunk(tiles, heads, d, dv))
    count = len(chunks.bag)
    kv = k.new_empty(count, heads, d, dv, dtype=torch.float32)
    total = k.new_empty(count, heads, d, dtype=torch.float32)
    linear_attention_fwd_kernel_gather[(count, heads)](
        k, v, chunks.start, chunks.stop, kv, total,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads, **sizes(k, d, dv, feature_map),
    )  # fmt: skip
    return chunks.total(kv), chunks.total(total)


def gather_backward(
    k: Tensor, v: Tensor, cu_seqlens: Tensor, feature_map: str, grad_kv: Tensor, grad_total: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v."""
    (tiles, heads, d), dv = k.shape, v.shape[2]
    k, v = _dense(k), _dense(v)
    chunks = cut(cu_seqlens, tiles, rows_per_chunk(tiles, heads, d, dv))
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    linear_attention_bwd_kernel_gather[(len(chunks.bag), heads)](
        k, v, chunks.bag, chunks.start, chunks.stop, grad_kv, grad_total, grad_k, grad_v,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads, **sizes(k, d, dv, feature_map),
    )  # fmt: skip
    return grad_k, grad_v


def ask(
    q: Tensor, kv: Tensor, total: Tensor, cu_seqlens: Tensor, feature_map: str,
    divide: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Return what the streaming path does."""
    (tiles, heads, d), dv = q.shape, kv.shape[3]
    q = _dense(q)
    chunks = cut(cu_seqlens, tiles, rows_per_chunk(tiles, heads, d, dv))
    out = q.new_empty(tiles, heads, dv)
    linear_attention_fwd_kernel_ask[(len(chunks.bag), heads)](
        q, kv.contiguous(), total.contiguous(), chunks.bag, chunks.start, chunks.stop, out,
        q.stride(0), q.stride(1), eps, heads, **sizes(q, d, dv, feature_map), DIVIDE=divide,
    )  # fmt: skip
    return out


def ask_backward(
    q: Tensor, kv: Tensor, total: Tensor, cu_seqlens: Tensor, feature_map: str,
    divide: bool, eps: float, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, kv and total."""
    (tiles, heads, d), dv = q.shape, kv.shape[3]
    q = _dense(q)
    chunks = cut(cu_seqlens, tiles, rows_per_chunk(tiles, heads, d, dv))
    count = len(chunks.bag)
    grad_q = q.new_empty(q.shape)
    grad_kv, grad_total = kv.new_empty(count, *kv.shape[1:]), kv.new_empty(count, *total.shape[1:])
    linear_attention_bwd_kernel_ask[(count, heads)](
        q, kv.contiguous(), total.contiguous(), chunks.bag, chunks.start, chunks.stop, grad,
        grad_q, grad_kv, grad_total, q.stride(0), q.stride(1), eps, heads,
        **sizes(q, d, dv, feature_map), DIVIDE=divide,
    )  # fmt: skip
    return grad_q, chunks.total(grad_kv), chunks.total(grad_total)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
