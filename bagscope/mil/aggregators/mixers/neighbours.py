"""Exact attention among the tiles within `radius` steps on the lattice, diagonal ones included."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bagscope.kernels.segments import bag_of_tile
from bagscope.kernels.varlen_self_attention import find_neighbours, varlen_self_attention
from bagscope.mil.aggregators.mixers.base import FusedMixer
from bagscope.mil.aggregators.mixers.rows import Rows, lattice
from bagscope.mil.bags import Bags


class Neighbourhood(FusedMixer):
    """Every tile looks at those around it; each layer widens what it knows by the radius."""

    uses = frozenset({"radius"})

    def prepared(self, rows: Rows) -> Rows:
        """Return the rows with what is near what."""
        grid = slides_apart(lattice(rows, "mixer neighbours"), rows.bags, self.options.radius)
        near = find_neighbours(grid, rows.cu_seqlens, self.options.radius)
        return dataclasses.replace(rows, neighbours=near)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return A v (T, H, dv)."""
        return varlen_self_attention(q, k, v, rows.cu_seqlens, neighbours=rows.neighbours)


def slides_apart(grid: Tensor, bags: Bags, radius: int) -> Tensor:
    """Return columns and rows (T, 2) on which no tile is near one of another slide of its bag."""
    slide = bags.tile_slide
    if slide is None or not len(grid):
        return grid
    bag = bag_of_tile(bags.cu_seqlens, len(slide))
    first = slide.new_full((len(bags),), len(bags.slide_ids)).scatter_reduce(0, bag, slide, "amin")
    column, row = grid.unbind(1)
    step = column.max() - column.min() + 1 + radius
    return torch.stack([column + (slide - first[bag]) * step, row], 1)
