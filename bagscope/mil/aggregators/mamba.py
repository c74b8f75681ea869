"""State-space mixers of a bag's tiles: Mamba-1 (S6) and Mamba-2 (SSD) cores, along one or two ways.

A mixer of the residual stream h (T, d), with d_inner = expand · d:

    x, z = split(in h)                                       (T, d_inner) each, without bias
    y = Σ over ways of core(x, z along the way), put back    (T, d_inner), each gated by SiLU(z)
    out = out_proj y                                         (T, d), without bias

Ways: forwards; with "bi" backwards too; with "sr" the stride-R interleave of SR-Mamba too; with
"cross" the columns of the lattice too. Each way has a core of its own. State and the convolution's
history start anew with every bag.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.causal_conv1d import causal_conv1d
from bagscope.kernels.selective_scan import selective_scan
from bagscope.kernels.ssd_scan import ssd_scan
from bagscope.mil.aggregators.layers import linear

Ways = Literal["plain", "bi", "sr", "cross"]
CoreName = Literal["mamba", "mamba2"]

TAPS = 4
HEAD = 64
_LEAST_STEP, _MOST_STEP, _FLOOR = 1e-3, 1e-1, 1e-4


class Way(NamedTuple):
    """Another order of a batch's rows, some of which may be zeros that no tile stands for.

    Attributes:
        rows: (P,) int64, the row at each place; T where there is none.
        places: (T,) int64, the place of each row.
        borders: (B + 1,) int32, the bags' places.
    """

    rows: Tensor
    places: Tensor
    borders: Tensor

    def along(self, x: Tensor) -> Tensor:
        """Return x (T, d) in this order: (P, d)."""
        return torch.cat([x, x.new_zeros(1, x.shape[1])])[self.rows]


def strided(cu_seqlens: Tensor, rate: int) -> Way:
    """Return SR-Mamba's order: every rate-th row of a bag, then those after them, and so on.

    A bag of N rows is filled up with zeros to K · rate, K = ⌈N / rate⌉; row aR + b goes to bK + a.
    """
    lengths = cu_seqlens.diff().long()
    steps = (lengths + rate - 1) // rate
    borders = functional.pad((steps * rate).cumsum(0), (1, 0))
    tiles, places = int(cu_seqlens[-1]), int(borders[-1])
    bags = torch.arange(len(lengths), device=cu_seqlens.device)
    starts = cu_seqlens[:-1].long()
    bag = bags.repeat_interleave(steps * rate, output_size=places)
    place = torch.arange(places, device=bag.device) - borders[bag]
    row = place % steps[bag] * rate + place // steps[bag]
    bag_of_row = bags.repeat_interleave(lengths, output_size=tiles)
    own = torch.arange(tiles, device=bag.device) - starts[bag_of_row]
    return Way(
        rows=torch.where(row < lengths[bag], starts[bag] + row, tiles),
        places=borders[bag_of_row] + own % rate * steps[bag_of_row] + own // rate,
        borders=borders.int(),
    )


def reordered(order: Tensor, cu_seqlens: Tensor) -> Way:
    """Return a permutation (T,) of the rows, each bag's within its borders, as a way."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return Way(rows=order, places=places, borders=cu_seqlens)


