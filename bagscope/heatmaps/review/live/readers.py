"""The worker processes that read slides for the viewer: so many, and so many requests waiting."""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from bagscope.cohort.executors.local import LocalExecutor
from bagscope.cohort.executors.protocol import Finished, Work
from bagscope.cohort.jobs import Job
from bagscope.errors import ReadError, UnsupportedSlide
from bagscope.heatmaps.review.live import reader
from bagscope.heatmaps.review.live.reader import SlideAt, SlideFacts, Wanted
from bagscope.heatmaps.review.pyramid import Picture

WORKER_MODULES = (
    "bagscope.heatmaps.review.live.reader",
    "bagscope.wsi.jpegtiff_backend",
    "bagscope.wsi.openslide_backend",
    "openslide",
    "simplejpeg",
    "cv2",
)
_BAD_ENDS = frozenset({"WorkerDied", "WorkerTimeout", "WorkerOutOfMemory"})
_ENDS_BEFORE_REST = 3
_REST_S = 30.0
_PATIENCE_S = 60.0


class TooBusy(Exception):
    """As many requests wait already as may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderLimits:
    """What reading for the viewer may cost.

    Attributes:
        workers: processes.
        waiting: requests that may wait for one of them.
        seconds: that one reading may take.
        memory_mib: that one process may grow to.
    """

    workers: int = 2
    waiting: int = 64
    seconds: float = 20.0
    memory_mib: float = 4096.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a worker answered.

    Attributes:
        jpeg: the picture, empty where facts were wanted.
        whole: whether all of the picture could be read.
        facts: of a slide, None where a picture was wanted.
    """

    jpeg: bytes
    whole: bool
    facts: SlideFacts | None


@dataclass(kw_only=True, slots=True)
class _Request:
    job: Job
    future: Future[Reading]
    jpeg: bytes = b""


@dataclass(kw_only=True, slots=True)
class _Trouble:
    """How often a slide brought its worker to a bad end, and until when it is left alone."""

    ends: int = 0
    until_s: float = 0.0


class SlideReaders:
    """Reads slides in processes of its own; any thread may ask.

    Args:
        limits: of what reading may cost.
        work: what a process does with a wish; a function of an importable module.
    """

    def __init__(self, limits: ReaderLimits | None = None, *, work: Work = reader.answer) -> None:
        self._limits = limits or ReaderLimits()
        self._executor = LocalExecutor(
            pickle.dumps(work),
            module=work.__module__,
            workers=self._limits.workers,
            timeout_s=self._limits.seconds,
            memory_limit_mib=self._limits.memory_mib,
            preload=WORKER_MODULES,
            on_message=self._hear,
        )
        self._lock = threading.Lock()
        self._waiting: deque[_Request] = deque()
        self._running: dict[str, _Request] = {}
        self._trouble: dict[SlideAt, _Trouble] = {}
        self._asked = 0
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="bagscope-readers", daemon=True)
        self._thread.start()

    def ask(self, wanted: Wanted) -> Future[Reading]:
        """Have something read; whoever no longer wants it cancels, and it is never begun.

        The answer is, where it is not a `Reading`, a `ReadError` or an `UnsupportedSlide`.

        Raises:
            TooBusy: try again a little later.
            ReadError: the slide has just killed several workers and is left alone for a while.
        """
        future: Future[Reading] = Future()
        with self._lock:
            if self._closing or len(self._waiting) >= self._limits.waiting:
                raise TooBusy
            trouble = self._trouble.get(wanted.slide)
            if trouble is not None and time.monotonic() < trouble.until_s:
                raise ReadError(
                    f"{wanted.slide.path.name}: reading it failed several times in a row; it is "
                    f"tried again after {_REST_S:g} s"
                )
            self._asked += 1
            # A job is told apart by what the executor calls the slide's id.
            job = Job(slide_id=f"request-{self._asked}", payload=wanted)
            self._waiting.append(_Request(job=job, future=future))
        self._executor.wake()
        return future

    def close(self) -> None:
        """Give up what waits or runs, and come back when no worker is left."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._executor.wake()
        self._thread.join()

    def _serve(self) -> None:
        try:
            while self._start_waiting():
                for finished in self._executor.wait(_PATIENCE_S):
                    self._settle(finished)
        finally:
            with self._lock:
                self._closing = True
            self._executor.close()
            for request in self._waiting:
                request.future.cancel()
            for request in self._running.values():
                request.future.set_exception(TooBusy())

    def _start_waiting(self) -> bool:
        """Give waiting requests to idle workers; tell whether to go on."""
        while True:
            with self._lock:
                if self._closing:
                    return False
                if not self._waiting or self._executor.slots() == 0:
                    return True
                request = self._waiting.popleft()
            if request.future.set_running_or_notify_cancel():
                self._running[request.job.slide_id] = request
                self._executor.start(request.job)

    def _hear(self, job_id: str, jpeg: bytes) -> None:
        self._running[job_id].jpeg = jpeg

    def _settle(self, finished: Finished) -> None:
        request = self._running.pop(finished.slide_id)
        if finished.requeue:
            self._running[finished.slide_id] = request
            self._executor.start(request.job)
            return
        record = finished.record
        self._remember(request.job.payload.slide, record.get("error_class", ""))
        if record["outcome"] == "done":
            request.future.set_result(_reading(request, record["facts"]))
        elif record["error_class"] == UnsupportedSlide.__name__:
            request.future.set_exception(UnsupportedSlide(record["message"]))
        else:
            request.future.set_exception(ReadError(record["message"]))

    def _remember(self, slide: SlideAt, error_class: str) -> None:
        with self._lock:
            if error_class not in _BAD_ENDS:
                self._trouble.pop(slide, None)
                return
            trouble = self._trouble.setdefault(slide, _Trouble())
            trouble.ends += 1
            if trouble.ends >= _ENDS_BEFORE_REST:
                trouble.until_s = time.monotonic() + _REST_S


def _reading(request: _Request, said: Mapping[str, Any]) -> Reading:
    if request.jpeg:
        return Reading(jpeg=request.jpeg, whole=said["whole"], facts=None)
    facts = SlideFacts(**{**said, "picture": Picture(**said["picture"])})
    return Reading(jpeg=b"", whole=True, facts=facts)
