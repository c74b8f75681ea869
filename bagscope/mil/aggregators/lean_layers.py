"""Pieces of a residual layer that keep less for the way back than torch's own would.

A norm's output is as large as the residual stream, and cheap to make again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.dispatch import own_arithmetic
from bagscope.kernels.gated_scores.cpu import computing_dtype
from bagscope.kernels.gated_scores.dropout import chunk_kept, tile_dropout
from bagscope.kernels.segments import CHUNK_ROWS


def normed_products(
    x: Tensor, norm: nn.LayerNorm, weights: tuple[Tensor, ...], narrow: torch.dtype, unkept: int = 0
) -> tuple[tuple[Tensor, ...], AbstractContextManager[object]]:
    """Return LN(x) Wᵀ (R, ·) for each W, in a dtype, and within what they are to be used.

    There the first `unkept` are not kept for gradients but made again, as the norm always is.
    """
    dtype = computing_dtype(x.new_empty(0, dtype=narrow))
    if torch.compiler.is_compiling():
        # A compiler decides for itself what it keeps.
        normed = norm(x).to(dtype)
        return tuple(normed @ weight.to(dtype).T for weight in weights), nullcontext()
    settings = (norm.weight, norm.bias, norm.eps, dtype)
    found: tuple[Tensor, ...] = _NormedProducts.apply(x, *settings, *weights)
    kept = x.detach()

    def again(part: int) -> Tensor:
        with torch.no_grad():
            return _products(kept, *settings, (weights[part],))[0]

    return found, _unkept(found[:unkept], again)


def normed_rows(
    x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, AbstractContextManager[object]]:
    """Return LN(x) in a dtype, and within what it is to be used: there it is not kept."""
    normed = norm(x).to(dtype)
    if torch.compiler.is_compiling():
        return normed, nullcontext()
    kept, gain, shift = x.detach(), norm.weight.detach(), norm.bias.detach()

    def again(_: int) -> Tensor:
        return functional.layer_norm(kept, gain.shape, gain, shift, norm.eps).to(dtype)

    return normed, _unkept((normed,), again)


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
        parts: list[Tensor] = []
        for tiles, more in zip(
            torch.split(torch.relu(before).to(dtype), lengths), repeats, strict=True
        ):
            parts += [token, tiles, tiles[:more]]
        return torch.cat(parts)
    found: Tensor = _LaidOut.apply(before, token, lengths, repeats, dtype)
    return found


def add_dropped(x: Tensor, added: Tensor, p: float, seed: int) -> Tensor:
    """Return x + dropout(added), whose draws `seed` alone decides; a byte per number is kept."""
    if not p:
        return x + added
    if torch.compiler.is_compiling():
        return x + tile_dropout(len(added), added.shape[1], p, seed, added) * added
    found: Tensor = _AddDropped.apply(x, added, p, seed)
    return found


class _NormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(x, gain, shift, *weights)
        ctx.eps, ctx.dtype = eps, dtype
        return _products(x, gain, shift, eps, dtype, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gain, shift, *weights = ctx.saved_tensors
        narrow = [weight.to(ctx.dtype) for weight in weights]
        exact = torch.promote_types(ctx.dtype, torch.float32)
        of_weights = [torch.zeros_like(weight, dtype=exact) for weight in weights]
        of_x, of_gain, of_shift = (
            torch.empty_like(x),
            torch.zeros_like(gain),
            torch.zeros_like(gain),
        )
        with own_arithmetic():
            for rows in _chunks(x):
                normed, *moments = torch.native_layer_norm(
                    x[rows], gain.shape, gain, shift, ctx.eps
                )
                own = [grad[rows] for grad in grads]
                for of_weight, grad in zip(of_weights, own, strict=True):
                    _add_product(of_weight, grad.T, normed.to(ctx.dtype))
                of_normed = own[0] @ narrow[0]
                for grad, weight in zip(own[1:], narrow[1:], strict=True):
                    of_normed.addmm_(grad, weight)
                of_x[rows], gained, shifted = torch.ops.aten.native_layer_norm_backward(
                    of_normed.to(x.dtype), x[rows], gain.shape, *moments, gain, shift, [True] * 3
                )
                of_gain += gained
                of_shift += shifted
        of_weights = [
            found.to(weight.dtype) for found, weight in zip(of_weights, weights, strict=True)
        ]
        return of_x, of_gain, of_shift, None, None, *of_weights


def _products(
    x: Tensor, gain: Tensor, shift: Tensor, eps: float, dtype: torch.dtype,
    weights: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    narrow = [weight.to(dtype) for weight in weights]
    found = tuple(x.new_empty(len(x), len(weight), dtype=dtype) for weight in weights)
    with own_arithmetic():
        for rows in _chunks(x):
            normed = functional.layer_norm(x[rows], gain.shape, gain, shift, eps).to(dtype)
            for out, weight in zip(found, narrow, strict=True):
                torch.mm(normed, weight.T, out=out[rows])
    return found


def _unkept(
    tensors: tuple[Tensor, ...], again: Callable[[int], Tensor]
) -> AbstractContextManager[object]:
    """Return a context in which operations do not keep these: they are made again by number."""
    numbers = {x.data_ptr(): (number, x.numel()) for number, x in enumerate(tensors)}

    def keep(saved: Tensor) -> Tensor | tuple[int, torch.Size]:
        number, size = numbers.get(saved.data_ptr(), (0, -1))
        is_whole = saved.numel() == size and saved.is_contiguous()
        return (number, saved.shape) if is_whole else saved

    def find(saved: Tensor | tuple[int, torch.Size]) -> Tensor:
        return saved if isinstance(saved, Tensor) else again(saved[0]).view(saved[1])

    return torch.autograd.graph.saved_tensors_hooks(keep, find)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a sum that may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, before: Tensor, token: Tensor, lengths: list[int], repeats: list[int],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        rows = len(before) + len(lengths) + sum(repeats)
        out, at = before.new_empty(rows, before.shape[1], dtype=dtype), 0
        for tiles, more in zip(torch.split(before, lengths), repeats, strict=True):
            out[at] = token[0]
            own = out[at + 1 : at + 1 + len(tiles)].copy_(tiles).relu_()
            at += 1 + len(tiles) + more
            out[at - more : at] = own[:more]
        ctx.save_for_backward(out)
        ctx.settings = (lengths, repeats, before.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        lengths, repeats, dtype = ctx.settings
        of_before = grad.new_empty(sum(lengths), grad.shape[1], dtype=dtype)
        of_token, at = torch.zeros_like(grad[:1]), 0
        for tiles, length, more in zip(
            torch.split(of_before, lengths), lengths, repeats, strict=True
        ):
            of_token += grad[at]
            own, again = slice(at + 1, at + 1 + length), slice(at + 1 + length, None)
            tiles.copy_(torch.ops.aten.threshold_backward(grad[own], out[own], 0))
            if more:
                twice = torch.ops.aten.threshold_backward(grad[again][:more], out[again][:more], 0)
                tiles[:more] += twice.to(dtype)
            at += 1 + length + more
        return of_before, of_token, None, None, None


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, p: float, seed: int) -> Tensor:
        out, stays = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        factor = 1.0
        for rows in _chunks(x):
            drawn = (*added[rows].shape, p, seed, rows.start, x.device)
            stays[rows], factor = chunk_kept(*drawn)
            torch.addcmul(
                x[rows], added[rows].to(x.dtype), stays[rows].to(x.dtype), value=factor,
                out=out[rows],
            )  # fmt: skip
        ctx.save_for_backward(stays)
        ctx.settings = (factor, added.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (stays,), (factor, dtype) = ctx.saved_tensors, ctx.settings
        of_added = torch.empty_like(grad, dtype=dtype)
        for rows in _chunks(grad):
            own = torch.mul(grad[rows], stays[rows].to(grad.dtype))
            torch.mul(own, factor, out=of_added[rows])
        return grad, of_added, None, None


def _chunks(x: Tensor) -> Iterator[slice]:
    for start in range(0, len(x), CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, len(x)))
