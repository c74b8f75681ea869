"""Scores of tiles against what a pathologist drew.

All coordinates are in level-0 pixels (`_l0`). A tile is the square at its coordinates; lesions are
the connected parts of the drawn area.

FROC: at a threshold, a lesion is found where a detection lies on it; a detection on none is a false
positive. The curve is the share of lesions found over the false positives per slide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import shapely
from numpy.typing import NDArray
from scipy.spatial import KDTree
from shapely.geometry.base import BaseGeometry

from bagscope.errors import ConfigError
from bagscope.mil.evaluation.ranking import binary_auprc, binary_auroc
from bagscope.mil.explain.faithfulness import order_of
from bagscope.mil.explain.pools import Rows
from bagscope.mil.explain.question import Array
from bagscope.wsi.outline import Polygon, Region

INSIDE = 0.5
"""A tile belongs to the drawn area from this share of overlap on."""
FROC_RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per slide at which CAMELYON16 averages the sensitivity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileMetrics:
    """How well scores find the tiles of the drawn area.

    Attributes:
        tiles: how many there are.
        positive: of these in the drawn area.
        auroc: NaN where all tiles are inside, or none.
        auprc: likewise; of random scores it is the share of positive tiles.
        dice: 2 TP / (2 TP + FP + FN) at the threshold, NaN where nothing is drawn or called.
        threshold: from which a tile is called.
    """

    tiles: int
    positive: int
    auroc: float
    auprc: float
    dice: float
    threshold: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideDetections:
    """Detections on one slide.

    Attributes:
        scores: (d,) of each detection.
        lesion: (d,) that it lies on, -1 for none.
        lesions: how many the slide has.
    """

    scores: Array
    lesion: Rows
    lesions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Froc:
    """The curve over a cohort, from the highest threshold down.

    Attributes:
        thresholds: (p,), infinite first.
        false_positives: (p,) per slide.
        sensitivity: (p,) share of lesions found.
        lesions: in all slides.
    """

    thresholds: Array
    false_positives: Array
    sensitivity: Array
    lesions: int

    def sensitivity_at(self, rate: float) -> float:
        """Return the share of lesions found with at most so many false positives per slide."""
        place = int(np.searchsorted(self.false_positives, rate, side="right")) - 1
        return float(self.sensitivity[place])

    def lesion_sensitivity(self, threshold: float) -> float:
        """Return the share of lesions found by detections of at least this score."""
        place = int(np.searchsorted(-self.thresholds, -threshold, side="right")) - 1
        return float(self.sensitivity[place])

    @property
    def score(self) -> float:
        """Return the mean sensitivity at `FROC_RATES`."""
        return float(np.mean([self.sensitivity_at(rate) for rate in FROC_RATES]))


def chosen_regions(
    regions: Sequence[Region], classes: Sequence[str] | None, *, where: str
) -> list[Region]:
    """Return the regions of some classes, letter case aside; of all where None.

    Args:
        regions: of a slide.
        classes: wanted.
        where: the annotation file's name, for messages.

    Raises:
        ConfigError: a class that no region has.
    """
    if classes is None:
        return list(regions)
    wanted = {name.strip().casefold() for name in classes}
    present = sorted({region.class_name for region in regions})
    for name in classes:
        if name.strip().casefold() not in {one.casefold() for one in present}:
            listed = ", ".join(one or "unclassified" for one in present)
            raise ConfigError(f"{where}: no region of class {name!r}; it has {listed or 'none'}")
    return [region for region in regions if region.class_name.casefold() in wanted]


def overlap_shares(
    regions: Iterable[Region], coords_l0: NDArray[np.int32], tile_size_l0: float
) -> Array:
    """Return which share of each tile the regions cover: (n,) float64 in [0, 1].

    Args:
        regions: those that overlap count once.
        coords_l0: (n, 2) top-left corners.
        tile_size_l0: side of a tile.
    """
    boxes = _boxes(coords_l0, tile_size_l0)
    tree = shapely.STRtree(boxes)
    shares = np.zeros(len(boxes))
    for part in _parts(_area(regions)):
        # Parts of a union share no area, so their shares add up.
        shapely.prepare(part)
        touches = tree.query(part, predicate="intersects")
        inside = shapely.covers(part, boxes[touches])
        shares[touches[inside]] = 1.0
        edge = touches[~inside]
        shares[edge] += shapely.area(shapely.intersection(part, boxes[edge])) / tile_size_l0**2
    return np.clip(shares, 0.0, 1.0)


def tile_metrics(
    scores: npt.ArrayLike, shares: Array, *, threshold: float, inside: float = INSIDE
) -> TileMetrics:
    """Compare scores with the share of each tile that lies in the drawn area.

    Args:
        scores: (n,) higher is more.
        shares: (n,) of `overlap_shares`.
        threshold: of the scores, for Dice.
        inside: share from which a tile is positive.
    """
    values = np.asarray(scores, np.float64)
    order_of(values)  # refuses what is no finite number
    if len(values) != len(shares):
        raise ValueError(f"{len(values)} scores for {len(shares)} tiles; give one each")
    truth, called = shares >= inside, values >= threshold
    has_both = truth.any() and not truth.all()
    either = int(truth.sum() + called.sum())
    return TileMetrics(
        tiles=len(truth),
        positive=int(truth.sum()),
        auroc=float(binary_auroc(truth, values)) if has_both else np.nan,
        auprc=float(binary_auprc(truth, values)) if has_both else np.nan,
        dice=2 * int((truth & called).sum()) / either if either else np.nan,
        threshold=threshold,
    )


def lesions_of(regions: Iterable[Region], *, merge_l0: float = 0.0) -> list[BaseGeometry]:
    """Return the lesions: connected parts, those less than `merge_l0` apart taken as one."""
    area = _area(regions)
    if merge_l0 > 0:
        # Grown by half the gap, what is nearer than that becomes one part.
        grown = _parts(area.buffer(merge_l0 / 2))
        return [area.intersection(part) for part in grown]
    return _parts(area)


def detections(
    scores: npt.ArrayLike,
    coords_l0: NDArray[np.int32],
    *,
    radius_l0: float,
    at_least: float = -np.inf,
) -> Rows:
    """Return the tiles that are hottest in their surroundings, from the hottest down.

    The hottest tile is a detection and silences all within a radius; so on with those left.

    Args:
        scores: (n,).
        coords_l0: (n, 2).
        radius_l0: within which there is one detection.
        at_least: no detection below this score.
    """
    values = np.asarray(scores, np.float64)
    order = order_of(values)
    points = coords_l0.astype(np.float64)
    tree = KDTree(points)
    is_silent = values < at_least
    found = []
    for tile in order.tolist():
        if is_silent[tile]:
            continue
        found.append(tile)
        is_silent[tree.query_ball_point(points[tile], radius_l0)] = True
    return np.array(found, np.int64)


def on_lesions(
    lesions: Sequence[BaseGeometry],
    scores: npt.ArrayLike,
    coords_l0: NDArray[np.int32],
    tile_size_l0: float,
    rows: Rows,
) -> SlideDetections:
    """Say which lesion each detection lies on: that which its tile covers most of.

    Args:
        lesions: of the slide.
        scores: (n,) of all tiles.
        coords_l0: (n, 2).
        tile_size_l0: side of a tile.
        rows: of the tiles that are detections.
    """
    boxes = _boxes(coords_l0[rows], tile_size_l0)
    lesion, most = np.full(len(rows), -1), np.zeros(len(rows))
    for number, shape in enumerate(lesions):
        shapely.prepare(shape)
        touches = np.flatnonzero(shapely.intersects(shape, boxes))
        areas = shapely.area(shapely.intersection(shape, boxes[touches]))
        larger = touches[areas > most[touches]]
        most[larger] = areas[areas > most[touches]]
        lesion[larger] = number
    return SlideDetections(
        scores=np.asarray(scores, np.float64)[rows], lesion=lesion, lesions=len(lesions)
    )


def froc(slides: Sequence[SlideDetections]) -> Froc:
    """Return the curve over slides; those without a lesion count for false positives.

    Raises:
        ValueError: no slide has a lesion.
    """
    lesions = sum(slide.lesions for slide in slides)
    if not lesions:
        raise ValueError("no slide has a lesion to find; FROC takes slides with annotations")
    hits = []
    misses = [slide.scores[slide.lesion < 0] for slide in slides]
    for slide in slides:
        best = np.full(slide.lesions, -np.inf)
        on_one = slide.lesion >= 0
        np.maximum.at(best, slide.lesion[on_one], slide.scores[on_one])
        hits.append(best[np.isfinite(best)])
    hit, miss = np.sort(np.concatenate(hits)), np.sort(np.concatenate(misses))
    thresholds = np.unique(np.concatenate([hit, miss]))[::-1]
    return Froc(
        thresholds=np.concatenate([[np.inf], thresholds]),
        false_positives=np.concatenate([[0.0], _at_least(miss, thresholds) / len(slides)]),
        sensitivity=np.concatenate([[0.0], _at_least(hit, thresholds) / lesions]),
        lesions=lesions,
    )


def _at_least(ordered: Array, thresholds: Array) -> Array:
    return (len(ordered) - np.searchsorted(ordered, thresholds, side="left")).astype(np.float64)


def _boxes(coords_l0: NDArray[np.int32], tile_size_l0: float) -> NDArray[np.object_]:
    x, y = coords_l0.astype(np.float64).T
    return np.asarray(shapely.box(x, y, x + tile_size_l0, y + tile_size_l0))


def _area(regions: Iterable[Region]) -> BaseGeometry:
    return shapely.union_all([_shape(one) for region in regions for one in region.polygons])


def _shape(polygon: Polygon) -> BaseGeometry:
    return shapely.Polygon(polygon.exterior_l0, polygon.holes_l0)


def _parts(area: BaseGeometry) -> list[BaseGeometry]:
    return [part for part in shapely.get_parts(area).tolist() if part.area > 0]
