"""Agent attention (Han et al. 2023): tiles ask a few agents, which have asked the tiles.

    V_A = softmax(s A Kᵀ + B₁) V          out = softmax(s Q Aᵀ + B₂) V_A

For bags the agents A are means of `agents` runs of consecutive queries, without biases. With
`window` they are means over a square lattice of the tissue, as in the original: the square around a
bag is cut into window × window cells; the agents are the average of the cells' queries, pooled to
√agents × √agents (overlapping where that does not divide); B₁ and B₂ are learnt for every cell; and
a 3 × 3 depthwise kernel over the values around each tile is added. An agent without tiles is none.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.linear_attention import agent_attention
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.layers import linear
from bagscope.mil.aggregators.mixers.around import around
from bagscope.mil.aggregators.mixers.base import FusedMixer, MixerOptions
from bagscope.mil.aggregators.mixers.rows import Rows, lattice

_BIASES = 7
"""Biases are learnt at so many places of a side, and interpolated to the window."""
_SPREAD = 0.02


class Agent(FusedMixer):
    """Every tile learns of the others through the agents."""

    uses = frozenset({"agents", "window"})

    def __init__(self, width: int, options: MixerOptions, layer: int = 0, layers: int = 1) -> None:
        super().__init__(width, options, layer, layers)
        heads, agents, side = options.heads, options.agents, options.window
        if not side:
            return
        if math.isqrt(agents) ** 2 != agents:
            raise ConfigError(
                f"aggregator vit: agents is {agents}, and a window has a square number of them; "
                "choose 49, say, or window 0"
            )
        self.an_bias = _drawn(heads, agents, _BIASES, _BIASES)
        self.na_bias = _drawn(heads, agents, _BIASES, _BIASES)
        self.ah_bias = _drawn(1, heads, agents, side, 1)
        self.aw_bias = _drawn(1, heads, agents, 1, side)
        self.ha_bias = _drawn(1, heads, side, 1, agents)
        self.wa_bias = _drawn(1, heads, 1, side, agents)
        self.ac_bias = _drawn(1, heads, agents, 1)
        self.ca_bias = _drawn(1, heads, 1, agents)
        self.dwc = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def prepared(self, rows: Rows) -> Rows:
        """Return the rows with the tiles' lattice, where it is used."""
        if not self.options.window:
            return rows
        return dataclasses.replace(rows, grid=lattice(rows, "window of mixer agent"))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what is added to the residual stream."""
        q, k, v = self.split(x)
        out = self.attend(q, k, v, rows).flatten(1)
        if self.options.window:
            assert rows.grid is not None and self.dwc.bias is not None, "prepared; made with one"
            tiles = rows.tiles()
            bag = bag_of_tile(rows.bags.cu_seqlens, len(tiles))
            kernels = self.dwc.weight.flatten(1).to(v.dtype)
            near = around(v.flatten(1)[tiles], rows.grid, bag, kernels)
            out = out.index_add(0, tiles, (near + self.dwc.bias.to(near.dtype)).to(out.dtype))
        return linear(out.to(x.dtype), self.proj)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return A v (T, H, dv), without the values around."""
        if self.options.window:
            return self._windowed(q, k, v, rows)
        return agent_attention(
            q, k, v, rows.cu_seqlens, agents=self.options.agents, skip=rows.class_tokens
        )

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        scale = q.shape[-1] ** -0.5
        q, k, given = q.to(exact), k.to(exact), v.to(exact)
        cells = window_cells(rows, self.options.window)
        agents, is_there = self._agents(q, cells, rows)
        asking, answering = self._biases()
        out = []
        # Bag by bag: each has its own agents, and a batched product would pad to the longest.
        for bag, (start, stop) in enumerate(pairwise(rows.cu_seqlens.tolist())):
            own = slice(start, stop)
            few = agents[bag].transpose(0, 1)
            scores = scale * few @ k[own].permute(1, 2, 0) + asking[..., cells[own]]
            told = torch.softmax(scores, -1) @ given[own].transpose(0, 1)
            back = scale * q[own].transpose(0, 1) @ few.mT
            back = back + answering[..., cells[own]].mT
            back = back.masked_fill(~is_there[bag], -torch.inf)
            out.append((torch.softmax(back, -1) @ told).transpose(0, 1))
        return torch.cat(out).to(v.dtype)

    def _agents(self, q: Tensor, cells: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the agents (B, n, H, d), and which there are (B, n)."""
        side, few = self.options.window, math.isqrt(self.options.agents)
        bags, many = len(rows.bags), side * side
        tiles = rows.tiles()
        bag = bag_of_tile(rows.bags.cu_seqlens, len(tiles))
        place = bag * many + cells[tiles]
        sums = q.new_zeros(bags * many, q[0].numel()).index_add(0, place, q[tiles].flatten(1))
        counts = q.new_zeros(bags * many).index_add(0, place, q.new_ones(len(tiles)))
        pool = pooling(side, few).to(q)
        pooled = pool @ sums.view(bags, many, -1)
        number = counts.view(bags, many) @ pool.T
        means = pooled / number.clamp(min=1.0)[..., None]
        return means.view(bags, few * few, *q.shape[1:]), number > 0

    def _biases(self) -> tuple[Tensor, Tensor]:
        """Return the biases (H, n, cells + 1) of asking and of answering; the last is the token's.

        H heads, n agents; of answering an agent's bias for each cell that asks it.
        """
        side = (self.options.window,) * 2
        asking = functional.interpolate(self.an_bias, size=side, mode="bilinear").flatten(2)
        asking = asking + (self.ah_bias + self.aw_bias)[0].flatten(2)
        answering = functional.interpolate(self.na_bias, size=side, mode="bilinear").flatten(2)
        answering = answering + (self.ha_bias + self.wa_bias)[0].flatten(1, 2).mT
        return (
            torch.cat([asking, self.ac_bias[0]], -1),
            torch.cat([answering, self.ca_bias[0].mT], -1),
        )


def _drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=_SPREAD))


def window_cells(rows: Rows, side: int) -> Tensor:
    """Return the cell (T,) of each row in the square around its bag; side² of a class token."""
    assert rows.grid is not None, "prepared"
    grid = rows.grid.long()
    bag = bag_of_tile(rows.bags.cu_seqlens, len(grid))
    index = bag[:, None].expand(-1, 2)
    far = torch.iinfo(torch.int64)
    low = grid.new_full((len(rows.bags), 2), far.max).scatter_reduce(0, index, grid, "amin")
    high = grid.new_full((len(rows.bags), 2), far.min).scatter_reduce(0, index, grid, "amax")
    extent = (high - low).amax(1) + 1
    cell = (grid - low[bag]) * side // extent[bag][:, None]
    found = grid.new_full((rows.count(),), side * side)
    return found.index_copy(0, rows.tiles(), cell[:, 1] * side + cell[:, 0])


def pooling(side: int, few: int) -> Tensor:
    """Return which cells (few², side²) each agent is the mean of, as adaptive pooling has it."""
    at = torch.arange(few)
    start, stop = at * side // few, -(-(at + 1) * side // few)
    cell = torch.arange(side)
    inside = ((cell >= start[:, None]) & (cell < stop[:, None])).float()
    return torch.einsum("ac,bd->abcd", inside, inside).reshape(few * few, side * side)
