"""The convolution beside Nyström attention: along a bag's rows, one kernel for all of a head.

    out_t = Σ_j taps_j x_{t + j − ⌊W/2⌋}          zeros beyond the bag's borders

Shapes: x and out (T, H, d), taps (H, W), W odd. Torch's depthwise convolution, of rows as they lie,
in chunks. The gradient of the taps is a batched product: 32 rows of the output's gradient by the
31 + W of x that they read, of whose 32 × (31 + W) products the diagonals are summed. Kept: x.
Memory: a chunk of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bagscope.kernels.dispatch import choose, own_arithmetic
from bagscope.kernels.segments import CHUNK_ROWS, require_borders

_BLOCK = 32


def head_conv(x: Tensor, taps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return (T, H, d).

    Raises:
        ValueError: the kernels are not (H, W) with odd W, or the borders are wrong.
    """
    require_taps(x, taps)
    found: Tensor = _conv(x, taps, cu_seqlens)
    return found


def require_taps(x: Tensor, taps: Tensor) -> None:
    """Refuse kernels that are not (H, W) with odd W.

    Raises:
        ValueError: says what they are.
    """
    if x.ndim != 3 or taps.ndim != 2 or len(taps) != x.shape[1] or taps.shape[1] % 2 == 0:
        raise ValueError(
            f"x is {tuple(x.shape)} and taps {tuple(taps.shape)}; pass (T, H, d) and (H, W), W odd"
        )


@torch.library.custom_op("bagscope::head_conv", mutates_args=())
def _conv(x: Tensor, taps: Tensor, cu_seqlens: Tensor) -> Tensor:
    require_borders(cu_seqlens, len(x))
    choose("head_conv", x)
    out = torch.zeros_like(x)
    with own_arithmetic():
        add_conv(out, x, taps, cu_seqlens)
    return out


@torch.library.custom_op("bagscope::head_conv_backward", mutates_args=())
def _conv_backward(
    x: Tensor, taps: Tensor, cu_seqlens: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    of_x = torch.zeros_like(x)
    with own_arithmetic():
        return of_x, add_conv_backward(of_x, x, taps, cu_seqlens, grad)


def add_conv(out: Tensor, x: Tensor, taps: Tensor, cu_seqlens: Tensor) -> None:
    """Add the convolution of x to `out`."""
    heads, count = taps.shape
    kernels = taps.to(_exact(x)).repeat_interleave(x.shape[2], 0)[:, None, None]
    for rows, part in _windows(x, cu_seqlens, count, 1):
        lines = part.view(1, 1, len(part), -1).permute(0, 3, 1, 2)
        found = functional.conv2d(lines, kernels, groups=len(kernels))
        out[rows] += found.permute(0, 2, 3, 1).reshape(-1, heads, x.shape[2])


def add_conv_backward(
    of_x: Tensor, x: Tensor, taps: Tensor, cu_seqlens: Tensor, grad: Tensor
) -> Tensor:
    """Add the gradient of x to `of_x`; return that of the taps."""
    add_conv(of_x, grad, taps.flip(1), cu_seqlens)
    count = taps.shape[1]
    along = taps.new_zeros(len(taps), _BLOCK, _BLOCK + count - 1, dtype=_exact(x))
    each = (_windows(y, cu_seqlens, width, _BLOCK) for y, width in ((grad, 1), (x, count)))
    for (_, grads), (_, part) in zip(*each, strict=True):
        blocks = part.unfold(0, _BLOCK + count - 1, _BLOCK).transpose(-1, -2)
        own = grads.unflatten(0, (-1, _BLOCK)).transpose(1, 2)
        for head in range(len(taps)):
            along[head] += (own[:, head] @ blocks[:, head].mT).sum(0)
    return _band(along, count).sum(1).to(taps.dtype)


def _windows(
    x: Tensor, cu_seqlens: Tensor, taps: int, block: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows, and those that the convolution of them, in whole blocks, reads."""
    reach = taps // 2
    for start, stop in pairwise(cu_seqlens.tolist()):
        for first in range(start, stop, CHUNK_ROWS):
            last = min(first + CHUNK_ROWS, stop)
            spare = -(last - first) % block
            low, high = max(first - reach, start), min(last + reach, stop)
            pads = (0, 0, 0, 0, low - (first - reach), last + reach - high + spare)
            yield slice(first, last), functional.pad(x[low:high].to(_exact(x)), pads)


def _band(matrix: Tensor, taps: int) -> Tensor:
    """Return a view (H, rows, W) of what stands in each row from its own column on."""
    heads, rows, columns = matrix.shape
    return matrix.as_strided((heads, rows, taps), (rows * columns, columns + 1, 1))


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
