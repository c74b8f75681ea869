"""The causal depthwise convolution of the Mamba blocks, over packed bags.

For channel c, with W taps, along the rows t of each bag:

    y_t[c] = act(bias[c] + Σ_j weight[c, W − 1 − j]·x_{t−j}[c]),     j = 0 … W − 1

where rows before the bag's first count as zero. `act` is SiLU or nothing. `reverse` and `order`
mean what they mean for `selective_scan`: the history of a row are the rows visited before it.

Shapes: T rows of all bags, D channels, W taps. Memory: input and output; the backward pass computes
the pre-activation again, a chunk at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels import dispatch
from bagscope.kernels.segments import CHUNK_ROWS, bag_of_tile, require_borders
from bagscope.kernels.selective_scan.lanes import require_order

__all__ = ["causal_conv1d", "causal_conv1d_reference"]

_MOST_TAPS = 8


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor,
    reverse: bool = False,
    order: Tensor | None = None,
) -> Tensor:
    """Return the convolution, (T, D), bag by bag through torch's own."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, _ = visits(cu_seqlens, len(x), reverse, order)
    features, taps = weight.shape
    lengths = cu_seqlens.diff().tolist()
    found = [
        F.conv1d(
            F.pad(bag.to(wide).t()[None], (taps - 1, 0)), weight.to(wide)[:, None],
            None if bias is None else bias.to(wide), groups=features,
        )[0].t()
        for bag in torch.split(x[rows], lengths[::-1] if reverse else lengths)
        if len(bag)
    ]  # fmt: skip
    if not found:
        return x.clone()
    y = torch.cat(found)[torch.argsort(rows)]
    return (F.silu(y) if silu else y).to(x.dtype)


