"""InLine attention (Han et al. 2024): linear attention whose weights add up to 1, some negative.

    o_i = (s / N) q_iᵀ Σ_j k_j v_jᵀ + (1 − s q_i·k̄) v̄         s = 1/√d, means over the bag

With `local` the values around each tile are added, by a 3 × 3 kernel per channel on the lattice
that two grouped linear layers with a GELU between them make of the bag's mean row.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from bagscope.kernels.linear_attention import inline_attention
from bagscope.kernels.linear_attention.halves import bag_mean
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.layers import linear
from bagscope.mil.aggregators.mixers.around import TAPS, around
from bagscope.mil.aggregators.mixers.base import FusedMixer, MixerOptions
from bagscope.mil.aggregators.mixers.lightning import pulled_squares
from bagscope.mil.aggregators.mixers.rows import Rows, lattice


class InLine(FusedMixer):
    """Every tile asks the bag's mean value, moved along its query."""

    uses = frozenset({"local"})

    def __init__(self, width: int, options: MixerOptions, layer: int = 0, layers: int = 1) -> None:
        super().__init__(width, options, layer, layers)
        self.residual: nn.Sequential | None = None
        if options.local:
            self.residual = nn.Sequential(
                nn.Conv1d(width, width, 1, groups=options.heads),
                nn.GELU(),
                nn.Conv1d(width, width * TAPS, 1, groups=options.heads),
            )

    def prepared(self, rows: Rows) -> Rows:
        """Return the rows with the tiles' lattice, where it is used."""
        if self.residual is None:
            return rows
        return dataclasses.replace(rows, grid=lattice(rows, "local of mixer inline"))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what is added to the residual stream."""
        q, k, v = self.split(x)
        out = self.attend(q, k, v, rows).flatten(1)
        if self.residual is not None:
            assert rows.grid is not None, "prepared"
            tiles = rows.tiles()
            bag = bag_of_tile(rows.bags.cu_seqlens, len(tiles))
            kernels = self._kernels(x, rows).to(out.dtype)
            near = around(v.flatten(1)[tiles], rows.grid, bag, kernels)
            out = out.index_add(0, tiles, near.to(out.dtype))
        return linear(out.to(x.dtype), self.proj)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return A v (T, H, dv), without the local part."""
        return inline_attention(q, k, v, rows.cu_seqlens)

    def pulled(self, x: Tensor, rows: Rows, weights: Tensor) -> Tensor | None:
        """Return Σ_i w_i A_ij² / Σ_j A_ij² (T,): weights may be negative, shares of squares not."""
        q, k, _ = self.split(x)
        exact = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(exact), k.to(exact)
        bag = bag_of_tile(rows.cu_seqlens, len(k))
        apart = k - bag_mean(k, rows.cu_seqlens)[bag]
        ones = q.new_ones(*q.shape[:2], 1)
        asked = torch.cat([ones, q.shape[-1] ** -0.5 * q], -1)
        return pulled_squares(asked, torch.cat([ones, apart], -1), rows.cu_seqlens, weights)

    def _kernels(self, x: Tensor, rows: Rows) -> Tensor:
        """Return the kernel (B, width, 9) of each bag."""
        assert self.residual is not None
        mean = bag_mean(x[:, None].to(self.proj.weight.dtype), rows.cu_seqlens)
        made: Tensor = self.residual(mean.transpose(1, 2))
        return made.reshape(len(made), -1, TAPS)
