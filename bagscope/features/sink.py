"""Stores vectors while the next batch is encoded: one thread, the files of every slide in hand."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import Queue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagscope.features.feature_file import FeatureWriter

_QUEUE = 16
"""Batches that may wait for the disk before the encoder does."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A feature file is in its place, or could not be written."""

    key: Any
    error: BaseException | None


class FeatureSink:
    """Carries out writes in order, in a thread; tells the end of each file through `post`."""

    def __init__(self, post: Callable[[Stored], None]) -> None:
        self._post = post
        self._queue: Queue[Callable[[], None] | None] = Queue(_QUEUE)
        self._broken: weakref.WeakSet[FeatureWriter] = weakref.WeakSet()
        self._thread = threading.Thread(target=self._work, name="bagscope-sink", daemon=True)
        self._thread.start()

    def write(
        self, key: Any, writer: FeatureWriter, start: int, vectors: NDArray[np.float32]
    ) -> None:
        """Write rows of a file; waits while too many writes are due."""
        self._queue.put(lambda: self._guard(key, writer, lambda: writer.write(start, vectors)))

    def finish(self, key: Any, writer: FeatureWriter, readable: NDArray[np.bool_] | None) -> None:
        """Put a file in its place after all writes so far; `Stored` follows."""

        def finish() -> None:
            writer.finish(readable)
            self._post(Stored(key, None))

        self._queue.put(lambda: self._guard(key, writer, finish))

    def discard(self, writer: FeatureWriter) -> None:
        """Remove an unfinished file."""

        def discard() -> None:
            self._broken.add(writer)
            writer.discard()

        self._queue.put(discard)

    def close(self) -> None:
        """Carry out what is due, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            task()

    def _guard(self, key: Any, writer: FeatureWriter, task: Callable[[], None]) -> None:
        """Tell of an error once; a broken file takes no more."""
        if writer in self._broken:
            return
        try:
            task()
        except Exception as error:
            self._broken.add(writer)
            self._post(Stored(key, error))
