"""Neighbourhood attention compiled: a program per block of sorted tiles and head."""

# Triton has no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagscope.kernels.varlen_self_attention.neighbours import BLOCK, Neighbours


@triton.jit
def _rows(x_ptr, row, inside, h, H, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Load rows of one head: (BLOCK_T, BLOCK_WIDTH), 0 outside."""
    d = tl.arange(0, BLOCK_WIDTH)
    at = (row[:, None] * H + h) * WIDTH + d[None, :]
    return tl.load(x_ptr + at, mask=inside[:, None] & (d[None, :] < WIDTH), other=0.0)


@triton.jit
def _store(x_ptr, value, row, inside, h, H, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Store rows of one head."""
    d = tl.arange(0, BLOCK_WIDTH)
    at = (row[:, None] * H + h) * WIDTH + d[None, :]
    mask = inside[:, None] & (d[None, :] < WIDTH)
    tl.store(x_ptr + at, value.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _near(places_ptr, row, inside, other, is_other, R):
    """Return which of the rows are within R steps of which others."""
    col = tl.load(places_ptr + 2 * row, mask=inside, other=0)
    line = tl.load(places_ptr + 2 * row + 1, mask=inside, other=0)
    other_col = tl.load(places_ptr + 2 * other, mask=is_other, other=0)
    other_line = tl.load(places_ptr + 2 * other + 1, mask=is_other, other=0)
    across = tl.abs(col[:, None] - other_col[None, :])
    down = tl.abs(line[:, None] - other_line[None, :])
    return (tl.maximum(across, down) <= R) & inside[:, None] & is_other[None, :]


@triton.jit
def neighbourhood_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, places_ptr, start_ptr, stop_ptr, first_ptr, near_ptr, out_ptr, lse_ptr,
    scale, R, H, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attend from one block: grid (N, H)."""
    block, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(start_ptr + block) + tl.arange(0, BLOCK_T)
    inside = row < tl.load(stop_ptr + block)
    q = _rows(q_ptr, row, inside, h, H, D, BLOCK_D)
    peak = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_T,), tl.float32)
    mixed = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32)
    for n in range(tl.load(first_ptr + block), tl.load(first_ptr + block + 1)):
        near = tl.load(near_ptr + n)
        other = tl.load(start_ptr + near) + tl.arange(0, BLOCK_T)
        is_other = other < tl.load(stop_ptr + near)
        k = _rows(k_ptr, other, is_other, h, H, D, BLOCK_D)
        v = _rows(v_ptr, other, is_other, h, H, DV, BLOCK_DV)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        used = _near(places_ptr, row, inside, other, is_other, R)
        scores = tl.where(used, scores, float("-inf"))
        top = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp(peak - shift)
        weights = tl.exp(scores - shift[:, None])
        mass = mass * shrink + tl.sum(weights, 1)
        part = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        mixed = mixed * shrink[:, None] + part
        peak = top
    mass = tl.where(inside, mass, 1.0)
    _store(out_ptr, mixed / mass[:, None], row, inside, h, H, DV, BLOCK_DV)
    tl.store(lse_ptr + row * H + h, tl.log(mass) + peak, mask=inside)


@triton.jit
def neighbourhood_attention_bwd_kernel_q(
    q_ptr, k_ptr, v_ptr, places_ptr, start_ptr, stop_ptr, first_ptr, near_ptr,
    lse_ptr, delta_ptr, grad_ptr, grad_q_ptr,
    scale, R, H, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block's queries: grid (N, H)."""
    block, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(start_ptr + block) + tl.arange(0, BLOCK_T)
    inside = row < tl.load(stop_ptr + block)
    q = _rows(q_ptr, row, inside, h, H, D, BLOCK_D)
    grad = _rows(grad_ptr, row, inside, h, H, DV, BLOCK_DV)
    lse = tl.load(lse_ptr + row * H + h, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + row * H + h, mask=inside, other=0.0)
    grad_q = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for n in range(tl.load(first_ptr + block), tl.load(first_ptr + block + 1)):
        near = tl.load(near_ptr + n)
        other = tl.load(start_ptr + near) + tl.arange(0, BLOCK_T)
        is_other = other < tl.load(stop_ptr + near)
        k = _rows(k_ptr, other, is_other, h, H, D, BLOCK_D)
        v = _rows(v_ptr, other, is_other, h, H, DV, BLOCK_DV)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        used = _near(places_ptr, row, inside, other, is_other, R)
        weights = tl.exp(tl.where(used, scores - lse[:, None], float("-inf")))
        along = tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None]
        grad_q += tl.dot((weights * along).to(k.dtype), k, input_precision="ieee")
    _store(grad_q_ptr, grad_q * scale, row, inside, h, H, D, BLOCK_D)


@triton.jit
def neighbourhood_attention_bwd_kernel_kv(
    q_ptr, k_ptr, v_ptr, places_ptr, start_ptr, stop_ptr, first_ptr, near_ptr,
    lse_ptr, delta_ptr, grad_ptr, grad_k_ptr, grad_v_ptr,
    scale, R, H, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one block's keys and values: grid (N, H)."""
    block, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(start_ptr + block) + tl.arange(0, BLOCK_T)
    inside = row < tl.load(stop_ptr + block)
    k = _rows(k_ptr, row, inside, h, H, D, BLOCK_D)
    v = _rows(v_ptr, row, inside, h, H, DV, BLOCK_DV)
    grad_k = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_T, BLOCK_DV), tl.float32)
    for n in range(tl.load(first_ptr + block), tl.load(first_ptr + block + 1)):
        near = tl.load(near_ptr + n)
        other = tl.load(start_ptr + near) + tl.arange(0, BLOCK_T)
        is_other = other < tl.load(stop_ptr + near)
        q = _rows(q_ptr, other, is_other, h, H, D, BLOCK_D)
        grad = _rows(grad_ptr, other, is_other, h, H, DV, BLOCK_DV)
        lse = tl.load(lse_ptr + other * H + h, mask=is_other, other=0.0)
        delta = tl.load(delta_ptr + other * H + h, mask=is_other, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        used = _near(places_ptr, row, inside, other, is_other, R)
        weights = tl.exp(tl.where(used, scores - lse[None, :], float("-inf")))
        grad_v += tl.dot(weights.to(grad.dtype), grad, input_precision="ieee")
        along = tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :]
        grad_k += tl.dot((weights * along).to(q.dtype), q, input_precision="ieee")
    _store(grad_k_ptr, grad_k * scale, row, inside, h, H, D, BLOCK_D)
    _store(grad_v_ptr, grad_v, row, inside, h, H, DV, BLOCK_DV)


