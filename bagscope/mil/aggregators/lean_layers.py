"""Pieces of a residual layer that keep less for the way back than torch's own would.

A norm's output and a mask of dropout are as large as the residual stream, and cheap to make again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


def normed_rows(
    x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, AbstractContextManager[object]]:
    """Return LN(x) in a dtype, and within what it is to be used: there it is not kept."""
    normed = norm(x).to(dtype)
    if torch.compiler.is_compiling():
        return normed, nullcontext()
    kept, gain, shift = x.detach(), norm.weight.detach(), norm.bias.detach()
    place, shape = normed.data_ptr(), normed.shape

    def keep(saved: Tensor) -> Tensor | torch.Size:
        is_normed = saved.data_ptr() == place and saved.numel() == shape.numel()
        return saved.shape if is_normed and saved.is_contiguous() else saved

    def find(saved: Tensor | torch.Size) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        again = torch.native_layer_norm(kept, shape[1:], gain, shift, norm.eps)[0]
        return again.to(dtype).view(saved)

    return normed, torch.autograd.graph.saved_tensors_hooks(keep, find)


def laid_out(
    before: Tensor, token: Tensor, lengths: list[int], repeats: list[int], dtype: torch.dtype
) -> Tensor:
    """Return, for every bag, token, ReLU of its rows, and the first of these again, in a dtype.

    Args:
        before: what the ReLU is of, (T, C); the ReLU's own output is not kept.
        token: (1, C).
        lengths: rows of each bag.
        repeats: how many of them come again.
        dtype: of what is returned.
    """
    if torch.compiler.is_compiling():
        return _lay(before, token, lengths, repeats, dtype)
    found: Tensor = _LaidOut.apply(before, token, lengths, repeats, dtype)
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


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, before: Tensor, token: Tensor, lengths: list[int], repeats: list[int],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        out = _lay(before, token, lengths, repeats, dtype)
        ctx.save_for_backward(out)
        ctx.settings = (lengths, repeats, before.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        lengths, repeats, dtype = ctx.settings
        of_before = grad.new_empty(sum(lengths), grad.shape[1], dtype=dtype)
        of_token, at = torch.zeros_like(grad[:1]), 0
        for tiles, length, more in zip(of_before.split(lengths), lengths, repeats, strict=True):
            of_token += grad[at]
            own, again = slice(at + 1, at + 1 + length), slice(at + 1 + length, None)
            tiles.copy_(torch.ops.aten.threshold_backward(grad[own], out[own], 0))
            if more:
                twice = torch.ops.aten.threshold_backward(grad[again][:more], out[again][:more], 0)
                tiles[:more] += twice.to(dtype)
            at += 1 + length + more
        return of_before, of_token, None, None, None


def _lay(
    before: Tensor, token: Tensor, lengths: list[int], repeats: list[int], dtype: torch.dtype
) -> Tensor:
    parts: list[Tensor] = []
    for tiles, more in zip(torch.relu(before).to(dtype).split(lengths), repeats, strict=True):
        parts += [token, tiles, tiles[:more]]
    return torch.cat(parts)


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
