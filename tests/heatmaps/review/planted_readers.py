"""Workers of the viewer that come to grief; fork servers import them by name."""

from __future__ import annotations

import os
import signal
import time

from bagscope.cohort.executors import worker
from bagscope.cohort.jobs import Job, StageResult
from bagscope.heatmaps.review.live import reader
from bagscope.heatmaps.review.live.reader import TileWanted

SLOW_S = 0.2


def crash_on_tiles(job: Job) -> StageResult:
    """Know the slide, and be killed by the first of its pixels."""
    if isinstance(job.payload, TileWanted):
        os.kill(os.getpid(), signal.SIGSEGV)
    return reader.answer(job)


def hang_on_tiles(job: Job) -> StageResult:
    """Know the slide, and never come back from its pixels."""
    if isinstance(job.payload, TileWanted):
        time.sleep(600)
    return reader.answer(job)


def read_slowly(job: Job) -> StageResult:
    """Take a while, then answer with the number of the process."""
    time.sleep(SLOW_S)
    worker.tell(str(os.getpid()).encode())
    return StageResult(outcome="done", fingerprint="", facts={"whole": True})
