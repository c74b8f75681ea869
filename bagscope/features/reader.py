"""Reading one slide's tiles into shared memory, in a process of its own. Imports no torch.

The reader asks for a slot, fills it, says so, and asks for the next. So it never runs further
ahead than the memory that it is given.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import canonical_json
from bagscope.cohort.executors import worker
from bagscope.cohort.jobs import Job, StageResult
from bagscope.errors import FingerprintMismatch, ReadError, SlideError
from bagscope.features.ring import RingWindow
from bagscope.wsi.geometry import ReadPlan
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.opening import open_slide
from bagscope.wsi.slide import Downscale, Slide
from bagscope.wsi.tile_file import TileFile, read_tile_file
from bagscope.wsi.tiles import refuse_if_unreadable

STOP_READING = b"stop"
_LEVEL_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadTask:
    """What a reader needs to know.

    Attributes:
        slide_path: the slide.
        tile_path: its tile file.
        mpp: pixel size stated in the cohort table, None where the slide's own is used.
        scene: image of a file that holds several.
        backend: reads with this one; None chooses.
        threads: for decoding.
        ring_path, ring_slots, ring_rows, tile_px: the shared memory.
    """

    slide_path: Path
    tile_path: Path
    mpp: float | None
    scene: int | None
    backend: str | None
    threads: int
    ring_path: str
    ring_slots: int
    ring_rows: int
    tile_px: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Word of a filled slot.

    Attributes:
        slot: of the ring.
        start: row of the tile file that the slot's first tile is.
        count: tiles in the slot.
        unreadable: positions in the slot whose pixels could not be read.
        problems: one sentence per cause.
        wall_s: seconds that reading took.
        working_s: of these, seconds with something to compute, not waiting for bytes.
    """

    slot: int
    start: int
    count: int
    unreadable: tuple[int, ...]
    problems: tuple[str, ...]
    wall_s: float
    working_s: float

    def to_bytes(self) -> bytes:
        """Return the chunk as it travels."""
        return canonical_json({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def from_bytes(cls, message: bytes) -> Chunk:
        """Return the chunk that `to_bytes` made."""
        fields = json.loads(message)
        for name in ("unreadable", "problems"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


def read_slide(job: Job) -> StageResult:
    """Read every tile of a slide into the ring; the work of a reader process.

    Raises:
        FingerprintMismatch: the slide is not the one that was tiled.
        SlideError: it can't be read.
    """
    task: ReadTask = job.payload
    tiles = read_tile_file(task.tile_path)
    require_tiled_slide(tiles, job.slide_id, task)
    geometry: dict[str, Any] = {
        "slots": task.ring_slots, "rows": task.ring_rows, "tile_px": task.tile_px
    }  # fmt: skip
    begin_s = time.perf_counter()
    with (
        RingWindow(task.ring_path, **geometry) as ring,
        _opened(task, tiles) as slide,
    ):
        plan = read_plan_of(tiles, slide)
        opening_s = time.perf_counter() - begin_s
        for start in range(0, len(tiles), task.ring_rows):
            answer = worker.ask(b"")
            if answer == STOP_READING:
                break
            corners_l0 = tiles.coords_l0[start : start + task.ring_rows]
            slot = int(answer)
            chunk = _fill(slide, tiles, plan, corners_l0, start, slot, ring, task.threads)
            worker.tell(chunk.to_bytes())
    return StageResult(outcome="done", fingerprint="", facts={"opening_s": round(opening_s, 4)})


def _fill(
    slide: Slide,
    tiles: TileFile,
    plan: ReadPlan,
    corners_l0: NDArray[np.int32],
    start: int,
    slot: int,
    ring: RingWindow,
    threads: int,
) -> Chunk:
    begin_wall_s, begin_work_s = time.perf_counter(), _work_s()
    batch = slide.read_tiles(
        corners_l0,
        plan,
        downscale=cast("Downscale", tiles.attributes.get("downscale", "area")),
        threads=threads,
        out=ring.view(slot, len(corners_l0)),
    )
    wall_s = time.perf_counter() - begin_wall_s
    work_s = max(0.0, _work_s() - begin_work_s)
    return Chunk(
        slot=slot,
        start=start,
        count=len(corners_l0),
        unreadable=tuple(np.flatnonzero(~batch.readable).tolist()),
        problems=batch.problems,
        wall_s=wall_s,
        working_s=min(wall_s, work_s / threads),
    )


def _work_s() -> float:
    """Return for how long this process had something to compute: at it, or in line for a core.

    On a busy machine most of a decoder's time is spent in line, which is not waiting for bytes.
    """
    in_line_ns = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):  # on Linux
        with contextlib.suppress(OSError):  # a thread that has just ended
            in_line_ns += int(path.read_text().split()[1])
    return time.process_time() + in_line_ns / 1e9


def require_tiled_slide(tiles: TileFile, slide_id: str, task: ReadTask) -> None:
    """Refuse a tile file of another slide, and a slide that changed since it was tiled.

    Raises:
        FingerprintMismatch: says which, and what to do.
    """
    if tiles.slide_id != slide_id:
        raise FingerprintMismatch(
            f"{task.tile_path}: holds the tiles of slide {tiles.slide_id!r}, not of {slide_id!r}; "
            "tile the slide again with --overwrite"
        )
    stated = tiles.fields.get("slide")
    if stated != slide_identity(task.slide_path):
        raise FingerprintMismatch(
            f"{task.slide_path.name}: is not the file that was tiled (its size or content "
            "changed); run bagscope tile --overwrite, then extract again"
        )


def read_plan_of(tiles: TileFile, slide: Slide) -> ReadPlan:
    """Return how tiles are read, as the tile file recorded it.

    Raises:
        SlideError: the slide has no such level.
    """
    stated = tiles.attributes
    level, downsample = int(stated["read_level"]), float(stated["read_downsample"])
    levels = slide.info.levels
    if level >= len(levels) or abs(levels[level].downsample / downsample - 1) > _LEVEL_TOLERANCE:
        raise SlideError(
            f"{slide.info.path.name}: has no level {level} of downsample {downsample:g}, which it "
            "was tiled at; tile it again with --overwrite"
        )
    return ReadPlan(
        mpp=float(stated["mpp"]),
        tile_px=int(stated["tile_px"]),
        level=level,
        downsample=downsample,
        region_px=int(stated["read_region_px"]),
        extent_l0=float(stated["extent_l0"]),
        mpp_effective=float(stated["mpp_effective"]),
    )


def _opened(task: ReadTask, tiles: TileFile) -> Any:
    return open_slide(
        task.slide_path,
        mpp=task.mpp,
        backend=task.backend,
        allow_estimated_mpp=tiles.spacing.estimated,
        scene=task.scene,
    )


def refuse_too_many_unreadable(tiles: TileFile, unreadable: int, problems: Sequence[str]) -> None:
    """Fail a slide of which more tiles can't be read than its tiling allows.

    Raises:
        ReadError: says how many, and the first cause.
    """
    allowed = float(tiles.fields.get("spec", {}).get("max_unreadable", 0.0))
    try:
        refuse_if_unreadable(unreadable, len(tiles) - unreadable, allowed, tuple(problems))
    except ReadError as error:
        raise ReadError(f"{tiles.slide_id}: {error}") from None
