"""Attention logits in Triton: neither pass holds the activations of more than a block of rows.

The forward kernel takes a block of rows through all hidden units, block by block, and adds each
block's share of the logits. The backward kernel makes the activations of a block anew, and writes
the gradients of what the activations were applied to; the products with these are torch's.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagscope.kernels.gated_scores.cpu import GateSettings, GateWeights, add_product, joined
from bagscope.kernels.segment_softmax_pool.cpu import accumulator
from bagscope.kernels.segment_softmax_pool.triton import precision, rowwise

CHUNK_TILES = 65_536
"""Rows whose gradients exist at once: enough to fill a device, 128 MiB at 2 × 256 units."""


def blocks(features: int, hidden: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the blocks of rows, hidden units, features and columns, and the launch's warps."""
    wide = dtype == torch.float32
    return {
        "BM": 64,
        "BA": min(32 if wide else 64, max(16, triton.next_power_of_2(hidden))),
        "BD": min(32 if wide else 64, max(16, triton.next_power_of_2(features))),
        "BK": max(16, triton.next_power_of_2(columns)),
        "num_warps": 4,
        "num_stages": 3,
    }


@triton.jit
def _gate_block(
    h_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    T,
    unit,
    first_unit,
    A,
    D,
    stride_h,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BA: tl.constexpr,
    BD: tl.constexpr,
):
    """Return what one gate's activation is applied to, for a block of rows and hidden units."""
    found = tl.zeros((BM, BA), tl.float32)
    for feature in range(0, D, BD):
        d = feature + tl.arange(0, BD)
        h = tl.load(
            h_ptr + rows[:, None] * stride_h + d[None, :],
            (rows < T)[:, None] & (d < D)[None, :],
            0.0,
        )
        weight = tl.load(
            weight_ptr + (first_unit + unit).to(tl.int64)[None, :] * D + d[:, None],
            (unit < A)[None, :] & (d < D)[:, None],
            0.0,
        )
        found += tl.dot(h, weight, input_precision=PRECISION)
    if HAS_BIAS:
        found += tl.load(bias_ptr + first_unit + unit, unit < A, 0.0).to(tl.float32)[None, :]
    return found


@triton.jit
def _activated(z, IS_TANH: tl.constexpr):
    """Return V's activation; tanh by way of exp, which every device has."""
    if IS_TANH:
        small = tl.exp(-2.0 * tl.abs(z))
        found = (1.0 - small) / (1.0 + small)
        return tl.where(z < 0, -found, found)
    return tl.maximum(z, 0.0)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _dropout(rows, unit, A, start, seed, dropped, scale):
    """Return the zeros and scales of a block, drawn from (seed, tile, hidden unit)."""
    at = (rows + start)[:, None] * A + unit[None, :]
    return tl.where(tl.rand(seed, at) < dropped, 0.0, scale)


