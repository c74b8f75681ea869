"""PPEG, TransMIL's positions: depthwise convolutions of several sizes over the tiles' places.

    out = x + Σ_s (conv_s(x) + b_s)          s × s, zeros where there is nothing

Kernels of one centre add up, so that all sizes, and x itself, are one convolution of the largest
size. "stored" lays a bag's rows out row by row in a square, whose last rows repeat the first tiles;
"lattice" takes every tile's true neighbours: of blocks of 8 × 8 places, those that hold a tile are
gathered with their surroundings, so that neither the slide's extent nor its holes cost anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.segments import CHUNK_ROWS, bag_of_tile
from bagscope.mil.bags import Bags

_BLOCK = 8
_FAST_COLUMNS = 3


class PPEG(nn.Module):
    """The convolutions of all sizes."""

    def __init__(self, width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in sizes
        )
        self.size = max(sizes)

    def in_squares(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return (R, C); each bag's rows are a class token, left as it is, and a square."""
        weight, bias = self._joined()
        identity = functional.pad(weight.new_ones(1, 1, 1, 1), [self.size // 2] * 4)
        out: Tensor = _squares(x, weight + identity, bias, cu_seqlens)
        return out

    def on_lattice(self, x: Tensor, bags: Bags) -> Tensor:
        """Return (T, C) of tiles that have places; those of other slides are no neighbours."""
        around, cells = places(bags, self.size // 2)
        blocks: Tensor = functional.pad(x, (0, 0, 0, 1)).index_select(0, around.flatten())
        found: Tensor = _conv(blocks.view(*around.shape, x.shape[1]), *self._joined())
        return x + found.flatten(0, 2).index_select(0, cells)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Return the sum of all kernels (C, 1, size, size), and of their biases."""
        weights, biases = [], []
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None, "made with one"
            margin = (self.size - conv.kernel_size[0]) // 2
            weights.append(functional.pad(conv.weight, [margin] * 4))
            biases.append(conv.bias)
        return torch.stack(weights).sum(0), torch.stack(biases).sum(0)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def places(bags: Bags, reach: int) -> tuple[Tensor, Tensor]:
    """Return which tile is where.

    Returns:
        (blocks, 8 + 2 reach, 8 + 2 reach) the tile at every place in and around each block that
        holds any, T where none is; and (T,) each tile's place among the blocks' own 64.
    """
    assert bags.grid is not None, "asked before"
    tiles = len(bags.features)
    owner = bag_of_tile(bags.cu_seqlens, tiles)
    if bags.tile_slide is not None:
        owner = owner * (int(bags.tile_slide.max()) + 1) + bags.tile_slide.long()
        owner = torch.unique(owner, return_inverse=True)[1]
    grid = bags.grid.long()
    least = grid.new_full((int(owner.max()) + 1, 2), torch.iinfo(torch.int64).max)
    least = least.scatter_reduce(0, owner[:, None].expand(-1, 2), grid, "amin")
    column, row = (grid - least[owner]).unbind(1)
    # Margins wide enough that what lies around one row's end is not the next row's beginning.
    margin = _BLOCK + 2 * reach
    columns, rows = int(column.max()) + 2 * margin, int(row.max()) + 2 * margin

    def key(owner: Tensor, column: Tensor, row: Tensor) -> Tensor:
        return (owner * rows + row + margin) * columns + column + margin

    block = key(owner, column // _BLOCK, row // _BLOCK)
    kinds, number = torch.unique(block, return_inverse=True)
    any_of_it = torch.empty_like(kinds).scatter_(
        0, number, torch.arange(tiles, device=kinds.device)
    )
    steps = torch.arange(-reach, _BLOCK + reach, device=kinds.device)
    near_columns = column[any_of_it, None, None] // _BLOCK * _BLOCK + steps
    near_rows = row[any_of_it, None, None] // _BLOCK * _BLOCK + steps[:, None]
    wanted = key(owner[any_of_it, None, None], near_columns, near_rows)
    known, order = key(owner, column, row).sort(stable=True)
    at = torch.searchsorted(known, wanted).clamp(max=tiles - 1)
    around = torch.where(known[at] == wanted, order[at], tiles)
    return around, (number * _BLOCK + row % _BLOCK) * _BLOCK + column % _BLOCK


def _over(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of (n, h, w, C), a view of channels last, without padding."""
    found = functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, groups=len(weight))
    return found.permute(0, 2, 3, 1)


def _of_weight(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the weight, given that of `_over`."""
    x, grad = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
    if x.device.type != "cpu":
        return _torch_backward(grad, x, weight, [False, True])[1]
    # Torch's gradient of depthwise kernels is 20 times as fast where they are 3 columns wide.
    size, reach = weight.shape[-1], grad.shape[3] + _FAST_COLUMNS - 1
    spare = -size % _FAST_COLUMNS
    wide = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 0, spare)).permute(0, 3, 1, 2)
    parts = [
        _torch_backward(
            grad, wide[..., start : start + reach], weight[..., :_FAST_COLUMNS], [False, True]
        )[1]
        for start in range(0, size, _FAST_COLUMNS)
    ]
    return torch.cat(parts, -1)[..., :size]


def _torch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], len(weight), [*wanted, False]
    )
    return of_x, of_weight


@torch.library.custom_op("bagscope::ppeg_conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _over(x, weight, bias).contiguous()


@torch.library.custom_op("bagscope::ppeg_conv_backward", mutates_args=())
def _conv_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    of_x, _ = _torch_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [True, False]
    )
    return of_x.permute(0, 2, 3, 1).contiguous(), _of_weight(x, weight, grad).contiguous()


@torch.library.custom_op("bagscope::ppeg_squares", mutates_args=())
def _squares(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for start, stop in pairwise(cu_seqlens.tolist()):
        out[start : start + 1] = x[start : start + 1]
        for rows, window in _bands(x, start, stop, weight.shape[-1]):
            out[rows] = _over(window, weight, bias).flatten(0, 2)
    return out


@torch.library.custom_op("bagscope::ppeg_squares_backward", mutates_args=())
def _squares_backward(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight = torch.empty_like(x), torch.zeros_like(weight)
    of_bias, size = weight.new_zeros(len(weight)), weight.shape[-1]
    turned = weight.flip(2, 3)
    for start, stop in pairwise(cu_seqlens.tolist()):
        of_x[start : start + 1] = grad[start : start + 1]
        for (rows, tiles), (_, grads) in zip(
            _bands(x, start, stop, size), _bands(grad, start, stop, size), strict=True
        ):
            of_x[rows] = _over(grads, turned, None).flatten(0, 2)
            own = grad[rows].view(1, tiles.shape[1] - size + 1, -1, x.shape[1])
            of_weight += _of_weight(tiles, weight, own)
            of_bias += grad[rows].sum(0)
    return of_x, of_weight, of_bias


def _bands(x: Tensor, start: int, stop: int, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of a bag that are whole lines of its square, and what their convolution reads."""
    side, reach = math.isqrt(max(stop - start - 1, 0)), size // 2
    if not side:
        return
    square = x[start + 1 : stop].view(1, side, side, -1)
    lines = max(1, CHUNK_ROWS // side)
    for first in range(0, side, lines):
        last = min(first + lines, side)
        low, high = max(first - reach, 0), min(last + reach, side)
        pads = (0, 0, reach, reach, low - first + reach, last + reach - high)
        rows = slice(start + 1 + first * side, start + 1 + last * side)
        yield rows, functional.pad(square[:, low:high], pads)


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    less = weight.shape[-1] - 1
    return x.new_empty(len(x), x.shape[1] - less, x.shape[2] - less, x.shape[3])


@_conv_backward.register_fake
def _(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@_squares.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(x)


@_squares_backward.register_fake
def _(x: Tensor, weight: Tensor, cu_seqlens: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(len(weight))


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate_conv(ctx: Any, grad: Tensor) -> Any:
    return *_conv_backward(*ctx.saved_tensors, grad), grad.sum((0, 1, 2))


def _keep_squares(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, cu_seqlens)


def _differentiate_squares(ctx: Any, grad: Tensor) -> Any:
    return *_squares_backward(*ctx.saved_tensors, grad), None


_conv.register_autograd(_differentiate_conv, setup_context=_keep_conv)
_squares.register_autograd(_differentiate_squares, setup_context=_keep_squares)
