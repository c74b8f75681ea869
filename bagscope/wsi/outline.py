"""Masks as polygons and polygons as masks, both exact at the edges of pixels.

Frames: mask coordinates count mask pixels from the top-left corner of the top-left pixel, so a
pixel (row, column) covers [column, column + 1] × [row, row + 1]; `_l0` coordinates are level-0
pixels, x to the right and y down. A `MaskFrame` ties one to the other.

Outlines run along pixel edges and not through pixel centres: the polygon of a mask covers exactly
the mask's area, and rasterises back to the same mask.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bagscope.wsi.slide import Rgb

_log = logging.getLogger(__name__)

TISSUE = "Tissue"
PEN = "Pen"
FOLD = "Fold"

COVERAGE_LINES = 8
"""Scan lines per mask pixel: coverage is exact along x and averaged over these along y."""

_LEFT_ABOVE, _RIGHT_ABOVE, _LEFT_BELOW, _RIGHT_BELOW = 1, 2, 4, 8
_SADDLE_FALLING = _LEFT_ABOVE | _RIGHT_BELOW
_SADDLE_RISING = _RIGHT_ABOVE | _LEFT_BELOW


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskFrame:
    """Where a mask lies on its slide.

    Attributes:
        shape: (H, W) of the mask.
        origin_x_l0: left edge of the mask's first column, in level-0 pixels.
        origin_y_l0: upper edge of its first row.
        px_l0_x: level-0 pixels per mask pixel along x; seldom a whole number.
        px_l0_y: the same along y.
    """

    shape: tuple[int, int]
    origin_x_l0: float
    origin_y_l0: float
    px_l0_x: float
    px_l0_y: float

    def to_l0(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Carry (n, 2) mask coordinates (x, y) to level 0."""
        return points * (self.px_l0_x, self.px_l0_y) + (self.origin_x_l0, self.origin_y_l0)

    def from_l0(self, points_l0: NDArray[np.float64]) -> NDArray[np.float64]:
        """Carry (n, 2) level-0 coordinates (x, y) to mask coordinates."""
        return (points_l0 - (self.origin_x_l0, self.origin_y_l0)) / (self.px_l0_x, self.px_l0_y)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Polygon:
    """An area with holes; rings are open: the first point is not repeated at the end.

    Attributes:
        exterior_l0: (n, 2) float64 as (x, y).
        holes_l0: rings of (m, 2) float64.
    """

    exterior_l0: NDArray[np.float64]
    holes_l0: tuple[NDArray[np.float64], ...] = ()

    @property
    def rings_l0(self) -> tuple[NDArray[np.float64], ...]:
        """Return the exterior followed by the holes."""
        return (self.exterior_l0, *self.holes_l0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Region:
    """What an annotation says: an area of one class.

    `class_name` is empty where the annotation has no class; a class within a class reads
    "Tumor: Positive". `colour` None means the class's usual colour.
    """

    class_name: str
    polygons: tuple[Polygon, ...]
    name: str = ""
    object_type: str = "annotation"
    colour: Rgb | None = None
    measurements: Mapping[str, float] = field(default_factory=dict)


class ClassMasks(Protocol):
    """What outlines are drawn of: three masks of one shape and where they lie."""

    @property
    def tissue(self) -> NDArray[np.bool_]:
        """(H, W) bool."""
        ...

    @property
    def pen(self) -> NDArray[np.bool_]:
        """(H, W) bool."""
        ...

    @property
    def fold(self) -> NDArray[np.bool_]:
        """(H, W) bool."""
        ...

    @property
    def frame(self) -> MaskFrame:
        """Where the masks lie on the slide."""
        ...


# --- mask to polygons -----------------------------------------------------------------------


def polygons(
    mask: NDArray[np.bool_], frame: MaskFrame, *, tolerance_px: float = 0.0
) -> list[Polygon]:
    """Return the outlines of a mask, one polygon per fragment, holes kept.

    Pixels that meet only at a corner belong to different fragments, which is what keeps every
    polygon valid: a ring never touches itself.

    Args:
        mask: (H, W) bool.
        frame: where it lies; its shape is the mask's.
        tolerance_px: how far, in mask pixels, simplified outlines may stray; 0 is exact.
            Simplified outlines stay valid: no ring crosses itself or another.

    Returns:
        Polygons ordered by their topmost, then leftmost, pixel.
    """
    if mask.shape != frame.shape:
        raise ValueError(f"mask is {mask.shape}, its frame {frame.shape}")
    fragments = _fragment_rings(np.ascontiguousarray(mask).view(np.uint8))
    if tolerance_px > 0:
        from bagscope.wsi.simplify import simplify_rings

        fragments = simplify_rings(fragments, tolerance_px)
    return [
        Polygon(
            exterior_l0=frame.to_l0(rings[0]),
            holes_l0=tuple(frame.to_l0(ring) for ring in rings[1:]),
        )
        for rings in fragments
    ]


def _fragment_rings(mask: NDArray[np.uint8]) -> list[list[NDArray[np.float64]]]:
    """Return, per 4-connected fragment, its exterior ring and then its holes, in mask pixels.

    Only the lattice points at which an outline turns are looked at. Along a row of the lattice
    they pair up into horizontal edges, along a column into vertical ones; following edges from
    pair to pair walks every ring, with the mask always on the right.
    """
    import cv2

    left_px, top_px, width, height = cv2.boundingRect(mask)
    if width == 0:
        return []
    mask = np.ascontiguousarray(mask[top_px : top_px + height, left_px : left_px + width])
    columns, rows, kinds = _turning_points(mask)
    # Where two pixels meet corner to corner an outline passes twice, so that point stands twice:
    # its first copy ends the edge on its left, its second begins the edge on its right.
    saddle = (kinds == _SADDLE_FALLING) | (kinds == _SADDLE_RISING)
    copies = np.repeat(np.arange(len(columns)), 1 + saddle)
    x, y, kind, twice = columns[copies], rows[copies], kinds[copies], saddle[copies]
    second = np.zeros(len(copies), np.bool_)
    second[1:] = twice[1:] & (copies[1:] == copies[:-1])

    # Each copy keeps to its own pixel, so the first of a rising saddle takes the edge below it.
    takes_lower = twice & (second ^ (kind == _SADDLE_RISING))
    by_column = np.argsort((x * (mask.shape[0] + 1) + y) * 2 + takes_lower, kind="stable")
    vertical_partner = np.empty(len(x), np.intp)
    vertical_partner[by_column[0::2]] = by_column[1::2]
    vertical_partner[by_column[1::2]] = by_column[0::2]

    left, right = np.arange(0, len(x), 2), np.arange(1, len(x), 2)
    mask_below = _at(mask, y[left], x[left])
    start = np.where(mask_below, left, right)
    end = np.where(mask_below, right, left)
    following = vertical_partner[end] >> 1

    labels = cv2.connectedComponents(mask, connectivity=4, ltype=cv2.CV_32S)[1]
    label_of_edge = labels[y[left] - ~mask_below, x[left]]
    fragments: dict[int, list[NDArray[np.float64]]] = {}
    vertex = copies  # both copies of a point carry one number, by which a second visit is known
    for edges in _cycles(following.tolist()):
        corners = np.stack([start[edges], end[edges]], axis=1).ravel()
        rings = [corners]
        if twice[corners].any():
            rings = _split_at_second_visits(corners, vertex[corners].tolist())
        holder = fragments.setdefault(int(label_of_edge[edges[0]]), [])
        for ring in rings:
            points = np.stack([x[ring] + left_px, y[ring] + top_px], axis=1).astype(np.float64)
            holder.insert(0 if signed_area(points) > 0 else len(holder), points)
    return list(fragments.values())


def _turning_points(
    mask: NDArray[np.uint8],
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.uint8]]:
    """Return x, y and the kind of each lattice point at which an outline turns, row by row.

    The kind has a bit for each of the four pixels around the point that is in the mask.
    """
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), np.uint8)
    padded[1:-1, 1:-1] = mask
    differs = padded[:, 1:] ^ padded[:, :-1]
    # An odd number of the four pixels, or two that meet only corner to corner.
    turns = (padded[:-1, :-1] ^ padded[1:, :-1]) & differs[1:]
    turns |= differs[1:] ^ differs[:-1]
    rows, columns = np.divmod(np.flatnonzero(turns.view(np.bool_)), width + 1)
    kinds = (
        padded[rows, columns] * _LEFT_ABOVE
        | padded[rows, columns + 1] * _RIGHT_ABOVE
        | padded[rows + 1, columns] * _LEFT_BELOW
        | padded[rows + 1, columns + 1] * _RIGHT_BELOW
    )
    return columns, rows, kinds