@triton.jit
def gated_scores_fwd_kernel(
    h_ptr,
    weight_ptr,
    bias_ptr,
    w_ptr,
    c_ptr,
    scores_ptr,
    kept_ptr,
    T,
    D,
    A,
    K,
    stride_h,
    start,
    seed,
    dropped,
    scale,
    IS_GATED: tl.constexpr,
    IS_TANH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KEEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BA: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Write the logits of a block of rows, and where wanted the activations."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    width = 2 * A if IS_GATED else A
    scores = tl.zeros((BM, BK), tl.float32)
    for begin in range(0, A, BA):
        unit = begin + tl.arange(0, BA)
        inside = (rows < T)[:, None] & (unit < A)[None, :]
        kept = kept_ptr + rows[:, None] * width + unit[None, :]
        z = _gate_block(
            h_ptr, weight_ptr, bias_ptr, rows, T, unit, 0, A, D, stride_h,
            HAS_BIAS, PRECISION, BM, BA, BD,
        )  # fmt: skip
        product = _activated(z, IS_TANH)
        if KEEPS:
            tl.store(kept, product.to(kept_ptr.dtype.element_ty), inside)
        if IS_GATED:
            z = _gate_block(
                h_ptr, weight_ptr, bias_ptr, rows, T, unit, A, A, D, stride_h,
                HAS_BIAS, PRECISION, BM, BA, BD,
            )  # fmt: skip
            second = _sigmoid(z)
            if KEEPS:
                tl.store(kept + A, second.to(kept_ptr.dtype.element_ty), inside)
            product = product * second
        if HAS_DROPOUT:
            product = product * _dropout(rows, unit, A, start, seed, dropped, scale)
        both = (k < K)[None, :] & (unit < A)[:, None]
        w = tl.load(w_ptr + k[None, :] * A + unit[:, None], both, 0.0)
        scores += tl.dot(product.to(w.dtype), w, input_precision=PRECISION)
    if HAS_C:
        scores += tl.load(c_ptr + k, k < K, 0.0).to(tl.float32)[None, :]
    tl.store(
        scores_ptr + rows[:, None] * K + k[None, :], scores, (rows < T)[:, None] & (k < K)[None, :]
    )


@triton.jit
def gated_scores_bwd_kernel(
    h_ptr,
    weight_ptr,
    bias_ptr,
    w_ptr,
    grad_ptr,
    kept_ptr,
    dz_ptr,
    grad_w_ptr,
    T,
    D,
    A,
    K,
    stride_h,
    start,
    seed,
    dropped,
    scale,
    IS_GATED: tl.constexpr,
    IS_TANH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KEEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BA: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Write the gradients before the activations, and this block's share of the gradient of w."""
    block = tl.program_id(0).to(tl.int64)
    rows = block * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    width = 2 * A if IS_GATED else A
    at = rows[:, None] * K + k[None, :]
    grad = tl.load(grad_ptr + at, (rows < T)[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
    for begin in range(0, A, BA):
        unit = begin + tl.arange(0, BA)
        inside = (rows < T)[:, None] & (unit < A)[None, :]
        kept = kept_ptr + rows[:, None] * width + unit[None, :]
        if KEEPS:
            first = tl.load(kept, inside, 0.0).to(tl.float32)
        else:
            z = _gate_block(
                h_ptr, weight_ptr, bias_ptr, rows, T, unit, 0, A, D, stride_h,
                HAS_BIAS, PRECISION, BM, BA, BD,
            )  # fmt: skip
            first = _activated(z, IS_TANH)
        product = first
        if IS_GATED:
            if KEEPS:
                second = tl.load(kept + A, inside, 0.0).to(tl.float32)
            else:
                z = _gate_block(
                    h_ptr, weight_ptr, bias_ptr, rows, T, unit, A, A, D, stride_h,
                    HAS_BIAS, PRECISION, BM, BA, BD,
                )  # fmt: skip
                second = _sigmoid(z)
            product = first * second
        both = (k < K)[:, None] & (unit < A)[None, :]
        w = tl.load(w_ptr + k[:, None] * A + unit[None, :], both, 0.0)
        dg = tl.dot(grad.to(w.dtype), w, input_precision=PRECISION)
        if HAS_DROPOUT:
            factor = _dropout(rows, unit, A, start, seed, dropped, scale)
            product = product * factor
            dg = dg * factor
        share = tl.dot(tl.trans(grad).to(w.dtype), product.to(w.dtype), input_precision=PRECISION)
        where = (block * K + k)[:, None] * A + unit[None, :]
        tl.store(grad_w_ptr + where, share, both)
        dz = dz_ptr + rows[:, None] * width + unit[None, :]
        before = dg
        if IS_GATED:
            through = dg * first * second * (1.0 - second)
            tl.store(dz + A, through.to(dz_ptr.dtype.element_ty), inside)
            before = dg * second
        if IS_TANH:
            before = before * (1.0 - first * first)
        else:
            before = tl.where(first > 0.0, before, 0.0)
        tl.store(dz, before.to(dz_ptr.dtype.element_ty), inside)


class Gates:
    """The gates of one call on a GPU: the counterpart of the CPU path's class of this name."""

    def __init__(
        self, weights: GateWeights, settings: GateSettings, like: Tensor, *, with_gradients: bool
    ) -> None:
        self.settings = settings
        self.weight, self.bias = joined(weights, like.dtype)
        self.weight = self.weight.contiguous()
        self.sums = accumulator(like.dtype)
        self.width = len(weights.weight_v)
        self.is_gated = weights.weight_u is not None
        self.w = weights.weight_w.to(like.dtype).contiguous()
        self.c = weights.bias_w
        if with_gradients:
            self.grad_weight = torch.zeros_like(self.weight, dtype=self.sums)
            self.grad_bias = self.grad_weight.new_zeros(len(self.weight))
            self.grad_w = torch.zeros_like(self.w, dtype=self.sums)
            self.grad_c = self.grad_w.new_zeros(len(self.w))

    def _options(self, h: Tensor, start: int, *, keeps: bool) -> dict[str, Any]:
        p = self.settings.dropout_p
        survives = (1.0 - p) ** (2 if self.is_gated else 1)
        features, columns = h.shape[1], len(self.w)
        return {
            "T": len(h),
            "D": features,
            "A": self.width,
            "K": columns,
            "stride_h": h.stride(0),
            "start": start,
            "seed": self.settings.seed,
            "dropped": 1.0 - survives,
            "scale": 1.0 / survives,
            "IS_GATED": self.is_gated,
            "IS_TANH": self.settings.gate == "tanh",
            "HAS_BIAS": self.bias is not None,
            "HAS_DROPOUT": p > 0,
            "KEEPS": keeps,
            "PRECISION": precision(h.dtype),
            **blocks(features, self.width, columns, h.dtype),
        }

    def forward(self, h: Tensor, start: int, out: Tensor, kept: Tensor | None) -> None:
        """Write the logits of rows from `start` into out (R, K); the activations into `kept`."""
        h = rowwise(h)
        options = self._options(h, start, keeps=kept is not None)
        gated_scores_fwd_kernel[(triton.cdiv(len(h), options["BM"]),)](
            h,
            self.weight,
            self.weight if self.bias is None else self.bias,
            self.w,
            self.w if self.c is None else self.c,
            out,
            h if kept is None else kept,
            HAS_C=self.c is not None,
            **options,
        )

    def backward(
        self, h: Tensor, start: int, grad: Tensor, kept: Tensor | None, grad_h: Tensor
    ) -> None:
        """Add the weights' gradients of a chunk, and that of h (R, D) to grad_h."""
        h, grad = rowwise(h), grad.contiguous()
        options = self._options(h, start, keeps=kept is not None)
        count = triton.cdiv(len(h), options["BM"])
        dz = h.new_empty(len(h), len(self.weight))
        shares = torch.empty(count, *self.w.shape, dtype=torch.float32, device=h.device)
        gated_scores_bwd_kernel[(count,)](
            h,
            self.weight,
            self.weight if self.bias is None else self.bias,
            self.w,
            grad,
            h if kept is None else kept,
            dz,
            shares,
            **options,
        )
        self.grad_w += shares.sum(0)
        self.grad_c += grad.sum(0)
        add_product(self.grad_weight, dz, h)
        self.grad_bias += dz.sum(0, dtype=self.sums)
        grad_h.addmm_(dz, self.weight)

    def gradients(self, weights: GateWeights) -> list[Tensor | None]:
        """Return the gradients in the parameters' order and dtypes, None for absent ones."""
        first, second = self.grad_weight[: self.width], self.grad_weight[self.width :]
        bias, second_bias = self.grad_bias[: self.width], self.grad_bias[self.width :]
        found = (first, bias, second, second_bias, self.grad_w, self.grad_c)
        # Halves of one tensor must not be handed out as two that share memory.
        return [
            None if weight is None else grad.to(weight.dtype, copy=self.is_gated and place < 4)
            for place, (grad, weight) in enumerate(zip(found, weights, strict=True))
        ]


def gated_scores_triton(
    h: Tensor, weights: GateWeights, settings: GateSettings, *, keeps: bool
) -> tuple[Tensor, Tensor]:
    """Return the logits (T, K) and the kept activations (T, A or 2A), or (0, ...) of them."""
    gates = Gates(weights, settings, h, with_gradients=False)
    scores = torch.empty(len(h), len(gates.w), dtype=gates.sums, device=h.device)
    kept = h.new_empty(len(h) if keeps else 0, len(gates.weight))
    if len(h):
        gates.forward(h, 0, scores, kept if keeps else None)
    return scores, kept


def gated_scores_backward_triton(
    h: Tensor, weights: GateWeights, settings: GateSettings, kept: Tensor, grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients of h and of the weights."""
    gates = Gates(weights, settings, h, with_gradients=True)
    grad_h = torch.zeros(h.shape, dtype=h.dtype, device=h.device)
    for start in range(0, len(h), CHUNK_TILES):
        here = slice(start, min(start + CHUNK_TILES, len(h)))
        gates.backward(h[here], start, grad[here], kept[here] if len(kept) else None, grad_h[here])
    return [grad_h, *gates.gradients(weights)]
