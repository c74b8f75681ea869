"""Readers that come to grief as the slide's id tells them to; workers import them by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from bagscope.cohort.executors import worker
from bagscope.cohort.jobs import Job, StageResult
from bagscope.features.reader import read_slide

THROTTLE_S = 0.15
CRUNCH_S = 0.15


def read_badly(job: Job) -> StageResult:
    """Read a slide, unless its id begins with the name of a disaster.

    `once` disasters leave a mark beside the tile file, and spare the second attempt. All but
    `swell` and `drop` strike when one chunk has been handed over; `drop` dies before that, with a
    slot in its hands.
    """
    kind, _, often = job.slide_id.partition("-")
    mark = job.payload.tile_path.with_suffix(".mark")
    with mark.open("a") as marks:
        marks.write("x")
    is_struck = often.startswith("always") or (often.startswith("once") and _count(mark) == 1)
    if is_struck and kind == "abort":
        _after_first_chunk(os.abort)
    if is_struck and kind == "drop":
        worker.tell = lambda message: os.abort()
    if is_struck and kind == "hang":
        _after_first_chunk(lambda: time.sleep(600))
    if is_struck and kind == "swell":
        held = [bytearray(os.urandom(1024) * 1024 * 16) for _ in range(100)]
        time.sleep(600)
        del held
    if is_struck and kind == "raise":
        _after_first_chunk(_surprise)
    return read_slide(job)


def _count(mark: Path) -> int:
    return mark.stat().st_size


def _surprise() -> None:
    raise ZeroDivisionError("division\nby zero")


def _after_first_chunk(strike: Callable[[], None]) -> None:
    plain = worker.tell

    def tell(message: bytes) -> None:
        worker.tell = plain
        plain(message)
        strike()

    worker.tell = tell


def _reading_with(job: Job, extra: Callable[[], None]) -> StageResult:
    """Read with something added to the reading of every chunk, where the reader's clocks see it."""
    from bagscope.wsi.opening import open_slide

    def opened(*arguments: object, **options: object) -> object:
        slide = open_slide(*arguments, **options)  # type: ignore[arg-type]
        read_tiles = slide.read_tiles

        def slowly(*given: object, **named: object) -> object:
            extra()
            return read_tiles(*given, **named)  # type: ignore[arg-type]

        slide.read_tiles = slowly  # type: ignore[method-assign]
        return slide

    import bagscope.features.reader as reader

    plain, reader.open_slide = reader.open_slide, opened  # type: ignore[assignment]
    try:
        return read_slide(job)
    finally:
        reader.open_slide = plain


def read_throttled(job: Job) -> StageResult:
    """Read as from a slow disk: waiting, without work for the processor."""
    return _reading_with(job, lambda: time.sleep(THROTTLE_S))


def read_crunching(job: Job) -> StageResult:
    """Read as with a costly codec: the processor is at work all the time."""

    def crunch() -> None:
        end_s = time.process_time() + CRUNCH_S
        while time.process_time() < end_s:
            pass

    return _reading_with(job, crunch)
