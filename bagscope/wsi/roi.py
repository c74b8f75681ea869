"""Regions of interest: where a person says that tiles may, or must not, be taken.

A region of interest is a GeoJSON file per slide. Which of its classes count is a `RoiSelection`.
All coordinates here are in level-0 pixels (`_l0`); `geojson` has dealt with the file's own frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.errors import ConfigError, SlideError
from bagscope.wsi.geojson import class_names
from bagscope.wsi.outline import Region, coverage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.outline import MaskFrame
    from bagscope.wsi.slide import RectL0

ENDINGS = (".geojson", ".geojson.gz", ".json", ".json.gz")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoiSelection:
    """Which classes of annotations tiles are taken inside of, and which they are kept out of.

    Letter case does not matter. `include` None takes every class that is not excluded; where a
    slide's file then has nothing but excluded regions, the rest of the slide is allowed.
    """

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def included(self, regions: Iterable[Region]) -> list[Region]:
        """Return the regions that tiles may lie in."""
        allowed = None if self.include is None else _folded(self.include)
        excluded = _folded(self.exclude)
        return [
            region
            for region in regions
            if (allowed is None or region.class_name.casefold() in allowed)
            and region.class_name.casefold() not in excluded
        ]

    def excluded(self, regions: Iterable[Region]) -> list[Region]:
        """Return the regions that tiles are kept out of."""
        excluded = _folded(self.exclude)
        return [region for region in regions if region.class_name.casefold() in excluded]


def _folded(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.strip().casefold() for name in names)


# --- files ----------------------------------------------------------------------------------


def load(path: Path, slide_id: str) -> Path | None:
    """Return the GeoJSON file of a slide: `path` itself, or the one of that name in the folder.

    None where the folder has none for this slide.

    Raises:
        ConfigError: `path` does not exist.
        SlideError: the folder has several files for the slide.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such GeoJSON file or folder; check --roi")
    found = [file for ending in ENDINGS if (file := path / f"{slide_id}{ending}").is_file()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise SlideError(f"{slide_id}: has several regions of interest, {names}; keep one of them")
    return found[0] if found else None


def require_known_classes(files: Iterable[Path], selection: RoiSelection) -> None:
    """Refuse a class name that none of the files uses: it is most likely misspelt.

    Files are read only until every class has been met.

    Raises:
        ConfigError: names the class and those that are there.
        SlideError: a file can't be read.
    """
    wanted = _folded((*(selection.include or ()), *selection.exclude))
    met: set[str] = set()
    for file in files:
        if wanted <= _folded(met):
            return
        met |= class_names(file)
    present, known = sorted(met), _folded(met)
    for option, names in (
        ("--roi-include", selection.include or ()),
        ("--roi-exclude", selection.exclude),
    ):
        for name in names:
            if name.strip().casefold() not in known:
                listed = ", ".join(repr(each) if each else "unclassified" for each in present)
                raise ConfigError(
                    f"{option} {name!r}: no region of interest has this class; "
                    f"the files have {listed or 'no regions at all'}"
                )


# --- areas ----------------------------------------------------------------------------------


def rasterise(regions: Iterable[Region], frame: MaskFrame) -> NDArray[np.float32]:
    """Return which share of each mask pixel the regions cover: (H, W) float32 in [0, 1]."""
    return coverage((shape for region in regions for shape in region.polygons), frame)


def allowed_mask(
    regions: Sequence[Region], selection: RoiSelection, frame: MaskFrame
) -> NDArray[np.float32]:
    """Return which share of each mask pixel tiles may use: (H, W) float32 in [0, 1].

    An exclusion wins over an inclusion. The mask is empty where the slide has no region of an
    included class: nothing of interest has been marked there.
    """
    included = selection.included(regions)
    excluded = selection.excluded(regions)
    barred = rasterise(excluded, frame)
    if included or selection.include is not None or not excluded:
        allowed = rasterise(included, frame)
        allowed *= 1 - barred
        return allowed
    rest: NDArray[np.float32] = 1 - barred
    return rest


def extent_l0(regions: Iterable[Region]) -> tuple[float, float, float, float] | None:
    """Return the bounding box (x0, y0, x1, y1) of all regions in level-0 pixels; None for none."""
    import numpy as np

    rings = [shape.exterior_l0 for region in regions for shape in region.polygons]
    if not rings:
        return None
    points = np.concatenate(rings)
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return x0, y0, x1, y1


def require_inside(
    regions: Sequence[Region], bounds_l0: RectL0, *, slide_name: str, file_name: str
) -> None:
    """Refuse regions none of which touches the scanned area: they belong to another frame or slide.

    Raises:
        SlideError: states both extents.
    """
    extents = [extent for region in regions if (extent := extent_l0([region]))]
    left, top = bounds_l0.x_l0, bounds_l0.y_l0
    right, bottom = left + bounds_l0.width_l0, top + bounds_l0.height_l0
    touching = [x0 < right and x1 > left and y0 < bottom and y1 > top for x0, y0, x1, y1 in extents]
    whole = extent_l0(regions)
    if whole is None or any(touching):
        return
    x0, y0, x1, y1 = whole
    raise SlideError(
        f"{slide_name}: every region of {file_name} lies outside the slide "
        f"(regions x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}; "
        f"slide x {left} to {right}, y {top} to {bottom}); "
        "is it this slide's file, and in the frame it is read in (qupath or openslide)?"
    )
