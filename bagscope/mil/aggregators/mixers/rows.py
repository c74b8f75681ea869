"""The rows that a mixer works on: a batch's tiles, each bag's behind its class token if it has one.

T rows of all bags, B bags. Where there are class tokens they are the first row of every bag, have
no place, and T counts them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.kernels.segments import bag_of_tile
from bagscope.kernels.varlen_self_attention import Neighbours
from bagscope.mil.bags import Bags

SLIDE_APART_UM = 30_000.0
"""Between two slides of a bag, which lie one above the other: about the width of a section."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What is known of the rows.

    Attributes:
        cu_seqlens: (B + 1,) int32 borders of the rows.
        class_tokens: rows of each bag, its first ones, that are no tiles: 0 or 1.
        bags: whose tiles they are.
        grid: (T, 2) column and row of each row of its bag; None where not known or not asked for.
        places_um: (T, 3), in micrometres; NaN of a class token; None where not asked for.
        neighbours: which rows may look at which; None where all of a bag may.
    """

    cu_seqlens: Tensor
    class_tokens: int
    bags: Bags
    grid: Tensor | None = None
    places_um: Tensor | None = None
    neighbours: Neighbours | None = None

    @classmethod
    def of(cls, bags: Bags, class_tokens: int = 0) -> Rows:
        """Return the rows of a batch."""
        more = torch.arange(len(bags) + 1, device=bags.cu_seqlens.device, dtype=torch.int32)
        borders = bags.cu_seqlens + class_tokens * more
        return cls(cu_seqlens=borders, class_tokens=class_tokens, bags=bags)

    def count(self) -> int:
        """Return the number of rows."""
        return len(self.bags.features) + self.class_tokens * len(self.bags)

    def tiles(self) -> Tensor:
        """Return the row (tiles,) of each tile."""
        own = torch.arange(len(self.bags.features), device=self.cu_seqlens.device)
        if not self.class_tokens:
            return own
        return own + self.class_tokens * (bag_of_tile(self.bags.cu_seqlens, len(own)) + 1)

    def with_class_tokens(self, h: Tensor, token: Tensor) -> Tensor:
        """Return the tiles' h (tiles, d) with the token (1, d) in front of every bag."""
        whole = token.to(h.dtype).expand(self.count(), -1)
        return whole.index_copy(0, self.tiles(), h)


def lattice(rows: Rows, who: str) -> Tensor:
    """Return column and row (tiles, 2) of every tile.

    Raises:
        ConfigError: the tiles have none.
    """
    if rows.bags.grid is None:
        raise ConfigError(
            f"aggregator vit: {who} goes by the tiles' lattice, and those of "
            f"{rows.bags.bag_ids[0]} have no grid; extract them with bagscope or choose another "
            "mixer"
        )
    return rows.bags.grid


def micrometres(rows: Rows, who: str) -> Tensor:
    """Return the places (T, 3) in micrometres, the third one between slides of a bag.

    Raises:
        ConfigError: the tiles have no coordinates, or their slides no known pixel size.
    """
    bags = rows.bags
    mpp, slide, corner = bags.mpp_l0, bags.tile_slide, bags.coords_l0
    lacking = ""
    if corner is None or slide is None:
        lacking = "coordinates"
    elif mpp is None or not bool(mpp.isfinite().all()):
        lacking = "micrometres per pixel"
    if lacking:
        raise ConfigError(
            f"aggregator vit: {who} goes by distances in micrometres, and the tiles of "
            f"{bags.bag_ids[0]} have no {lacking}; extract them anew with --mpp or choose another "
            "mixer"
        )
    assert corner is not None and slide is not None and mpp is not None
    index = slide.long()
    exact = mpp.dtype
    flat = corner.to(exact) * mpp[index][:, None]
    bag = bag_of_tile(bags.cu_seqlens, len(index))
    first = index.new_full((len(bags),), torch.iinfo(torch.int64).max)
    first = first.scatter_reduce(0, bag, index, "amin")
    # Level-0 coordinates of large slides in float32 would be rounded to fractions of a tile.
    least = flat.new_full((len(bags), 2), torch.inf)
    least = least.scatter_reduce(0, bag[:, None].expand(-1, 2), flat, "amin")
    above = (index - first[bag]).to(exact) * SLIDE_APART_UM
    found = torch.cat([flat - least[bag], above[:, None]], 1)
    if not rows.class_tokens:
        return found
    nowhere = found.new_full((rows.count(), 3), torch.nan)
    return nowhere.index_copy(0, rows.tiles(), found)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """Return (T, H, d) of (T, H·d)."""
    return x.reshape(len(x), heads, -1)