def block_sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    """Return the block sizes for heads of these widths."""
    d, dv = q.shape[-1], v.shape[-1]
    return {
        "D": d,
        "DV": dv,
        "BLOCK_T": BLOCK,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_DV": max(16, triton.next_power_of_2(dv)),
        "num_warps": 4 if max(d, dv) <= 64 else 8,
        "num_stages": 2 if max(d, dv) <= 64 else 1,
    }


def forward_near(
    q: Tensor, k: Tensor, v: Tensor, scale: float, near: Neighbours
) -> tuple[Tensor, Tensor]:
    """Return sorted rows (T, H, dv) and lse (T, H) of sorted, contiguous q, k and v."""
    out = torch.empty_like(v)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    heads = q.shape[1]
    neighbourhood_attention_fwd_kernel[(len(near.start), heads)](
        q, k, v, near.places, near.start, near.stop, near.first, near.near, out, lse,
        scale, near.r, heads, **block_sizes(q, v),
    )  # fmt: skip
    return out, lse


def backward_near(
    q: Tensor, k: Tensor, v: Tensor, scale: float, near: Neighbours,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of sorted q, k and v."""
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    delta = (grad.float() * out.float()).sum(-1)
    heads = q.shape[1]
    given = (
        q, k, v, near.places, near.start, near.stop, near.first, near.near, lse, delta, grad,
    )  # fmt: skip
    sizes = block_sizes(q, v)
    grid = (len(near.start), heads)
    neighbourhood_attention_bwd_kernel_q[grid](*given, grads[0], scale, near.r, heads, **sizes)
    neighbourhood_attention_bwd_kernel_kv[grid](*given, *grads[1:], scale, near.r, heads, **sizes)
    return grads