class S6(nn.Module):
    """The core of Mamba-1: convolution, then the selective scan, gated."""

    def __init__(self, inner: int, states: int, rank: int) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(inner, inner, TAPS, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(first_steps(inner))
        _undecayed(self.A_log, self.D)

    def forward(self, xz: Tensor, borders: Tensor, reverse: bool = False) -> Tensor:
        """Return y (T, inner) of x and z side by side (T, 2 inner)."""
        x, z = xz.chunk(2, 1)
        kernel = self.conv1d.weight[:, 0].to(x.dtype)
        assert self.conv1d.bias is not None, "made with one"
        x = causal_conv1d(x, kernel, self.conv1d.bias.to(x.dtype), True, borders, reverse)
        states = self.A_log.shape[1]
        step, b, c = torch.split(
            linear(x, self.x_proj), [self.dt_proj.in_features, states, states], 1
        )
        step = functional.linear(step, self.dt_proj.weight.to(step.dtype))
        rates = -self.A_log.exp()
        bias = self.dt_proj.bias
        return selective_scan(x, step, rates, b, c, self.D, z, bias, True, borders, reverse)


class SSD(nn.Module):
    """The core of Mamba-2: convolution of x, B and C, then the dual scan, gated and normalised."""

    def __init__(self, inner: int, states: int, head: int) -> None:
        super().__init__()
        self.inner, self.states, self.head = inner, states, head
        heads, wide = inner // head, inner + 2 * states
        self.conv1d = nn.Conv1d(wide, wide, TAPS, groups=wide)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(first_steps(heads))
        self.norm = nn.Parameter(torch.ones(inner))
        _undecayed(self.A_log, self.D, self.dt_bias)

    def forward(self, zxbcdt: Tensor, borders: Tensor, reverse: bool = False) -> Tensor:
        """Return y (T, inner) of z, x, B, C and the step sizes side by side."""
        if reverse:
            backwards = reordered(reversed_rows(borders, len(zxbcdt)), borders)
            return self.forward(backwards.along(zxbcdt), borders)[backwards.places]
        tiles = len(zxbcdt)
        z, xbc, step = torch.split(
            zxbcdt, [self.inner, self.inner + 2 * self.states, len(self.A_log)], 1
        )
        kernel = self.conv1d.weight[:, 0].to(xbc.dtype)
        assert self.conv1d.bias is not None, "made with one"
        xbc = causal_conv1d(xbc, kernel, self.conv1d.bias.to(xbc.dtype), True, borders)
        x, b, c = torch.split(xbc, [self.inner, self.states, self.states], 1)
        steps = functional.softplus(step.to(self.dt_bias.dtype) + self.dt_bias)
        y = ssd_scan(
            x.reshape(tiles, -1, self.head), steps.to(x.dtype), -self.A_log.exp(),
            b[:, None], c[:, None], self.D, z.reshape(tiles, -1, self.head), borders,
        ).reshape(tiles, self.inner)  # fmt: skip
        return functional.rms_norm(y.to(self.norm.dtype), (self.inner,), self.norm, 1e-5)


class Mixer(nn.Module):
    """A bag's tiles, each told of those before it along every way."""

    def __init__(
        self, width: int, *, ways: Ways, core: CoreName, states: int, expand: int, head: int = HEAD
    ) -> None:
        super().__init__()
        inner = expand * width
        self.ways = ways
        wide = 2 * inner if core == "mamba" else 2 * inner + 2 * states + inner // head
        self.in_proj = nn.Linear(width, wide, bias=False)
        rank = math.ceil(width / 16)
        self.cores = nn.ModuleList(
            S6(inner, states, rank) if core == "mamba" else SSD(inner, states, head)
            for _ in range(1 if ways == "plain" else 2)
        )
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, h: Tensor, borders: Tensor, other: Way | None) -> Tensor:
        """Return what is added to the residual stream (T, width); `other` is the second way."""
        xz = linear(h, self.in_proj)
        y = self.cores[0](xz, borders)
        if self.ways == "bi":
            y = y + self.cores[1](xz, borders, True)
        elif other is not None:
            y = y + self.cores[1](other.along(xz), other.borders)[other.places]
        return linear(y.to(h.dtype), self.out_proj)


def first_steps(count: int) -> Tensor:
    """Return biases whose softplus is log-uniform between the least and the most first step."""
    low, high = math.log(_LEAST_STEP), math.log(_MOST_STEP)
    step = torch.empty(count).uniform_(low, high).exp().clamp_min(_FLOOR)
    return step + torch.log(-torch.expm1(-step))


def reversed_rows(cu_seqlens: Tensor, tiles: int) -> Tensor:
    """Return the order (T,) in which every bag runs from its last row to its first."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    mirrored = (starts + ends - 1).repeat_interleave(ends - starts, output_size=tiles)
    return mirrored - torch.arange(tiles, device=cu_seqlens.device)


def _undecayed(*parameters: nn.Parameter) -> None:
    for parameter in parameters:
        parameter.no_weight_decay = True  # type: ignore[attr-defined]
