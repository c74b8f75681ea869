"""Which level to read, how large a square, and where tiles stand: pure arithmetic, no I/O.

Frames as in `bagscope.wsi.slide`: `_l0` level-0 pixels, `_lv` pixels of a stored level, `_px` a
tile's own pixels. Positions are rounded once, from a float origin and a float step; a sum of
rounded steps would drift by a tile every few hundred columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.errors import SpacingError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEVEL_TOLERANCE = 0.01
"""A level may be this much coarser than asked and still be read: 4.0001 serves for 4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPlan:
    """How one tile of a wanted size and resolution is cut from a slide.

    A square of `region_px` pixels of `level` is read and resized to `tile_px`. `extent_l0` is the
    wanted footprint's edge in level-0 pixels, exact; `mpp_effective` is what the rounding of
    `region_px` to whole pixels makes of the wanted `mpp`.
    """

    mpp: float
    tile_px: int
    level: int
    downsample: float
    region_px: int
    extent_l0: float
    mpp_effective: float

    @property
    def tile_px_l0(self) -> int:
        """Return the footprint's edge in whole level-0 pixels."""
        return round(self.extent_l0)


def plan_read(
    downsamples: Sequence[float],
    mpp_l0: float,
    *,
    mpp: float,
    tile_px: int,
    allow_upsampling: bool = False,
) -> ReadPlan:
    """Choose the coarsest level that is fine enough, and the square to read there.

    Args:
        downsamples: of the stored levels relative to level 0, in any order.
        mpp_l0: micrometres per level-0 pixel.
        mpp: wanted micrometres per tile pixel.
        tile_px: wanted tile edge in pixels.
        allow_upsampling: enlarge where even level 0 is coarser than `mpp`.

    Raises:
        SpacingError: level 0 is coarser than asked and `allow_upsampling` is false.
    """
    target = mpp / mpp_l0
    if target * (1 + LEVEL_TOLERANCE) < min(downsamples) and not allow_upsampling:
        raise SpacingError(
            f"scanned at {mpp_l0:.4g} µm per pixel, coarser than the {mpp:.4g} asked for; "
            "ask for a coarser mpp, or pass --allow-upsampling"
        )
    level = choose_level(downsamples, target)
    downsample = downsamples[level]
    extent_l0 = tile_px * target
    region_px = max(1, round(extent_l0 / downsample))
    return ReadPlan(
        mpp=mpp,
        tile_px=tile_px,
        level=level,
        downsample=downsample,
        region_px=region_px,
        extent_l0=extent_l0,
        mpp_effective=region_px * downsample * mpp_l0 / tile_px,
    )


def choose_level(downsamples: Sequence[float], target: float) -> int:
    """Return the index of the coarsest level not coarser than `target`, else of the finest."""
    limit = target * (1 + LEVEL_TOLERANCE)
    fine_enough = [i for i, downsample in enumerate(downsamples) if downsample <= limit]
    if not fine_enough:
        return min(range(len(downsamples)), key=lambda i: downsamples[i])
    return max(fine_enough, key=lambda i: downsamples[i])


def lattice_positions_l0(origin_l0: float, step_l0: float, count: int) -> NDArray[np.int32]:
    """Return the level-0 positions of lattice lines 0 ... count-1, each rounded once: (count,)."""
    import numpy as np

    positions: NDArray[np.int32] = np.rint(origin_l0 + np.arange(count) * step_l0).astype(np.int32)
    return positions


def lattice_count(length_l0: float, extent_l0: float, step_l0: float) -> int:
    """Return how many tiles of `extent_l0` fit into `length_l0` at steps of `step_l0`.

    A tile may overhang by half a level-0 pixel, which is what rounding its position can cost.
    """
    if extent_l0 > length_l0 + 0.5:
        return 0
    return int((length_l0 + 0.5 - extent_l0) // step_l0) + 1


def corner_lv(position_l0: float, downsample: float) -> int:
    """Return the pixel of a level that a level-0 position falls on."""
    return round(position_l0 / downsample)
