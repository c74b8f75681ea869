"""Room for tiles that readers fill and the encoder empties: shared memory of fixed size.

The memory has no name that could outlive the processes: on Linux it is reached through the
descriptor of the process that made it, elsewhere through a temporary file that goes with it.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import ConfigError


class TileRing:
    """A number of slots, each with room for `rows` tiles of `tile_px`."""

    def __init__(self, *, slots: int, rows: int, tile_px: int) -> None:
        self.slots, self.rows, self.tile_px = slots, rows, tile_px
        self._file: tempfile._TemporaryFileWrapper[bytes] | None = None
        size = slots * slot_bytes(rows, tile_px)
        if sys.platform == "linux":
            self._descriptor = os.memfd_create("bagscope-tiles")
            self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="bagscope-tiles-")  # noqa: SIM115
            self._descriptor, self.path = self._file.fileno(), self._file.name
        try:
            os.ftruncate(self._descriptor, size)
            if hasattr(os, "posix_fallocate"):
                # Better an error now than a crash when a page turns out not to be there.
                os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            self._release()
            raise ConfigError(
                f"{size >> 20} MiB of shared memory could not be had ({error.strerror}); use "
                "fewer --workers"
            ) from error
        self._views = _mapped(self._descriptor, size, slots, rows, tile_px)

    def view(self, slot: int) -> NDArray[np.uint8]:
        """Return a slot: (rows, tile_px, tile_px, 3) uint8."""
        view: NDArray[np.uint8] = self._views[slot]
        return view

    def close(self) -> None:
        """Give the memory back as soon as nobody looks at it any more."""
        del self._views
        self._release()

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            os.close(self._descriptor)


class RingWindow:
    """A reader's view of a ring that another process made."""

    def __init__(self, path: str, *, slots: int, rows: int, tile_px: int) -> None:
        descriptor = os.open(path, os.O_RDWR)
        try:
            size = slots * slot_bytes(rows, tile_px)
            self._views = _mapped(descriptor, size, slots, rows, tile_px)
        finally:
            os.close(descriptor)

    def view(self, slot: int, count: int) -> NDArray[np.uint8]:
        """Return the first `count` tiles of a slot: (count, tile_px, tile_px, 3) uint8."""
        view: NDArray[np.uint8] = self._views[slot, :count]
        return view

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._views


def slot_bytes(rows: int, tile_px: int) -> int:
    """Return how many bytes the tiles of a slot take."""
    return rows * tile_px * tile_px * 3


def _mapped(descriptor: int, size: int, slots: int, rows: int, tile_px: int) -> NDArray[np.uint8]:
    memory = mmap.mmap(descriptor, size)
    return np.frombuffer(memory, np.uint8).reshape(slots, rows, tile_px, tile_px, 3)
