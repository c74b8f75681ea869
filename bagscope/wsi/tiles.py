"""Slide → tiles: where tissue is, on the lattice, good enough to look at.

`tile_slide` reads an overview, finds tissue, pen and folds on it, measures every place of the
lattice at once through integral images, probes the sharpness at a bounded number of places, and
keeps what the spec accepts. Everything that was not kept is counted by its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import ReadError
from bagscope.wsi.geometry import ReadPlan, plan_read
from bagscope.wsi.lattice import Lattice, coarser_lattice, lattice_for, spread_sample
from bagscope.wsi.overview import Overview, read_overview
from bagscope.wsi.sharpness import sharpness
from bagscope.wsi.slide import Downscale, RectL0, SlideInfo, Spacing
from bagscope.wsi.spacing import require_spacing
from bagscope.wsi.tiling import TilingSpec
from bagscope.wsi.tissue import TissueMap, segment_tissue

if TYPE_CHECKING:
    from bagscope.wsi.slide import Slide

PROBE_MPP = 1.0
PROBE_PX = 64
MAX_PROBES = 144
"""Windows read to judge sharpness; larger slides share one probe among neighbouring tiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileSet:
    """The tiles of one slide at one resolution, ordered by (y, x).

    Attributes:
        info: the slide.
        spacing: its pixel size.
        spec: what was asked.
        plan: how a tile is read.
        lattice: every place where a tile could have stood.
        coords_l0: (N, 2) int32, (x, y) of the top-left corner of each tile's footprint.
        grid: (N, 2) int32, (column, row) on the lattice.
        tissue, pen, fold: (N,) float32, share of the tile's area.
        sharpness: (N,) float32 in [0, 1]; NaN where there was nothing to judge.
        parent: (N,) int32, row of the tile in `coarser` that holds this one; None without one.
        dropped: how many places were not kept, by reason, and `candidates`, their total.
        coarser: the next coarser tiles, where the spec asks for several resolutions.
    """

    info: SlideInfo
    spacing: Spacing
    spec: TilingSpec
    plan: ReadPlan
    lattice: Lattice
    coords_l0: NDArray[np.int32]
    grid: NDArray[np.int32]
    tissue: NDArray[np.float32]
    pen: NDArray[np.float32]
    fold: NDArray[np.float32]
    sharpness: NDArray[np.float32]
    dropped: Mapping[str, int]
    parent: NDArray[np.int32] | None = None
    coarser: TileSet | None = None

    def __len__(self) -> int:
        return len(self.coords_l0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TiledSlide:
    """What tiling a slide yields: the tiles, and the overview and masks that they stand on."""

    tiles: TileSet
    overview: Overview
    tissue_map: TissueMap
    warnings: tuple[str, ...]


def tile_slide(
    slide: Slide,
    spec: TilingSpec,
    *,
    allowed: NDArray[np.bool_] | None = None,
    edited: TissueMap | None = None,
    overview: Overview | None = None,
    faults_l0: tuple[RectL0, ...] = (),
    threads: int = 1,
) -> TiledSlide:
    """Cut a slide into tiles.

    Args:
        slide: an open slide.
        spec: what is wanted.
        allowed: (H, W) bool on the overview's pixels, where annotations allow tiles.
        edited: masks to use in place of segmentation, on the overview's pixels.
        overview: where it was read already.
        faults_l0: areas known to be missing from the file.
        threads: for reading.

    Raises:
        SpacingError: no believable pixel size, or scanned coarser than asked.
        ReadError: more than `spec.max_unreadable` of the tiles can't be read.
    """
    spacing = require_spacing(slide.info)
    plan = plan_for(slide.info, spacing, spec, spec.mpp)
    downscale = cast("Downscale", spec.downscale)
    if overview is None:
        overview = read_overview(slide, spacing.mpp, downscale=downscale, threads=threads)
    tissue_map = edited or segment_tissue(
        overview.rgb, mpp=overview.mpp, readable=overview.readable
    )
    lattice = lattice_for(slide.info.bounds_l0, plan, overlap_px=spec.overlap_px)
    measured = _measure(lattice, overview, tissue_map, allowed, faults_l0)
    tiles, warnings = _choose(
        slide, spec, spacing, plan, lattice, measured, overview.problems, threads
    )
    if spec.coarser_mpp:
        tiles = _with_coarser(tiles, overview, tissue_map, spec.coarser_mpp)
    if not len(tiles):
        warnings = (*warnings, f"no tile is kept: {_reasons_text(tiles.dropped)}")
    return TiledSlide(
        tiles=tiles,
        overview=overview,
        tissue_map=tissue_map,
        warnings=(*slide.info.warnings, *overview.problems, *warnings),
    )


def _reasons_text(dropped: Mapping[str, int]) -> str:
    """Return why places were not kept, as people say it: "312 little tissue, 4 pen"."""
    counts = {name: count for name, count in dropped.items() if count and name != "candidates"}
    listed = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    return listed or "the scanned area is smaller than a tile"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """Shares of every place of a lattice, (rows, columns) float32 each."""

    tissue: NDArray[np.float32]
    pen: NDArray[np.float32]
    fold: NDArray[np.float32]
    unreadable: NDArray[np.float32]
    tissue_anywhere: NDArray[np.float32]


def _measure(
    lattice: Lattice,
    overview: Overview,
    tissue_map: TissueMap,
    allowed: NDArray[np.bool_] | None,
    faults_l0: tuple[RectL0, ...],
) -> _Measured:
    frame = overview.frame
    anywhere = lattice.coverage(tissue_map.tissue, frame)
    inside = anywhere if allowed is None else lattice.coverage(tissue_map.tissue & allowed, frame)
    unreadable = lattice.coverage(~overview.readable, frame)
    for fault in faults_l0:
        unreadable[_places_touched(lattice, fault)] = 1
    return _Measured(
        tissue=inside,
        pen=lattice.coverage(tissue_map.pen, frame),
        fold=lattice.coverage(tissue_map.fold, frame),
        unreadable=unreadable,
        tissue_anywhere=anywhere,
    )


def _places_touched(lattice: Lattice, rect: RectL0) -> tuple[slice, slice]:
    """Return the (rows, columns) whose footprints share a pixel with a rectangle."""

    def span(start_l0: float, length_l0: float, origin_l0: float, count: int) -> slice:
        first = np.floor((start_l0 - origin_l0 - lattice.extent_l0) / lattice.step_l0) + 1
        last = np.ceil((start_l0 + length_l0 - origin_l0) / lattice.step_l0)
        return slice(max(0, int(first)), max(0, min(count, int(last))))

    return (
        span(rect.y_l0, rect.height_l0, lattice.origin_y_l0, lattice.rows),
        span(rect.x_l0, rect.width_l0, lattice.origin_x_l0, lattice.columns),
    )


def _choose(
    slide: Slide,
    spec: TilingSpec,
    spacing: Spacing,
    plan: ReadPlan,
    lattice: Lattice,
    measured: _Measured,
    overview_problems: tuple[str, ...],
    threads: int,
) -> tuple[TileSet, tuple[str, ...]]:
    """Keep the places that the spec accepts, and count why the others went."""
    # A reason claims a place only when no earlier reason did, so that the counts add up.
    reasons: dict[str, NDArray[np.bool_]] = {}
    left = np.ones((lattice.rows, lattice.columns), np.bool_)

    def drop(reason: str, where: NDArray[np.bool_]) -> None:
        nonlocal left
        reasons[reason] = left & where
        left = left & ~where

    drop("unreadable", measured.unreadable > 0.5)
    drop("little_tissue", measured.tissue_anywhere < max(spec.min_tissue, 1e-6))
    drop("outside_roi", measured.tissue < max(spec.min_tissue, 1e-6))
    drop("pen", measured.pen > spec.max_pen)
    drop("fold", measured.fold > spec.max_fold)
    grid = np.argwhere(left)[:, ::-1].astype(np.int32)
    tissue = measured.tissue[left]
    score, readable, problems = _probe_sharpness(
        slide, spacing, lattice, grid, tissue, cast("Downscale", spec.downscale), threads
    )
    keep = readable & ~(score < spec.min_sharpness)
    dropped = {reason: int(np.count_nonzero(where)) for reason, where in reasons.items()}
    dropped["unreadable"] += int(np.count_nonzero(~readable))
    dropped["blurred"] = int(np.count_nonzero(readable & (score < spec.min_sharpness)))
    refuse_if_unreadable(
        dropped["unreadable"], int(keep.sum()), spec.max_unreadable, (*overview_problems, *problems)
    )

    rows = np.flatnonzero(keep)
    if spec.max_tiles is not None:
        chosen = spread_sample(grid[rows], spec.max_tiles, spec.seed)
        dropped["not_sampled"] = len(rows) - len(chosen)
        rows = rows[chosen]
    grid = grid[rows]
    tiles = TileSet(
        info=slide.info,
        spacing=spacing,
        spec=spec,
        plan=plan,
        lattice=lattice,
        coords_l0=lattice.corners_l0(grid),
        grid=grid,
        tissue=tissue[rows],
        pen=measured.pen[grid[:, 1], grid[:, 0]],
        fold=measured.fold[grid[:, 1], grid[:, 0]],
        sharpness=score[rows],
        dropped={"candidates": lattice.rows * lattice.columns, **dropped},
    )
    return tiles, problems


def refuse_if_unreadable(
    unreadable: int, readable: int, max_unreadable: float, problems: tuple[str, ...] = ()
) -> None:
    """Fail a slide of which too many tiles can't be read.

    Raises:
        ReadError: says how many, and the first cause.
    """
    total = unreadable + readable
    share = unreadable / max(1, total)
    if share > max_unreadable:
        cause = f" ({problems[0]})" if problems else ""
        raise ReadError(
            f"{unreadable} of {total} tiles ({share:.1%}) can't be read{cause}, more than "
            f"max_unreadable {max_unreadable:.1%} allows; get a fresh copy of the file, or raise "
            "--max-unreadable"
        )


def _probe_sharpness(
    slide: Slide,
    spacing: Spacing,
    lattice: Lattice,
    grid: NDArray[np.int32],
    tissue: NDArray[np.float32],
    downscale: Downscale,
    threads: int,
) -> tuple[NDArray[np.float32], NDArray[np.bool_], tuple[str, ...]]:
    """Return sharpness (N,), readable (N,) and problems of the tiles at `grid`.

    Tiles are grouped into square cells of the lattice, so that at most `MAX_PROBES` windows are
    read; each cell is judged at the centre of its tile with the most tissue.
    """
    score = np.full(len(grid), np.nan, np.float32)
    readable = np.ones(len(grid), np.bool_)
    if not len(grid):
        return score, readable, ()
    edge = 1
    while True:
        cells = grid // edge
        key = cells[:, 1].astype(np.int64) * (lattice.columns + 1) + cells[:, 0]
        if len(np.unique(key)) <= MAX_PROBES:
            break
        edge += 1
    order = np.lexsort((-tissue, key))
    _, first = np.unique(key[order], return_index=True)
    probed = order[first]
    cell_of = np.searchsorted(key[probed], key)

    downsamples = [level.downsample for level in slide.info.levels]
    plan = plan_read(downsamples, spacing.mpp, mpp=max(PROBE_MPP, spacing.mpp), tile_px=PROBE_PX)
    inset_l0 = (lattice.extent_l0 - plan.extent_l0) / 2
    corners_l0 = np.rint(lattice.corners_l0(grid[probed]) + inset_l0).astype(np.int32)
    batch = slide.read_tiles(corners_l0, plan, downscale=downscale, threads=threads)
    cell_score = np.where(batch.readable, sharpness(batch.images, mpp=plan.mpp), np.nan)
    score[:] = cell_score[cell_of]
    readable[probed] = batch.readable
    return score, readable, batch.problems


def _with_coarser(
    fine: TileSet, overview: Overview, tissue_map: TissueMap, coarser_mpp: tuple[float, ...]
) -> TileSet:
    """Add the coarser resolutions: a place is kept where it holds a kept tile of the finer one."""
    mpp, *further = coarser_mpp
    ratio = round(mpp / fine.plan.mpp)
    lattice = coarser_lattice(fine.lattice, ratio)
    measured = _measure(lattice, overview, tissue_map, None, ())
    cells = fine.grid // ratio
    key = cells[:, 1].astype(np.int64) * lattice.columns + cells[:, 0]
    kept, parent = np.unique(key, return_inverse=True)
    grid = np.stack([kept % max(1, lattice.columns), kept // max(1, lattice.columns)], axis=1)
    grid = grid.astype(np.int32)
    column, row = grid[:, 0], grid[:, 1]
    score = np.full(len(kept), np.nan, np.float32)
    judged = ~np.isnan(fine.sharpness)
    np.fmax.at(score, parent[judged], fine.sharpness[judged])
    coarse = TileSet(
        info=fine.info,
        spacing=fine.spacing,
        spec=fine.spec,
        plan=plan_for(fine.info, fine.spacing, fine.spec, mpp),
        lattice=lattice,
        coords_l0=lattice.corners_l0(grid),
        grid=grid,
        tissue=measured.tissue[row, column],
        pen=measured.pen[row, column],
        fold=measured.fold[row, column],
        sharpness=score,
        dropped={
            "candidates": lattice.rows * lattice.columns,
            "no_finer_tile": lattice.rows * lattice.columns - len(kept),
        },
    )
    if further:
        coarse = _with_coarser(coarse, overview, tissue_map, tuple(further))
    return replace(fine, parent=parent.astype(np.int32), coarser=coarse)


def plan_for(info: SlideInfo, spacing: Spacing, spec: TilingSpec, mpp: float) -> ReadPlan:
    """Return how a tile of a spec is read from a slide, at one of the spec's resolutions.

    Raises:
        SpacingError: scanned coarser than asked.
    """
    return plan_read(
        [level.downsample for level in info.levels],
        spacing.mpp,
        mpp=mpp,
        tile_px=spec.tile_px,
        allow_upsampling=spec.allow_upsampling,
    )
