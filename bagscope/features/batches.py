"""Tiles of many slides into batches of one shape, and their vectors back to where they belong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from bagscope.features.session import EncoderSession, Pending, is_out_of_memory

if TYPE_CHECKING:
    import torch

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True)
class Segment(Generic[Owner]):
    """Rows of one slide in a batch: `count` tiles from `start` on stand at `offset`."""

    owner: Owner
    start: int
    offset: int
    count: int


@dataclass(slots=True)
class _Batch(Generic[Owner]):
    tiles: torch.Tensor
    segments: list[Segment[Owner]]
    filled: int = 0


@dataclass(frozen=True, slots=True)
class Encoded(Generic[Owner]):
    """Vectors (count, D) of consecutive tiles of a slide, from row `start` on."""

    owner: Owner
    start: int
    vectors: NDArray[np.float32]


class Batcher(Generic[Owner]):
    """Fills batches for one session and runs them, one ahead of the one that is collected."""

    def __init__(self, session: EncoderSession) -> None:
        self.session = session
        self._spare: list[torch.Tensor] = []
        self._filling = self._new_batch()
        self._running: tuple[_Batch[Owner], Pending] | None = None

    @property
    def is_full(self) -> bool:
        """Return whether the batch is to be run before more tiles come."""
        return self._filling.filled >= len(self._filling.tiles)

    @property
    def is_idle(self) -> bool:
        """Return whether nothing waits to be encoded or collected."""
        return not self._filling.filled and self._running is None

    def add(self, owner: Owner, start: int, tiles: NDArray[np.uint8]) -> int:
        """Take tiles (n, h, w, 3), rows `start` ... of a slide; return how many found room."""
        batch = self._filling
        count = min(len(tiles), len(batch.tiles) - batch.filled)
        batch.tiles[batch.filled : batch.filled + count].numpy()[...] = tiles[:count]
        batch.segments.append(Segment(owner, start, batch.filled, count))
        batch.filled += count
        return count

    def run(self) -> Iterator[Encoded[Owner]]:
        """Start the batch, padded where it is not full; yield the vectors of the one before."""
        if not self._filling.filled:
            yield from self.flush()
            return
        batch, self._filling = self._filling, self._new_batch()
        batch.tiles[batch.filled :] = 0
        before, self._running = self._running, None
        if len(batch.tiles) > self.session.batch_size:  # shrunk by another line of batches
            yield from self._collect(before)
            yield from self._run_in_parts(batch)
            return
        try:
            self._running = (batch, self.session.submit(batch.tiles))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.session.shrink()
            yield from self._collect(before)
            yield from self._run_in_parts(batch)
            return
        yield from self._collect(before)
        if self.session.device.type != "cuda":
            # It is done already; keeping it would only hold its slides up.
            yield from self.flush()

    def flush(self) -> Iterator[Encoded[Owner]]:
        """Yield the vectors of what is running."""
        running, self._running = self._running, None
        yield from self._collect(running)

    def _collect(self, running: tuple[_Batch[Owner], Pending] | None) -> Iterator[Encoded[Owner]]:
        if running is None:
            return
        batch, pending = running
        vectors = self.session.collect(pending)
        for segment in batch.segments:
            begin = segment.offset
            yield Encoded(segment.owner, segment.start, vectors[begin : begin + segment.count])
        if len(batch.tiles) == self.session.batch_size:
            self._spare.append(batch.tiles)

    def _run_in_parts(self, batch: _Batch[Owner]) -> Iterator[Encoded[Owner]]:
        """Encode a batch that did not fit into memory in smaller ones, from now on the shape."""
        self._spare.clear()
        while True:
            size = self.session.batch_size
            try:
                parts = []
                for begin in range(0, len(batch.tiles), size):
                    tiles = self.session.new_batch()
                    part = batch.tiles[begin : begin + size]
                    tiles[: len(part)] = part
                    parts.append(self.session.encode(tiles)[: len(part)])
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.session.shrink()
        vectors = np.concatenate(parts)
        self._filling = self._new_batch()
        for segment in batch.segments:
            begin = segment.offset
            yield Encoded(segment.owner, segment.start, vectors[begin : begin + segment.count])

    def _new_batch(self) -> _Batch[Owner]:
        while self._spare:
            tiles = self._spare.pop()
            if len(tiles) == self.session.batch_size:
                return _Batch(tiles, [])
        return _Batch(self.session.new_batch(), [])
