"""The parent's side of the readers: hands out slots, takes filled ones, notices deaths.

A thread of its own does this, so that readers go on while the encoder is at work. Everything that
happens arrives in one queue, in order: a slide's chunks, then its end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from bagscope.cohort.executors.local import LocalExecutor
from bagscope.cohort.executors.protocol import Finished
from bagscope.cohort.jobs import Job
from bagscope.features.reader import STOP_READING, Chunk
from bagscope.features.ring import TileRing

_PUMP_S = 0.5
_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """A slot holds tiles of a slide."""

    slide_id: str
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class ReadingEnded:
    """A reader is done with a slide, well or badly; no more chunks of it follow."""

    finished: Finished


@dataclass(frozen=True, slots=True)
class FeedBroke:
    """The thread itself failed; nothing more will come."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Woken:
    """Somebody wants the waiting thread's attention."""


FeedEvent = ChunkRead | ReadingEnded | FeedBroke | Woken


class SlideFeed:
    """Readers at work and the ring between them and the encoder.

    Args:
        make_executor: makes the readers' pool, given who listens to their messages.
        ring: that the readers fill; closed with the feed.
        post: takes an event, from any thread.
    """

    def __init__(
        self,
        make_executor: Callable[[Callable[[str, bytes], None]], LocalExecutor],
        ring: TileRing,
        post: Callable[[FeedEvent], None],
    ) -> None:
        self.ring = ring
        self._post = post
        self._executor = make_executor(self._hear)
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._free = deque(range(ring.slots))
        self._asking: deque[str] = deque()
        self._granted: dict[str, int] = {}
        self._stopped: set[str] = set()
        self._jobs: dict[str, Job] = {}
        self._is_closing = False
        self._thread = threading.Thread(target=self._pump, name="bagscope-feed", daemon=True)
        self._thread.start()

    def start(self, job: Job) -> None:
        """Have a slide read."""
        self._command(lambda: self._start(job))

    def stop(self, slide_id: str) -> None:
        """Have no more of a slide read; its end is still told."""
        self._command(lambda: self._stopped.add(slide_id))

    def tiles(self, chunk: Chunk) -> NDArray[np.uint8]:
        """Return the tiles of a filled slot, valid until it is released."""
        return self.ring.view(chunk.slot)[: chunk.count]

    def release(self, chunk: Chunk) -> None:
        """Give a slot back for reading."""
        self._command(lambda: self._free.append(chunk.slot))

    def close(self) -> None:
        """Stop the readers, and come back when they are gone."""
        self._is_closing = True
        self._executor.wake()
        self._thread.join(_PATIENCE_S)
        self._executor.close()
        self.ring.close()

    # --- in the thread ------------------------------------------------------------------------

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._executor.wake()

    def _pump(self) -> None:
        try:
            while not self._is_closing:
                self._obey()
                self._grant()
                for finished in self._executor.wait(_PUMP_S):
                    self._end(finished)
        except BaseException as error:
            self._post(FeedBroke(error))

    def _obey(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _start(self, job: Job) -> None:
        self._stopped.discard(job.slide_id)
        self._jobs[job.slide_id] = job
        self._executor.start(job)

    def _grant(self) -> None:
        for _ in range(len(self._asking)):
            slide_id = self._asking.popleft()
            if slide_id in self._stopped:
                self._executor.reply(slide_id, STOP_READING)
            elif self._free:
                slot = self._free.popleft()
                self._granted[slide_id] = slot
                self._executor.reply(slide_id, str(slot).encode())
            else:
                self._asking.append(slide_id)

    def _hear(self, slide_id: str, message: bytes) -> None:
        if not message:
            self._asking.append(slide_id)
            self._grant()
            return
        del self._granted[slide_id]
        self._post(ChunkRead(slide_id, Chunk.from_bytes(message)))

    def _end(self, finished: Finished) -> None:
        slide_id = finished.slide_id
        if finished.requeue:  # its reader was gone before it began
            self._executor.start(self._jobs[slide_id])
            return
        del self._jobs[slide_id]
        if slide_id in self._asking:
            self._asking.remove(slide_id)
        if slide_id in self._granted:
            self._free.append(self._granted.pop(slide_id))
        self._post(ReadingEnded(finished))
