"""Exact attention among the tiles within `radius` steps on the lattice, diagonal ones included."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from bagscope.kernels.varlen_self_attention import find_neighbours, varlen_self_attention
from bagscope.mil.aggregators.mixers.base import FusedMixer
from bagscope.mil.aggregators.mixers.rows import Rows, lattice


class Neighbourhood(FusedMixer):
    """Every tile looks at those around it; each layer widens what it knows by the radius."""

    uses = frozenset({"radius"})

    def prepared(self, rows: Rows) -> Rows:
        """Return the rows with what is near what."""
        grid = lattice(rows, "mixer neighbours")
        near = find_neighbours(grid, rows.cu_seqlens, self.options.radius)
        return dataclasses.replace(rows, neighbours=near)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return A v (T, H, dv)."""
        return varlen_self_attention(q, k, v, rows.cu_seqlens, neighbours=rows.neighbours)