def _at(
    mask: NDArray[np.uint8], rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Return the mask at the given pixels, false below its last row."""
    inside = rows < mask.shape[0]
    found: NDArray[np.bool_] = inside & (mask[np.minimum(rows, mask.shape[0] - 1), columns] != 0)
    return found


def _cycles(following: list[int]) -> list[list[int]]:
    """Return the cycles of a permutation, each starting at its smallest member."""
    seen = bytearray(len(following))
    cycles = []
    for first in range(len(following)):
        if seen[first]:
            continue
        cycle = []
        edge = first
        while not seen[edge]:
            seen[edge] = 1
            cycle.append(edge)
            edge = following[edge]
        cycles.append(cycle)
    return cycles


def _split_at_second_visits(
    corners: NDArray[np.intp], vertices: list[int]
) -> list[NDArray[np.intp]]:
    """Cut a ring that passes a point twice into rings that pass each point once."""
    rings: list[NDArray[np.intp]] = []
    path: list[int] = []
    at: dict[int, int] = {}
    for position, vertex in enumerate(vertices):
        if vertex in at:
            loop = path[at[vertex] :]
            del path[at[vertex] + 1 :]
            for passed in loop[1:]:
                at.pop(vertices[passed])
            rings.append(corners[loop])
        else:
            at[vertex] = len(path)
            path.append(position)
    rings.append(corners[path])
    return rings


def signed_area(ring: NDArray[np.float64]) -> float:
    """Return the area of an open ring (n, 2); positive where it runs clockwise on the screen."""
    x, y = (ring - ring[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


# --- polygons to mask -----------------------------------------------------------------------


def coverage(shapes: Iterable[Polygon], frame: MaskFrame) -> NDArray[np.float32]:
    """Return how much of each mask pixel the polygons cover: (H, W) float32 in [0, 1].

    Inside and outside follow the even-odd rule per polygon; polygons that overlap count once.
    """
    covered = np.zeros(frame.shape, np.float32)
    for shape in shapes:
        _add_coverage(covered, [frame.from_l0(ring) for ring in shape.rings_l0])
    return covered


def _add_coverage(covered: NDArray[np.float32], rings: Sequence[NDArray[np.float64]]) -> None:
    """Add one polygon (rings in mask pixels) to `covered`, in place, up to full coverage."""
    height, width = covered.shape
    points = np.concatenate(rings)
    left, top = np.floor(points.min(axis=0))
    right, bottom = np.ceil(points.max(axis=0))
    x0, x1 = int(np.clip(left, 0, width)), int(np.clip(right, 0, width))
    y0, y1 = int(np.clip(top, 0, height)), int(np.clip(bottom, 0, height))
    if x0 >= x1 or y0 >= y1:
        return
    lines, crossings = _crossings(
        np.concatenate(rings), np.concatenate([np.roll(r, -1, axis=0) for r in rings]), y0, y1
    )
    order = np.lexsort((crossings, lines))
    lines, crossings = lines[order], np.clip(crossings[order] - x0, 0, x1 - x0)
    # Along a scan line the polygon begins and ends by turns. A begin at x contributes 1 to every
    # pixel right of x and the remaining part to the pixel that x falls in; an end takes it back.
    sign = np.where(np.arange(len(lines)) % 2 == 0, 1.0, -1.0) / COVERAGE_LINES
    pixel = crossings.astype(np.intp)
    part = crossings - pixel
    stride = x1 - x0 + 2
    flat = (lines // COVERAGE_LINES) * stride + pixel
    size = (y1 - y0) * stride
    change = np.bincount(flat, sign * (1 - part), size) + np.bincount(flat + 1, sign * part, size)
    share = np.cumsum(change.reshape(y1 - y0, stride), axis=1)[:, : x1 - x0]
    window = covered[y0:y1, x0:x1]
    np.clip(window + share, 0.0, 1.0, out=window)


def _crossings(
    start: NDArray[np.float64], end: NDArray[np.float64], y0: int, y1: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return (scan line counted from y0, x) wherever an edge crosses a scan line of rows y0..y1."""

    def line_of(y: NDArray[np.float64]) -> NDArray[np.intp]:
        at = np.ceil((y - y0) * COVERAGE_LINES - 0.5)
        return np.clip(at, 0, (y1 - y0) * COVERAGE_LINES).astype(np.intp)

    first = line_of(np.minimum(start[:, 1], end[:, 1]))
    count = line_of(np.maximum(start[:, 1], end[:, 1])) - first
    edge = np.repeat(np.arange(len(start)), count)
    within = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    lines = first[edge] + within
    y = y0 + (lines + 0.5) / COVERAGE_LINES
    (xa, ya), (xb, yb) = start[edge].T, end[edge].T
    return lines, xa + (y - ya) * ((xb - xa) / (yb - ya))


# --- classes --------------------------------------------------------------------------------


def regions_of(masks: ClassMasks, *, tolerance_px: float = 0.0) -> list[Region]:
    """Return the fragments of tissue, pen and folds, each a region that can be edited by itself."""
    named = ((TISSUE, masks.tissue), (PEN, masks.pen), (FOLD, masks.fold))
    return [
        Region(class_name=class_name, polygons=(polygon,))
        for class_name, mask in named
        for polygon in polygons(mask, masks.frame, tolerance_px=tolerance_px)
    ]


def masks_from_regions(
    regions: Sequence[Region], frame: MaskFrame
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the tissue, pen and fold masks (H, W) bool that edited regions describe.

    A pixel belongs to a class where at least half of it is covered. Letter case does not matter;
    a region without a class is taken for tissue, since that is what people draw who add a
    forgotten fragment; regions of other classes are passed over, and named in a warning.
    """
    covered = {}
    for wanted in (TISSUE, PEN, FOLD):
        names = {wanted.lower(), ""} if wanted == TISSUE else {wanted.lower()}
        shapes = (p for r in regions if r.class_name.lower() in names for p in r.polygons)
        covered[wanted] = coverage(shapes, frame) >= 0.5
    known = {TISSUE.lower(), PEN.lower(), FOLD.lower(), ""}
    others = sorted({r.class_name for r in regions if r.class_name.lower() not in known})
    if others:
        _log.warning(
            "%s: not a class of a mask; passed over (known: Tissue, Pen, Fold)", ", ".join(others)
        )
    return covered[TISSUE], covered[PEN], covered[FOLD]
