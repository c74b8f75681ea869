"""A run as the viewer serves it: planned when it is first asked for, and only then."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bagscope.artifacts import fingerprint
from bagscope.errors import ArtifactError
from bagscope.heatmaps.review.live.reader import CutWanted, SlideAt
from bagscope.wsi.slide import RectL0

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.heatmaps.review.live.reader import SlideFacts, Wanted
    from bagscope.heatmaps.review.pyramid import Picture
    from bagscope.pipeline.review import PlannedReview, ReviewTask

_GALLERY_NAME = re.compile(r"(\d{1,8})\.jpg", re.ASCII)


class LiveRun:
    """What the page asks of one run (`served.RunData`).

    Args:
        place: a run, or a folder of predictions.
        annotations: GeoJSON of slides by their ids, to show.
    """

    def __init__(self, place: Path, annotations: Mapping[str, Path] | None = None) -> None:
        self._place = place
        self._annotations = annotations or {}
        self._lock = threading.Lock()

    def slide_at(self, key: str) -> SlideAt | None:
        """Return where a slide lies, None where nothing says or its bag never was a slide."""
        from bagscope.pipeline.tile import scene_of

        task = self._task(key)
        slide = task.slide
        if slide.path is None:
            return None
        try:
            file = _scored_tiles(slide.scores, task.tilings)
        except ArtifactError:
            file = _Tiles()
        if not file.is_slide:
            return None
        return SlideAt(
            path=slide.path,
            mpp=slide.mpp,
            scene=scene_of(slide.slide_id),
            backend=file.backend,
            size_l0=file.size_l0,
            identity=file.identity,
        )

    def cohort_script(self) -> bytes:
        """Return the script with the table of slides."""
        from bagscope.pipeline.review_folder import cohort_bytes

        return cohort_bytes(self._plan, live=True)

    def slide_script(self, key: str, facts: SlideFacts | None) -> bytes:
        """Return the script of one slide."""
        from bagscope.pipeline.review_worker import annotation_of, scored_slide, slide_bytes

        task = self._task(key)
        scored = scored_slide(task)
        notes = list(scored.notes)
        if facts is None and (scored.places is None or scored.places.is_slide):
            where = "is in no cohort of this study" if task.slide.path is None else "can't be read"
            notes.append(f"The slide {where}, so there is no picture of it.")
        if facts is None:
            return slide_bytes(task, scored, picture=None, notes=notes)
        regions, faults, _ = annotation_of(task, _bounds_l0(facts.picture))
        return slide_bytes(
            task, scored, picture=facts.picture, regions=regions, notes=[*notes, *faults]
        )

    def gallery_tile(self, key: str, name: str) -> Wanted | None:
        """Return the tile of the model that a picture of the gallery shows."""
        asked, at = _GALLERY_NAME.fullmatch(name), self.slide_at(key)
        if asked is None or at is None:
            return None
        task = self._task(key)
        tiles = _scored_tiles(task.slide.scores, task.tilings)
        row = int(asked[1])
        if tiles.coords_l0 is None or row >= len(tiles.coords_l0):
            return None
        x_l0, y_l0 = tiles.coords_l0[row].tolist()
        return CutWanted(
            slide=at, x_l0=x_l0, y_l0=y_l0, extent_l0=tiles.extent_l0, tile_px=tiles.tile_px
        )

    def _task(self, key: str) -> ReviewTask:
        return self._tasks[key]

    @cached_property
    def _tasks(self) -> dict[str, ReviewTask]:
        return {
            task.key: replace(task, annotation=self._annotations.get(slide_id))
            for slide_id, task in self._plan.tasks.items()
        }

    @property
    def _plan(self) -> PlannedReview:
        with self._lock:
            return self._planned

    @cached_property
    def _planned(self) -> PlannedReview:
        from bagscope.pipeline.review import ReviewRequest, plan_review

        # Of a bundle that may lie there with other settings nothing is replaced: nothing is made.
        return plan_review(ReviewRequest(place=self._place, overwrite=True))


def _bounds_l0(picture: Picture) -> RectL0:
    """Return the scanned area; a pixel of a picture at full resolution is one of level 0."""
    return RectL0(
        x_l0=int(picture.x_l0),
        y_l0=int(picture.y_l0),
        width_l0=picture.width,
        height_l0=picture.height,
    )


class _Tiles(NamedTuple):
    """What a score file says of its slide's tiles."""

    is_slide: bool = True
    coords_l0: NDArray[np.int32] | None = None
    extent_l0: float = 0.0
    tile_px: int = 0
    backend: str | None = None
    size_l0: tuple[int, int] | None = None
    identity: str | None = None


@lru_cache(maxsize=16)
def _scored_tiles(scores: Path, tilings: Path | None) -> _Tiles:
    """Return what a score file says of its tiles, and their tiling of the slide's file.

    Raises:
        ArtifactError: it can't be read.
    """
    from bagscope.heatmaps.gallery import UNSTATED_TILE_PX
    from bagscope.heatmaps.tile_places import places_of
    from bagscope.mil.score_file import read_score_file
    from bagscope.pipeline.tiled_slide import find_tiling

    file = read_score_file(scores)
    tiled = find_tiling(tilings, file.slide_id, file.coords_l0)
    places = places_of(file.coords_l0, file.grid, file.tile, len(file.scores))
    stated: Any = file.tile.get("backend")
    size = places.size_l0
    return _Tiles(
        is_slide=places.is_slide,
        coords_l0=places.coords_l0,
        extent_l0=places.extent_l0,
        tile_px=int(file.tile.get("tile_px") or UNSTATED_TILE_PX),
        backend=stated if isinstance(stated, str) else None,
        size_l0=None if size is None else (int(size[0]), int(size[1])),
        identity=None if tiled is None else fingerprint(tiled.fields.get("slide", {})),
    )
