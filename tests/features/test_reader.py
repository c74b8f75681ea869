"""One reader, in this process, with a hand-made partner at the other end of its channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from bagscope.cohort.executors import worker
from bagscope.cohort.jobs import Job
from bagscope.errors import FingerprintMismatch, ReadError, SlideError
from bagscope.features.extract import ExtractTask
from bagscope.features.reader import (
    STOP_READING,
    Chunk,
    ReadTask,
    read_plan_of,
    read_slide,
    refuse_too_many_unreadable,
)
from bagscope.features.ring import TileRing
from bagscope.wsi.opening import open_slide
from bagscope.wsi.synthetic.faults import corrupt_tiles
from bagscope.wsi.tile_file import read_tile_file
from tests.features.engine_parts import TILE_PX, SmallStudy, make_study, read_task, tile_file

ROWS = 4


class Partner:
    """Grants slots in turn and keeps what was told, with a copy of the pixels of that moment."""

    def __init__(self, ring: TileRing, *, stop_after: int = 1000) -> None:
        self.ring, self.left = ring, stop_after
        self.granted: list[int] = []
        self.chunks: list[Chunk] = []
        self.pixels: list[np.ndarray] = []

    def ask(self, message: bytes) -> bytes:
        assert len(self.granted) == len(self.chunks), "asked again before the slot was filled"
        if len(self.granted) == self.left:
            return STOP_READING
        self.granted.append((5 * len(self.granted) + 1) % self.ring.slots)
        return str(self.granted[-1]).encode()

    def tell(self, message: bytes) -> None:
        chunk = Chunk.from_bytes(message)
        self.chunks.append(chunk)
        self.pixels.append(self.ring.view(chunk.slot)[: chunk.count].copy())


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Partner, Any]]:
    def read_it(
        study: SmallStudy, slide_id: str, *, stop_after: int = 1000, **changes: Any
    ) -> tuple[Partner, Any]:
        ring = TileRing(slots=3, rows=ROWS, tile_px=TILE_PX)
        partner = Partner(ring, stop_after=stop_after)
        monkeypatch.setattr(worker, "ask", partner.ask)
        monkeypatch.setattr(worker, "tell", partner.tell)
        task = ExtractTask(
            slide_path=study.slide_path(slide_id), tile_path=study.tile_path(slide_id)
        )
        payload: ReadTask = replace(read_task(task, ring), **changes)
        result = read_slide(Job(slide_id=slide_id, payload=payload))
        ring.close()
        return partner, result

    return read_it


@pytest.mark.parametrize("count", [0, 1, 4, 5, 19])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_tile_comes_once_in_order_with_its_pixels(
    read: Callable[..., tuple[Partner, Any]], tmp_path: Path, count: int, threads: int
) -> None:
    study = make_study(tmp_path, {"a": count})
    partner, result = read(study, "a", threads=threads)
    assert result.outcome == "done"
    assert [chunk.start for chunk in partner.chunks] == list(range(0, count, ROWS))
    assert sum(chunk.count for chunk in partner.chunks) == count
    assert [chunk.slot for chunk in partner.chunks] == partner.granted
    expected = study.pixels("a")
    for chunk, pixels in zip(partner.chunks, partner.pixels, strict=True):
        assert chunk.unreadable == ()
        assert 0 <= chunk.working_s <= chunk.wall_s
        np.testing.assert_array_equal(pixels, expected[chunk.start : chunk.start + chunk.count])


def test_it_stops_when_it_is_told_to(
    read: Callable[..., tuple[Partner, Any]], tmp_path: Path
) -> None:
    partner, result = read(make_study(tmp_path, {"a": 19}), "a", stop_after=2)
    assert len(partner.chunks) == 2
    assert result.outcome == "done"


def test_unreadable_tiles_are_named_by_their_place_in_the_slot(
    read: Callable[..., tuple[Partner, Any]], tmp_path: Path
) -> None:
    study = make_study(tmp_path, {"a": 19})
    corrupt_tiles(study.slide_path("a"), [2, 9, 10])
    tile_file(study, "a")
    partner, _ = read(study, "a")
    assert [chunk.unreadable for chunk in partner.chunks] == [(2,), (), (1, 2), (), ()]
    assert [len(chunk.problems) for chunk in partner.chunks] == [1, 0, 1, 0, 0]


def test_a_chunk_travels_unchanged() -> None:
    chunk = Chunk(
        slot=3, start=128, count=64, unreadable=(1, 63), problems=("µ: \"bad\"\n", ""),
        wall_s=0.1, working_s=1e-9,
    )  # fmt: skip
    assert Chunk.from_bytes(chunk.to_bytes()) == chunk


def test_another_slides_tiles_and_a_changed_slide_are_refused_before_a_tile_is_read(
    read: Callable[..., tuple[Partner, Any]], tmp_path: Path
) -> None:
    study = make_study(tmp_path, {"a": 3, "b": 3})
    with pytest.raises(FingerprintMismatch, match=r"holds the tiles of slide 'a', not of 'b'"):
        read(study, "b", tile_path=study.tile_path("a"))
    with study.slide_path("a").open("r+b") as handle:
        handle.seek(-200, 2)
        handle.write(bytes(100))
    with pytest.raises(FingerprintMismatch, match=r"a\.svs: is not the file that was tiled"):
        read(study, "a")


def test_a_level_that_the_slide_lacks_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"a": 3})
    for name, value in (("read_level", 2), ("read_downsample", 4.0)):
        tile_file(study, "a")
        with h5py.File(study.tile_path("a"), "r+") as file:
            file.attrs[name] = value
        tiles = read_tile_file(study.tile_path("a"))
        with (
            open_slide(study.slide_path("a")) as slide,
            pytest.raises(SlideError, match=r"a\.svs: has no level .* tile it again"),
        ):
            read_plan_of(tiles, slide)


def test_the_plan_is_the_one_that_tiling_used(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"a": 3})
    tiles = read_tile_file(study.tile_path("a"))
    with open_slide(study.slide_path("a")) as slide:
        plan = read_plan_of(tiles, slide)
    assert (plan.mpp, plan.tile_px, plan.level, plan.downsample) == (0.5, TILE_PX, 0, 1.0)
    assert plan.extent_l0 == TILE_PX


def test_the_limit_is_the_tilings_own(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"a": 100}, max_unreadable=0.1)
    tiles = read_tile_file(study.tile_path("a"))
    refuse_too_many_unreadable(tiles, 10, ["cause"])
    with pytest.raises(ReadError, match=r"^a: 11 of 100 tiles .*the first cause"):
        refuse_too_many_unreadable(tiles, 11, ["the first cause", "another"])
