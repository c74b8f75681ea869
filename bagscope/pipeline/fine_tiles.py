"""Finer tiles inside a region: where they stand, which of them hold tissue, and their vectors.

Frames as in `bagscope.wsi.slide`. The finer lattice has the slide's own origin and a step that the
stored one is a multiple of, so that stored tiles stand on it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import shapely
from numpy.typing import NDArray

from bagscope.errors import ConfigError, FingerprintMismatch, SlideError
from bagscope.features.batches import Batcher, Encoded
from bagscope.wsi.geojson import Frame, read_regions
from bagscope.wsi.geojson_parse import parse_features
from bagscope.wsi.geometry import ReadPlan
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.opening import open_slide, stored_faults_l0
from bagscope.wsi.outline import MaskFrame, Polygon, coverage, masks_from_regions
from bagscope.wsi.overview import read_overview
from bagscope.wsi.slide import Downscale, RectL0, Slide
from bagscope.wsi.spacing import require_spacing
from bagscope.wsi.tile_file import TileFile
from bagscope.wsi.tiles import TileSet, tile_slide
from bagscope.wsi.tiling import TilingSpec
from bagscope.wsi.tissue import TissueMap

if TYPE_CHECKING:
    from bagscope.features.session import EncoderSession

_INSIDE_L0 = 0.01
"""A tile that shares less than this with a region along an edge only touches it."""
_BATCH_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FineRegion:
    """Where finer tiles are wanted.

    Attributes:
        shape: in level-0 pixels, inside the slide.
        box_l0: its bounding box in whole pixels.
    """

    shape: shapely.Geometry
    box_l0: RectL0

    @property
    def name(self) -> str:
        """Return the bounding box as part of a file's name."""
        box = self.box_l0
        return f"{box.x_l0}_{box.y_l0}_{box.width_l0}_{box.height_l0}"

    def polygons(self) -> list[Polygon]:
        """Return the shape's parts."""
        parts = [part for part in shapely.get_parts(self.shape) if part.geom_type == "Polygon"]
        return [
            Polygon(
                exterior_l0=shapely.get_coordinates(part.exterior)[:-1],
                holes_l0=tuple(shapely.get_coordinates(ring)[:-1] for ring in part.interiors),
            )
            for part in parts
        ]

    def touched(self, coords_l0: NDArray[np.int32], extent_l0: float) -> NDArray[np.bool_]:
        """Return which footprints (n, 2) share an area with the region: (n,)."""
        x, y = coords_l0.astype(np.float64).T + _INSIDE_L0
        inner = extent_l0 - 2 * _INSIDE_L0
        boxes = shapely.box(x, y, x + inner, y + inner)
        shapely.prepare(self.shape)
        return np.asarray(shapely.intersects(self.shape, boxes), np.bool_)

    def holds(self, x_l0: NDArray[np.float64], y_l0: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which points of a lattice lie in the region: (len(y), len(x))."""
        shapely.prepare(self.shape)
        return np.asarray(shapely.contains_xy(self.shape, x_l0[None], y_l0[:, None]), np.bool_)

    def mask(self, frame: MaskFrame) -> NDArray[np.bool_]:
        """Return which pixels of a frame lie in the region by half or more: (H, W)."""
        return np.asarray(coverage(self.polygons(), frame) >= 0.5, np.bool_)


def parse_region(
    text: str, *, slide_id: str, size_l0: tuple[int, int], bounds_l0: RectL0, frame: Frame
) -> FineRegion:
    """Return the region that `X,Y,W,H` or a GeoJSON file names.

    Args:
        text: as given.
        slide_id: for messages.
        size_l0: width and height of level 0.
        bounds_l0: the scanned bounds, whose corner is the origin of the `qupath` frame.
        frame: that the numbers count in; of a file that says its own, that one.

    Raises:
        ConfigError: neither four numbers nor a file, or no area.
        SlideError: outside the slide, or a file that can't be read.
    """
    numbers = _numbers(text)
    if numbers is not None:
        x, y, width, height = numbers
        if width <= 0 or height <= 0:
            raise ConfigError(f"--fine {text}: has no area; write X,Y,WIDTH,HEIGHT")
        if frame == "qupath":
            x, y = x + bounds_l0.x_l0, y + bounds_l0.y_l0
        wanted: shapely.Geometry = shapely.box(x, y, x + width, y + height)
    else:
        path = Path(text)
        if not path.is_file():
            raise ConfigError(
                f"--fine {text}: neither X,Y,WIDTH,HEIGHT in level-0 pixels nor a GeoJSON file"
            )
        regions = read_regions(path, bounds_l0=bounds_l0, default_frame=frame)
        shapes = [
            shapely.make_valid(shapely.Polygon(one.exterior_l0, one.holes_l0))
            for region in regions
            for one in region.polygons
        ]
        wanted = shapely.union_all(shapes)
    inside = shapely.intersection(wanted, shapely.box(0, 0, *size_l0))
    if shapely.area(inside) <= 0:
        left, top, right, bottom = shapely.bounds(wanted).tolist()
        raise SlideError(
            f"{slide_id}: the region of --fine lies at x {left:.0f} to {right:.0f}, y {top:.0f} to "
            f"{bottom:.0f}, outside the slide of {size_l0[0]}×{size_l0[1]} pixels; is it in its "
            "frame (--frame qupath or openslide)?"
        )
    left, top, right, bottom = shapely.bounds(inside).tolist()
    x_l0, y_l0 = math.floor(left), math.floor(top)
    box = RectL0(
        x_l0=x_l0,
        y_l0=y_l0,
        width_l0=math.ceil(right) - x_l0,
        height_l0=math.ceil(bottom) - y_l0,
    )
    return FineRegion(shape=inside, box_l0=box)


def finer_step_px(step_px: int, parts: int) -> int:
    """Return the step of finer tiles: the largest part of a stored step that it is a multiple of.

    Where a step has no such part between half of what is wanted and that, the nearest whole number;
    stored tiles then do not stand on the finer lattice.
    """
    wanted = step_px / parts
    for candidate in range(math.floor(wanted), max(0, math.ceil(wanted / 2) - 1), -1):
        if step_px % candidate == 0:
            return candidate
    return max(1, round(wanted))


def open_tiled(path: Path, tiles: TileFile, *, mpp: float | None, scene: int | None) -> Slide:
    """Open a slide as its tiles were read.

    Raises:
        FingerprintMismatch: it is not the file that was tiled.
        SlideError: it can't be opened.
    """
    if tiles.fields.get("slide") != slide_identity(path):
        raise FingerprintMismatch(
            f"{path.name}: is not the file that was tiled (its size or content changed); run "
            "bagscope tile --overwrite, then extract and score it again"
        )
    return open_slide(
        path,
        mpp=mpp,
        backend=str(tiles.attributes["backend"]),
        allow_estimated_mpp=tiles.spacing.estimated,
        scene=scene,
    )


def finer_tiles(
    slide: Slide, tiles: TileFile, region: FineRegion, *, parts: int, most: int, threads: int = 1
) -> TileSet:
    """Return every finer tile that holds a part of a region and, as the stored ones, tissue.

    Args:
        slide: an open slide.
        tiles: its stored tiles, whose tissue and options are taken.
        region: where.
        parts: finer tiles along a stored step.
        most: tiles that may be made.
        threads: for reading.

    Raises:
        SlideError: no tissue in the region.
        ConfigError: more tiles than may be made.
    """
    spec = TilingSpec.model_validate(dict(tiles.fields["spec"]))
    # A coarser resolution has the finest one's spec.
    mpp, tile_px = float(tiles.attributes["mpp"]), int(tiles.attributes["tile_px"])
    step_px = finer_step_px(tile_px - int(tiles.attributes["overlap_px"]), parts)
    fine = spec.model_copy(
        update={
            "mpp": mpp,
            "tile_px": tile_px,
            "overlap_px": tile_px - step_px,
            "coarser_mpp": (),
            "max_tiles": None,
        }
    )
    box, extent_l0 = region.box_l0, float(tiles.attributes["extent_l0"])
    step_l0 = extent_l0 * step_px / tile_px
    upper = (box.width_l0 + extent_l0) * (box.height_l0 + extent_l0) / step_l0**2
    if upper > 4 * most:  # of which a quarter may well be tissue
        raise ConfigError(_too_many(tiles.slide_id, round(upper), most))
    overview = read_overview(slide, require_spacing(slide.info).mpp, threads=threads)
    frame = overview.frame
    # So far around the region that tiles which hold a part of it lie inside.
    near = shapely.buffer(region.shape, extent_l0 * 1.5, join_style="mitre")
    around = FineRegion(shape=near, box_l0=region.box_l0)
    allowed = np.asarray(coverage(around.polygons(), frame) > 0, np.bool_)
    tissue, pen, fold = masks_from_regions(_outline(tiles), frame)
    found = tile_slide(
        slide,
        fine,
        allowed=allowed,
        edited=TissueMap(
            tissue=tissue & overview.readable,
            pen=pen,
            fold=fold,
            mpp=overview.mpp,
            background=slide.info.background,
        ),
        overview=overview,
        faults_l0=tuple(stored_faults_l0(slide)),
        threads=threads,
    ).tiles
    kept = np.flatnonzero(region.touched(found.coords_l0, found.plan.extent_l0))
    if not len(kept):
        raise SlideError(
            f"{tiles.slide_id}: the region of --fine holds no tissue that a tile was made of "
            f"(x {box.x_l0} to {box.x_l0 + box.width_l0}, y {box.y_l0} to "
            f"{box.y_l0 + box.height_l0}); choose one on the tissue"
        )
    if len(kept) > most:
        raise ConfigError(_too_many(tiles.slide_id, len(kept), most))
    return chosen_tiles(found, kept)


def chosen_tiles(tiles: TileSet, rows: NDArray[np.intp]) -> TileSet:
    """Return some of the tiles, in the order of their rows."""
    each = {
        name: getattr(tiles, name)[rows]
        for name in ("coords_l0", "grid", "tissue", "pen", "fold", "sharpness")
    }
    return replace(tiles, **each)


def encode_tiles(
    slide: Slide,
    coords_l0: NDArray[np.int32],
    plan: ReadPlan,
    session: EncoderSession,
    *,
    downscale: str = "area",
    threads: int = 1,
    tell: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_], tuple[str, ...]]:
    """Return vectors (n, D) of tiles, which of them could be read (n,), and what was not.

    Args:
        slide: an open slide.
        coords_l0: (n, 2) top-left corners, ordered by (y, x).
        plan: how a tile is read.
        session: of the encoder.
        downscale: as the stored tiles were.
        threads: for reading.
        tell: called with the number of tiles read so far.
    """
    vectors = np.zeros((len(coords_l0), session.spec.dimension), np.float32)
    readable = np.ones(len(coords_l0), np.bool_)
    problems: list[str] = []
    batcher: Batcher[None] = Batcher(session)

    def take(encoded: Iterator[Encoded[None]]) -> None:
        for part in encoded:
            vectors[part.start : part.start + len(part.vectors)] = part.vectors

    at_once = max(1, _BATCH_BYTES // (plan.tile_px**2 * 3))
    for start in range(0, len(coords_l0), at_once):
        batch = slide.read_tiles(
            coords_l0[start : start + at_once],
            plan,
            downscale=cast("Downscale", downscale),
            threads=threads,
        )
        readable[start : start + len(batch.readable)] = batch.readable
        problems += batch.problems
        done = 0
        while done < len(batch.images):
            done += batcher.add(None, start + done, batch.images[done:])
            if batcher.is_full:
                take(batcher.run())
        if tell is not None:
            tell(start + len(batch.images))
    while not batcher.is_idle:
        take(batcher.run())
        take(batcher.flush())
    return vectors, readable, tuple(problems)


def _numbers(text: str) -> tuple[float, float, float, float] | None:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    if len(found) != 4 or not all(map(math.isfinite, found)):
        raise ConfigError(f"--fine {text}: write four numbers, X,Y,WIDTH,HEIGHT")
    return found[0], found[1], found[2], found[3]


def _outline(tiles: TileFile) -> list[Any]:
    """Return the tissue, pen and folds that the tiles were made of."""
    bounds = tiles.bounds_l0
    document = json.loads(tiles.outline_geojson)
    return parse_features(tiles.slide_id, document, (bounds.x_l0, bounds.y_l0))


def _too_many(slide_id: str, tiles: int, most: int) -> str:
    return (
        f"{slide_id}: the region of --fine would take {tiles:,} finer tiles, more than {most:,}; "
        "choose a smaller one, or fewer tiles with --fine-parts"
    )