def visits(
    cu_seqlens: Tensor, tiles: int, reverse: bool, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the row visited at each position, and its place in its bag: both (T,) int64.

    In reverse the bags too come last to first, which is the same, since they don't touch.
    """
    rows = torch.arange(tiles, device=cu_seqlens.device) if order is None else order
    borders = cu_seqlens.long()
    if reverse:
        rows, borders = rows.flip(0), (tiles - borders).flip(0)
    position = torch.arange(tiles, device=cu_seqlens.device)
    return rows, position - borders[bag_of_tile(borders, tiles)]


# --- CPU ------------------------------------------------------------------------------------


def _taps(values: Tensor, within: Tensor, start: int, rows: int, lag: int) -> Tensor:
    """Return what lies `lag` positions before each of `rows` rows, zero where another bag does.

    `values[start]` is the first row's own; `within` the rows' places in their bags.
    """
    part = values[start - lag : start - lag + rows]
    foreign = within < lag
    return part.masked_fill(foreign[:, None], 0.0) if bool(foreign.any()) else part


def _before_activation(
    values: Tensor, within: Tensor, start: int, weight: Tensor, bias: Any
) -> Any:
    """Return the convolution of the rows from `start` on; `weight` is (W, D)."""
    rows = len(values) - start
    total = values.new_zeros(1, values.shape[1]) if bias is None else bias[None]
    for lag in range(len(weight)):
        total = torch.addcmul(total, _taps(values, within, start, rows, lag), weight[-1 - lag])
    return total


def _window(
    x: Tensor, rows: Tensor, first: int, last: int, history: int, wide: torch.dtype
) -> Tensor:
    """Return x at positions first − history to last, zeros before position 0."""
    begin = max(0, first - history)
    values = x[rows[begin:last]].to(wide)
    return F.pad(values, (0, 0, history - (first - begin), 0))


def _forward_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, rows: Tensor, within: Tensor
) -> Tensor:
    out, wide = torch.empty(x.shape, dtype=x.dtype), _wide(x)
    taps, constant = weight.t().to(wide), None if bias is None else bias.to(wide)
    history = len(taps) - 1
    for start in range(0, len(x), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(x))
        values = _window(x, rows, start, stop, history, wide)
        y = _before_activation(values, within[start:stop], history, taps, constant)
        out.index_copy_(0, rows[start:stop], (F.silu(y, inplace=True) if silu else y).to(x.dtype))
    return out


def _backward_cpu(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    rows: Tensor,
    within: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, wide = torch.empty(x.shape, dtype=x.dtype), _wide(x)
    taps, constant = weight.t().to(wide), None if bias is None else bias.to(wide)
    history = len(taps) - 1
    dtaps, dbias = torch.zeros_like(taps), taps.new_zeros(taps.shape[1])
    for start in range(0, len(x), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(x))
        # The rows after the chunk have its rows as their history.
        later = min(stop + history, len(x))
        values = _window(x, rows, start, later, history, wide)
        places = within[start:later]
        grad = dout[rows[start:later]].to(wide)
        if silu:
            y = _before_activation(values, places, history, taps, constant)
            sigma = torch.sigmoid(y)
            grad = grad * sigma * (1 + y * (1 - sigma))
        own = stop - start
        dbias += grad[:own].sum(0)
        total = torch.zeros(own, x.shape[1], dtype=wide)
        for lag in range(len(taps)):
            before = _taps(values, places[:own], history, own, lag)
            dtaps[-1 - lag] += (grad[:own] * before).sum(0)
            takers = grad[lag : lag + own].masked_fill((places[lag : lag + own] < lag)[:, None], 0)
            total[: len(takers)].addcmul_(takers, taps[-1 - lag])
        dx.index_copy_(0, rows[start:stop], total.to(x.dtype))
    return (
        dx,
        dtaps.t().to(weight.dtype, copy=True).contiguous(),
        x.new_empty(0) if bias is None else dbias.to(bias.dtype),
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- operator and public function -----------------------------------------------------------

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor cu_seqlens, bool reverse, "
    "Tensor? order"
)


def _way(x: Tensor, weight: Tensor) -> dispatch.Way:
    refuses = f"{weight.shape[1]} taps" if weight.shape[1] > _MOST_TAPS else ""
    return dispatch.choose("causal_conv1d", x, refuses=refuses)


@torch.library.custom_op(
    "bagscope::causal_conv1d", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
def _forward(*inputs: Any) -> Tensor:
    x, weight, bias, silu, cu_seqlens, reverse, order = inputs
    require_borders(cu_seqlens, len(x))
    require_order(order, cu_seqlens, len(x))
    rows, within = visits(cu_seqlens, len(x), reverse, order)
    if _way(x, weight) in ("reference", "cpu") or not x.numel():
        return _forward_cpu(x, weight, bias, silu, rows, within)
    from bagscope.kernels.causal_conv1d import triton

    return triton.forward(x, weight, bias, silu, rows, within)


@_forward.register_fake
def _(*inputs: Any) -> Tensor:
    x: Tensor = inputs[0]
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "bagscope::causal_conv1d_backward",
    mutates_args=(),
    schema=f"(Tensor dout, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(dout: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, silu, cu_seqlens, reverse, order = inputs
    rows, within = visits(cu_seqlens, len(x), reverse, order)
    if _way(x, weight) in ("reference", "cpu") or not x.numel():
        return _backward_cpu(dout, x, weight, bias, silu, rows, within)
    from bagscope.kernels.causal_conv1d import triton

    return triton.backward(dout, x, weight, bias, silu, rows, within)


@_backward.register_fake
def _(dout: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = inputs[:3]
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, silu, cu_seqlens, reverse, order = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens, order)
    ctx.settings = silu, reverse


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, weight, bias, cu_seqlens, order = ctx.saved_tensors
    silu, reverse = ctx.settings
    dx, dweight, dbias = _backward(dout, x, weight, bias, silu, cu_seqlens, reverse, order)
    return dx, dweight, None if bias is None else dbias, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor,
    reverse: bool = False,
    order: Tensor | None = None,
) -> Tensor:
    """Return the causal depthwise convolution of every bag, (T, D).

    Args:
        x: (T, D).
        weight: (D, W); the last tap meets the row itself.
        bias: (D,), or None.
        silu: whether a SiLU follows.
        cu_seqlens: (bags + 1,) int32 borders; no history crosses them.
        reverse: from each bag's last row to its first.
        order: (T,) int64, the rows in the order of the visit, each within its bag's borders.

    Raises:
        ValueError: shapes, borders or order don't fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[0] != x.shape[1] or not weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; pass (tiles, D) and (D, taps)"
        )
    if bias is not None and bias.shape != (x.shape[1],):
        raise ValueError(f"bias is {tuple(bias.shape)}; beside x it must be ({x.shape[1]},)")
    if not torch.compiler.is_compiling() and _way(x, weight) == "reference":
        require_borders(cu_seqlens, len(x))
        require_order(order, cu_seqlens, len(x))
        return causal_conv1d_reference(x, weight, bias, silu, cu_seqlens, reverse, order)
    out: Tensor = _forward(x, weight, bias, silu, cu_seqlens, reverse, order)
    return out
