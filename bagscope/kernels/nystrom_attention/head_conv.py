"""The convolution beside Nyström attention: along a bag's rows, one kernel for all of a head.

    out_t = Σ_j taps_j x_{t + j − ⌊W/2⌋}          zeros beyond the bag's borders

Shapes: x and out (T, H, d), taps (H, W), W odd. Rows are taken 32 at a time: each head's kernel is
a banded matrix 32 × (31 + W), so that the convolution is one batched product. Kept: x. Memory: a
padded copy of x, and of the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagscope.kernels.dispatch import choose, own_arithmetic
from bagscope.kernels.segments import bag_of_tile, require_borders

_BLOCK = 32


def head_conv(x: Tensor, taps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return (T, H, d).

    Raises:
        ValueError: the kernels are not (H, W) with odd W, or the borders are wrong.
    """
    if x.ndim != 3 or taps.ndim != 2 or len(taps) != x.shape[1] or taps.shape[1] % 2 == 0:
        raise ValueError(
            f"x is {tuple(x.shape)} and taps {tuple(taps.shape)}; pass (T, H, d) and (H, W), W odd"
        )
    found: Tensor = _conv(x, taps, cu_seqlens)
    return found


@torch.library.custom_op("bagscope::head_conv", mutates_args=())
def _conv(x: Tensor, taps: Tensor, cu_seqlens: Tensor) -> Tensor:
    require_borders(cu_seqlens, len(x))
    choose("head_conv", x)
    with own_arithmetic():
        return _convolved(x, taps.to(_exact(x)), _places(x, cu_seqlens, taps.shape[1]))


@torch.library.custom_op("bagscope::head_conv_backward", mutates_args=())
def _conv_backward(
    x: Tensor, taps: Tensor, cu_seqlens: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    places = _places(x, cu_seqlens, taps.shape[1])
    exact = taps.to(_exact(x))
    with own_arithmetic():
        of_x = _convolved(grad, exact.flip(1), places)
        width = taps.shape[1] + _BLOCK - 1
        reach = taps.shape[1] // 2
        along = _blocks(x, places, width) @ _blocks(grad, places, width)[:, :, reach:-reach].mT
        along = along.sum(0).mT.contiguous()
    return of_x, _band(along, taps.shape[1]).sum(1).to(taps.dtype)


def _convolved(x: Tensor, taps: Tensor, places: Tensor) -> Tensor:
    banded = taps.new_zeros(len(taps), _BLOCK, _BLOCK + taps.shape[1] - 1)
    _band(banded, taps.shape[1]).copy_(taps[:, None])
    found = banded @ _blocks(x, places, banded.shape[2])
    rows = found.transpose(1, 2).flatten(0, 1)
    return rows[places - taps.shape[1] // 2].to(x.dtype)


def _blocks(x: Tensor, places: Tensor, width: int) -> Tensor:
    """Return overlapping blocks of rows (blocks, H, width, d), zeros between bags."""
    blocks = -(-int(places[-1]) // _BLOCK) if len(places) else 0
    padded = x.new_zeros(blocks * _BLOCK + width, *x.shape[1:], dtype=_exact(x))
    padded[places] = x.to(padded.dtype)
    return padded.unfold(0, width, _BLOCK)[:blocks].transpose(-1, -2)


def _band(matrix: Tensor, taps: int) -> Tensor:
    """Return a view (H, rows, W) of what stands in each row from its own column on."""
    heads, rows, columns = matrix.shape
    return matrix.as_strided((heads, rows, taps), (rows * columns, columns + 1, 1))


def _places(x: Tensor, cu_seqlens: Tensor, taps: int) -> Tensor:
    """Return where every row goes when half a kernel of zeros stands before each bag."""
    bag = bag_of_tile(cu_seqlens, len(x))
    return torch.arange(len(x), device=x.device) + (bag + 1) * (taps // 2)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@_conv.register_fake
def _(x: Tensor, taps: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_conv_backward.register_fake
def _(x: Tensor, taps: Tensor, cu_seqlens: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(taps)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return *_conv_backward(*ctx.saved_tensors, grad), None


_conv.register_autograd(_differentiate, setup_context=_keep)
