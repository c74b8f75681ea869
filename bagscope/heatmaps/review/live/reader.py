"""What a worker process of the viewer does: opens slides, reads what is asked, answers in JPEG.

No slide is ever opened in the process that serves, so that one whose bytes crash or hang a native
library costs a worker, which is replaced, and the request that met it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.artifacts import fingerprint
from bagscope.cohort.executors import worker
from bagscope.cohort.jobs import Job, StageResult
from bagscope.errors import ReadError, SlideError
from bagscope.heatmaps.gallery import open_as_tiled
from bagscope.heatmaps.review.choices import QUALITY
from bagscope.heatmaps.review.pyramid import (
    Picture,
    picture_tile,
    plan_picture,
    thumbnail_jpeg,
)
from bagscope.wsi.geometry import plan_read
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.overlay import encode_jpeg

if TYPE_CHECKING:
    from bagscope.artifacts import Json
    from bagscope.wsi.slide import Slide

OPEN_SLIDES = 4
"""Slides that one worker keeps open; the one not looked at for longest is closed for the next."""

_open: OrderedDict[SlideAt, Slide] = OrderedDict()


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideAt:
    """Where a slide lies, and how it is opened.

    Attributes:
        path: of the file.
        mpp: pixel size stated in the cohort's table.
        scene: image of a file that holds several.
        backend: that its tiles were read with, None where that is not known.
        size_l0: width and height of the slide that its tiles were cut from.
        identity: fingerprint of that slide's file, None where that is not known.
    """

    path: Path
    mpp: float | None = None
    scene: int | None = None
    backend: str | None = None
    size_l0: tuple[int, int] | None = None
    identity: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideFacts:
    """What is known of a slide's file; `mpp` is None where no pixel size is stated."""

    width_l0: int
    height_l0: int
    mpp: float | None
    picture: Picture


@dataclass(frozen=True, kw_only=True, slots=True)
class FactsWanted:
    """A wish to know a slide's size and the picture of its scanned area."""

    slide: SlideAt


@dataclass(frozen=True, kw_only=True, slots=True)
class TileWanted:
    """A wish for one tile of a slide's pyramid at full resolution."""

    slide: SlideAt
    level: int
    column: int
    row: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ThumbWanted:
    """A wish for a slide's thumbnail."""

    slide: SlideAt


@dataclass(frozen=True, kw_only=True, slots=True)
class CutWanted:
    """A wish for a tile of the model, as the model saw it.

    Attributes:
        x_l0: left edge.
        y_l0: upper edge.
        extent_l0: length of an edge.
        tile_px: edge of the picture.
    """

    slide: SlideAt
    x_l0: int
    y_l0: int
    extent_l0: float
    tile_px: int


Wanted = FactsWanted | TileWanted | ThumbWanted | CutWanted


def answer(job: Job) -> StageResult:
    """Read what a job wants; a picture is told on the way, facts come with the result."""
    wanted: Wanted = job.payload
    slide = opened(wanted.slide)
    picture = plan_picture(slide.info)
    if isinstance(wanted, FactsWanted):
        return StageResult(outcome="done", fingerprint="", facts=_facts(slide, picture))
    whole = True
    if isinstance(wanted, ThumbWanted):
        jpeg = thumbnail_jpeg(slide, picture)
    elif isinstance(wanted, CutWanted):
        jpeg = _cut(slide, wanted)
    else:
        jpeg, whole = picture_tile(slide, picture, wanted.level, wanted.column, wanted.row)
    worker.tell(jpeg)
    return StageResult(outcome="done", fingerprint="", facts={"whole": whole})


def opened(place: SlideAt) -> Slide:
    """Return the open slide, opening it and closing the oldest where need be.

    A worker does one thing at a time, so a slide that is closed here is never in use.

    Raises:
        SlideError: it can't be opened, or is another one than was scored.
    """
    slide = _open.pop(place, None)
    if slide is None:
        if place.identity not in (None, fingerprint(slide_identity(place.path))):
            raise SlideError(
                f"{place.path.name}: is not the file that was tiled (its size or content changed); "
                "correct its path in the cohort"
            )
        tile = {"backend": place.backend}
        slide, _ = open_as_tiled(place.path, tile, mpp=place.mpp, scene=place.scene)
        found = slide.info.width_l0, slide.info.height_l0
        if place.size_l0 is not None and place.size_l0 != found:
            slide.close()
            raise SlideError(
                f"{place.path.name}: has {found[0]}×{found[1]} pixels, its tiles were cut from a "
                f"slide of {place.size_l0[0]}×{place.size_l0[1]}; correct its path in the cohort"
            )
    _open[place] = slide
    if len(_open) > OPEN_SLIDES:
        _open.popitem(last=False)[1].close()
    return slide


def _cut(slide: Slide, wanted: CutWanted) -> bytes:
    """Return a tile as JPEG.

    Raises:
        ReadError: it could not be read.
    """
    import numpy as np

    # Only the ratio counts, as for `gallery.cutting_plan`: level-0 pixels per pixel of the picture.
    plan = plan_read(
        [level.downsample for level in slide.info.levels],
        1.0,
        mpp=wanted.extent_l0 / wanted.tile_px,
        tile_px=wanted.tile_px,
        allow_upsampling=True,
    )
    batch = slide.read_tiles(np.array([[wanted.x_l0, wanted.y_l0]], np.int32), plan)
    if not batch.readable[0]:
        raise ReadError(batch.problems[0])
    return encode_jpeg(batch.images[0], quality=QUALITY)


def _facts(slide: Slide, picture: Picture) -> dict[str, Json]:
    return {
        "width_l0": slide.info.width_l0,
        "height_l0": slide.info.height_l0,
        "mpp": slide.info.spacing.mpp if slide.info.spacing else None,
        "picture": asdict(picture),
    }
