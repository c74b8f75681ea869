"""How HDF5 files get to disk: written into memory first, and then like any other file."""

from __future__ import annotations

import os
from pathlib import Path

from bagscope.artifacts import step


class SparseImage:
    """A file in memory that HDF5 writes as if to disk; what it only makes room for takes none.

    Written straight to a full disk, HDF5 fails where nobody can catch it, and crashes as the
    process ends. An image is put on disk by `write_to`, which fails like any other write.
    """

    _PAGE = 1 << 16

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._size = 0
        self._place = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place in the file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def write(self, content: bytes | memoryview) -> int:
        """Write at the place."""
        rest = memoryview(content).cast("B")
        length = len(rest)
        while rest:
            number, begin = divmod(self._place, self._PAGE)
            page = self._pages.setdefault(number, bytearray(self._PAGE))
            piece = rest[: self._PAGE - begin]
            page[begin : begin + len(piece)] = piece
            self._place += len(piece)
            rest = rest[len(piece) :]
        if length:
            self._size = max(self._size, self._place)
        return length

    def read(self, count: int) -> bytes:
        """Read from the place on; zeros where nothing was written."""
        found = bytearray(count)
        self.readinto(found)
        return bytes(found)

    def readinto(self, target: bytearray | memoryview) -> int:
        """Read from the place on; zeros where nothing was written."""
        rest = memoryview(target).cast("B")
        length = len(rest)
        while rest:
            number, begin = divmod(self._place, self._PAGE)
            piece = self._pages.get(number, bytearray(self._PAGE))[begin : begin + len(rest)]
            rest[: len(piece)] = piece
            self._place += len(piece)
            rest = rest[len(piece) :]
        return length

    def truncate(self, size: int) -> int:
        """Set the file's size."""
        self._size = size
        return size

    def flush(self) -> None:
        """Do nothing: it is in memory."""

    def write_to(self, path: Path) -> None:
        """Write the image to a new file; what was never written stays a hole.

        Raises:
            OSError: the disk is full.
        """
        with path.open("xb", buffering=0) as handle:
            for number, page in sorted(self._pages.items()):
                rest = memoryview(page)[: max(0, self._size - number * self._PAGE)]
                handle.seek(number * self._PAGE)
                while rest:
                    rest = rest[handle.write(rest) :]
                if not number:
                    step("mid-write")
            handle.truncate(self._size)
