"""`cross_attention_pool` compiled: a program per chunk of rows and head, partials merged after.

A chunk's partial is (m, dv) float32 per head, at most 1/8 of what was read.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagscope.kernels.chunks import cut
from bagscope.kernels.segments import bag_of_tile

MOST_QUERIES = 64
_PROGRAMS = 2048


def blocks(tiles: int, m: int, heads: int, d: int, dv: int) -> dict[str, int]:
    """Return the block sizes for a problem of this size."""
    width = max(d, dv)
    return {
        "BLOCK_M": max(16, triton.next_power_of_2(min(m, MOST_QUERIES))),
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
        "BLOCK_T": 64 if width <= 64 else 32,
        "num_warps": 4 if width <= 64 else 8,
        "num_stages": 2 if width <= 64 else 1,
    }


def rows_per_chunk(tiles: int, m: int, heads: int) -> int:
    """Return the rows of a chunk: many chunks for few heads, partials small beside the rows."""
    wanted = triton.next_power_of_2(max(1, tiles * heads // _PROGRAMS))
    return int(min(8192, max(128, 8 * m, wanted)))


@triton.jit
def cross_attention_pool_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bag_ptr, start_ptr, stop_ptr, peak_ptr, mass_ptr, mixed_ptr, scores_ptr,
    stride_kt, stride_kh, stride_vt, stride_vh, scale, H,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SCORES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Pool one chunk for one head: grid (C, H)."""
    c, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bag, start, stop = tl.load(bag_ptr + c), tl.load(start_ptr + c), tl.load(stop_ptr + c)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    e, t = tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_T)
    q_at = ((bag * M + m[:, None]) * H + h) * D + d[None, :]
    q = tl.load(q_ptr + q_at, mask=(m[:, None] < M) & (d[None, :] < D), other=0.0)
    q = q.to(k_ptr.dtype.element_ty)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for first in range(start, stop, BLOCK_T):
        row = (first + t).to(tl.int64)
        inside = row < stop
        k_at = row[:, None] * stride_kt + h * stride_kh + d[None, :]
        k = tl.load(k_ptr + k_at, mask=inside[:, None] & (d[None, :] < D), other=0.0)
        v_at = row[:, None] * stride_vt + h * stride_vh + e[None, :]
        v = tl.load(v_ptr + v_at, mask=inside[:, None] & (e[None, :] < DV), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SCORES:
            at = (row[None, :] * M + m[:, None]) * H + h
            tl.store(scores_ptr + at, scores, mask=inside[None, :] & (m[:, None] < M))
        scores = tl.where(inside[None, :], scores, float("-inf"))
        top = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp(peak - top)
        weights = tl.exp(scores - top[:, None])
        mass = mass * shrink + tl.sum(weights, 1)
        part = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        mixed = mixed * shrink[:, None] + part
        peak = top
    at = (c * M + m) * H + h
    tl.store(peak_ptr + at, peak, mask=m < M)
    tl.store(mass_ptr + at, mass, mask=m < M)
    tl.store(
        mixed_ptr + at[:, None] * DV + e[None, :],
        mixed,
        mask=(m[:, None] < M) & (e[None, :] < DV),
    )


@triton.jit
def cross_attention_pool_bwd_kernel(
    q_ptr, k_ptr, v_ptr, bag_ptr, start_ptr, stop_ptr, lse_ptr, grad_ptr, delta_ptr,
    grad_weights_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    stride_kt, stride_kh, stride_vt, stride_vh, scale, H,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one chunk's k and v, and its share of q's: grid (C, H)."""
    c, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    bag, start, stop = tl.load(bag_ptr + c), tl.load(start_ptr + c), tl.load(stop_ptr + c)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    e, t = tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_T)
    query = (bag * M + m) * H + h
    is_q = (m[:, None] < M) & (d[None, :] < D)
    q = tl.load(q_ptr + query[:, None] * D + d[None, :], mask=is_q, other=0.0)
    q = q.to(k_ptr.dtype.element_ty)
    is_grad = (m[:, None] < M) & (e[None, :] < DV)
    grad = tl.load(grad_ptr + query[:, None] * DV + e[None, :], mask=is_grad, other=0.0)
    grad = grad.to(v_ptr.dtype.element_ty)
    lse = tl.load(lse_ptr + query, mask=m < M, other=0.0)
    delta = tl.load(delta_ptr + query, mask=m < M, other=0.0)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_T):
        row = (first + t).to(tl.int64)
        inside = row < stop
        is_k, is_v = inside[:, None] & (d[None, :] < D), inside[:, None] & (e[None, :] < DV)
        k_at = row[:, None] * stride_kt + h * stride_kh + d[None, :]
        k = tl.load(k_ptr + k_at, mask=is_k, other=0.0)
        v_at = row[:, None] * stride_vt + h * stride_vh + e[None, :]
        v = tl.load(v_ptr + v_at, mask=is_v, other=0.0)
        used = inside[None, :] & (m[:, None] < M)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weights = tl.where(used, tl.exp(scores - lse[:, None]), 0.0)
        along = tl.dot(grad, tl.trans(v), input_precision="ieee")
        if WEIGHTS:
            at = (row[None, :] * M + m[:, None]) * H + h
            along += tl.load(grad_weights_ptr + at, mask=used, other=0.0)
        along = (weights * (along - delta[:, None]) * scale).to(k.dtype)
        grad_q += tl.dot(along, k, input_precision="ieee")
        grad_k = tl.dot(tl.trans(along), q, input_precision="ieee")
        grad_v = tl.dot(tl.trans(weights.to(v.dtype)), grad, input_precision="ieee")
        out = row[:, None] * H + h
        tl.store(grad_k_ptr + out * D + d[None, :], grad_k.to(k.dtype), mask=is_k)
        tl.store(grad_v_ptr + out * DV + e[None, :], grad_v.to(v.dtype), mask=is_v)
    at = (c * M + m) * H + h
    tl.store(grad_q_ptr + at[:, None] * D + d[None, :], grad_q, mask=is_q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, return_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the reference does."""
    if q.shape[1] > MOST_QUERIES:
        groups = [
            forward(part, k, v, cu_seqlens, scale, return_weights)
            for part in torch.split(q, MOST_QUERIES, 1)
        ]
        pooled, lse, weights = (torch.cat(parts, 1) for parts in zip(*groups, strict=True))
        return pooled, lse, weights
    (_, m, heads, d), dv = q.shape, v.shape[-1]
    k, v = _dense(k), _dense(v)
    chunks = cut(cu_seqlens, len(k), rows_per_chunk(len(k), m, heads))
    count = len(chunks.bag)
    peak, mass = q.new_empty(count, m, heads), q.new_empty(count, m, heads)
    mixed = q.new_empty(count, m, heads, dv)
    weights = q.new_empty(len(k) if return_weights else 0, m, heads)
    cross_attention_pool_fwd_kernel[(count, heads)](
        q.contiguous(), k, v, chunks.bag, chunks.start, chunks.stop, peak, mass, mixed, weights,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), scale, heads,
        M=m, D=d, DV=dv, SCORES=return_weights, **blocks(len(k), m, heads, d, dv),
    )  # fmt: skip
    top = chunks.peak(peak)
    shift = top.masked_fill(top == float("-inf"), 0.0)
    shrink = torch.exp(peak - shift[chunks.bag])
    mass = chunks.total(mass * shrink)
    mixed = chunks.total(mixed.mul_(shrink[..., None]))
    mixed /= mass.masked_fill(mass == 0, 1.0)[..., None]
    lse = mass.log() + top
    if return_weights:
        weights.sub_(lse[bag_of_tile(cu_seqlens, len(k))]).exp_()
    return mixed, lse, weights


def backward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, lse: Tensor,
    grad: Tensor, delta: Tensor, grad_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, as the streaming path does."""
    if q.shape[1] > MOST_QUERIES:
        groups = [
            backward(part_q, k, v, cu_seqlens, scale, *others)
            for part_q, *others in zip(
                *(torch.split(x, MOST_QUERIES, 1) for x in (q, lse, grad, delta, grad_weights)),
                strict=True,
            )
        ]
        grads_q, grads_k, grads_v = zip(*groups, strict=True)
        return torch.cat(grads_q, 1), sum(grads_k[1:], grads_k[0]), sum(grads_v[1:], grads_v[0])
    (_, m, heads, d), dv = q.shape, v.shape[-1]
    k, v = _dense(k), _dense(v)
    chunks = cut(cu_seqlens, len(k), rows_per_chunk(len(k), m, heads))
    grad_q = q.new_empty(len(chunks.bag), m, heads, d)
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    cross_attention_pool_bwd_kernel[(len(chunks.bag), heads)](
        q.contiguous(), k, v, chunks.bag, chunks.start, chunks.stop,
        lse.contiguous(), grad.contiguous(), delta.contiguous(), grad_weights.contiguous(),
        grad_q, grad_k, grad_v,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), scale, heads,
        M=m, D=d, DV=dv, WEIGHTS=len(grad_weights) > 0, **blocks(len(k), m, heads, d, dv),
    )  # fmt: skip
    return chunks.total(grad_q), grad_k, grad_v


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
