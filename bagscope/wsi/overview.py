"""A slide at a few micrometres per pixel: what tissue is found on, and what people are shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bagscope.wsi.geometry import ReadPlan, lattice_positions_l0, plan_read
from bagscope.wsi.outline import MaskFrame

if TYPE_CHECKING:
    from bagscope.wsi.slide import Downscale, Slide

OVERVIEW_MPP = 8.0
MAX_BLOCK_PX = 256
MAX_REGION_PX = 2048
"""A block's edge at the level that it is read from; bounds memory on slides without a pyramid."""

_BATCH_BLOCKS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """The scanned area of a slide, small.

    Attributes:
        rgb: (H, W, 3) uint8.
        readable: (H, W) bool; what could not be read shows the background colour in `rgb`.
        mpp: micrometres per pixel.
        frame: where the pixels lie in level 0.
        problems: one sentence per cause of unreadable pixels.
    """

    rgb: NDArray[np.uint8]
    readable: NDArray[np.bool_]
    mpp: float
    frame: MaskFrame
    problems: tuple[str, ...]


def read_overview(
    slide: Slide,
    mpp_l0: float,
    *,
    mpp: float = OVERVIEW_MPP,
    downscale: Downscale = "area",
    threads: int = 1,
) -> Overview:
    """Read the whole scanned area at `mpp`, block by block, in bounded memory.

    A block that can't be read is tried again in parts, so that a corrupt stored tile costs no
    more than its own area.
    """
    mpp = max(mpp, mpp_l0)
    bounds = slide.info.bounds_l0
    px_l0 = mpp / mpp_l0
    width = max(1, math.ceil(bounds.width_l0 / px_l0 - 1e-6))
    height = max(1, math.ceil(bounds.height_l0 / px_l0 - 1e-6))
    plan = _block_plan(slide, mpp_l0, mpp)
    columns, rows = math.ceil(width / plan.tile_px), math.ceil(height / plan.tile_px)
    rgb = np.empty((rows * plan.tile_px, columns * plan.tile_px, 3), np.uint8)
    readable = np.ones(rgb.shape[:2], np.bool_)
    problems: list[str] = []

    xs = lattice_positions_l0(bounds.x_l0, plan.extent_l0, columns)
    ys = lattice_positions_l0(bounds.y_l0, plan.extent_l0, rows)
    corners_l0 = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.int32)
    for start in range(0, len(corners_l0), _BATCH_BLOCKS):
        batch = slide.read_tiles(
            corners_l0[start : start + _BATCH_BLOCKS], plan, downscale=downscale, threads=threads
        )
        for i, image in enumerate(batch.images):
            row, column = divmod(start + i, columns)
            block = np.s_[
                row * plan.tile_px : (row + 1) * plan.tile_px,
                column * plan.tile_px : (column + 1) * plan.tile_px,
            ]
            rgb[block] = image
            if not batch.readable[i]:
                rgb[block], readable[block] = _read_in_parts(
                    slide, corners_l0[start + i], plan, downscale
                )
        problems += [problem for problem in batch.problems if problem not in problems]
    rgb, readable = rgb[:height, :width], readable[:height, :width]
    _fill_beyond_bounds(
        rgb, int(bounds.width_l0 / px_l0 + 1e-6), int(bounds.height_l0 / px_l0 + 1e-6)
    )
    return Overview(
        rgb=np.ascontiguousarray(rgb),
        readable=np.ascontiguousarray(readable),
        mpp=mpp,
        frame=MaskFrame(
            shape=(height, width),
            origin_x_l0=bounds.x_l0,
            origin_y_l0=bounds.y_l0,
            px_l0_x=px_l0,
            px_l0_y=px_l0,
        ),
        problems=tuple(problems),
    )


def _fill_beyond_bounds(rgb: NDArray[np.uint8], whole_columns: int, whole_rows: int) -> None:
    """Repeat the last whole column and row, in place.

    Pixels that lie partly beyond the scanned area are mixed with background, which would pass for
    the brightest glass of the slide.
    """
    if 0 < whole_columns < rgb.shape[1]:
        rgb[:, whole_columns:] = rgb[:, whole_columns - 1 : whole_columns]
    if 0 < whole_rows < rgb.shape[0]:
        rgb[whole_rows:] = rgb[whole_rows - 1 : whole_rows]


def _block_plan(slide: Slide, mpp_l0: float, mpp: float) -> ReadPlan:
    downsamples = [level.downsample for level in slide.info.levels]
    block_px = MAX_BLOCK_PX
    while True:
        plan = plan_read(downsamples, mpp_l0, mpp=mpp, tile_px=block_px)
        if plan.region_px <= MAX_REGION_PX or block_px == 8:
            return plan
        block_px //= 2


def _read_in_parts(
    slide: Slide, corner_l0: NDArray[np.int32], block: ReadPlan, downscale: Downscale
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read one block again as 8 × 8 parts, the bad ones from finer levels as well.

    A corrupt stored tile of a coarse level covers a wide area whose finer pixels may be sound.

    Returns:
        The block's pixels, and which of them are readable.
    """
    part_px = block.tile_px // 8
    extent_l0 = block.extent_l0 / 8
    xs = lattice_positions_l0(float(corner_l0[0]), extent_l0, 8)
    ys = lattice_positions_l0(float(corner_l0[1]), extent_l0, 8)
    corners_l0 = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.int32)
    images = np.empty((64, part_px, part_px, 3), np.uint8)
    readable = np.zeros(64, np.bool_)
    levels = slide.info.levels
    not_coarser = [i for i, level in enumerate(levels) if level.downsample <= block.downsample]
    for level in sorted(not_coarser, key=lambda i: -levels[i].downsample):
        downsample = levels[level].downsample
        region_px = max(1, round(extent_l0 / downsample))
        plan = replace(
            block,
            tile_px=part_px,
            extent_l0=extent_l0,
            level=level,
            downsample=downsample,
            region_px=region_px,
        )
        missing = np.flatnonzero(~readable)
        batch = slide.read_tiles(corners_l0[missing], plan, downscale=downscale)
        images[missing], readable[missing] = batch.images, batch.readable
        if readable.all() or 2 * region_px > MAX_REGION_PX:
            break
    size = (8, 8, part_px, part_px)
    pixels = images.reshape(*size, 3).transpose(0, 2, 1, 3, 4)
    flags = np.broadcast_to(readable.reshape(8, 8, 1, 1), size).transpose(0, 2, 1, 3)
    edge = 8 * part_px
    return pixels.reshape(edge, edge, 3), flags.reshape(edge, edge)
