"""Pieces of a residual layer that keep less for the way back than torch's own would.

A norm's output and a mask of dropout are as large as the residual stream, and cheap to make again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bagscope.kernels.dispatch import own_arithmetic
from bagscope.kernels.gated_scores.cpu import computing_dtype
from bagscope.kernels.gated_scores.dropout import tile_dropout


def normed_products(
    x: Tensor, norm: nn.LayerNorm, weights: tuple[Tensor, ...], narrow: torch.dtype
) -> tuple[Tensor, ...]:
    """Return LN(x) Wᵀ (R, ·) for each W, in a dtype; the norm is computed again for gradients."""
    dtype = computing_dtype(x.new_empty(0, dtype=narrow))
    if torch.compiler.is_compiling():
        # A compiler decides for itself what it keeps.
        normed = norm(x).to(dtype)
        return tuple(normed @ weight.to(dtype).T for weight in weights)
    found: tuple[Tensor, ...] = _NormedProducts.apply(
        x, norm.weight, norm.bias, norm.eps, dtype, *weights
    )
    return found


def add_dropped(x: Tensor, added: Tensor, p: float, seed: int) -> Tensor:
    """Return x + dropout(added), whose draws `seed` alone decides; the mask is drawn again."""
    if not p:
        return x + added
    found: Tensor = _AddDropped.apply(x, added, p, seed)
    return found


class _NormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        normed, mean, deviation = torch.native_layer_norm(x, [x.shape[1]], gain, shift, eps)
        ctx.save_for_backward(x, gain, shift, mean, deviation, *weights)
        ctx.eps, ctx.dtype = eps, dtype
        normed = normed.to(dtype)
        with own_arithmetic():
            return tuple(normed @ weight.to(dtype).T for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gain, shift, mean, deviation, *weights = ctx.saved_tensors
        normed = torch.native_layer_norm(x, [x.shape[1]], gain, shift, ctx.eps)[0].to(ctx.dtype)
        with own_arithmetic():
            of_weights = [
                (grad.T @ normed).to(weight.dtype)
                for grad, weight in zip(grads, weights, strict=True)
            ]
            of_normed = grads[0] @ weights[0].to(ctx.dtype)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                of_normed.addmm_(grad, weight.to(ctx.dtype))
        of_x, of_gain, of_shift = torch.ops.aten.native_layer_norm_backward(
            of_normed.to(x.dtype), x, [x.shape[1]], mean, deviation, gain, shift, [True] * 3
        )
        return of_x, of_gain, of_shift, None, None, *of_weights


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, p: float, seed: int) -> Tensor:
        ctx.settings = (p, seed, added.dtype)
        return tile_dropout(len(added), added.shape[1], p, seed, added).mul_(added).add_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, seed, dtype = ctx.settings
        mask = tile_dropout(len(grad), grad.shape[1], p, seed, grad)
        return grad, mask.mul_(grad).to(dtype), None, None
