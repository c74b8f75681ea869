"""What was made once and may be asked again, within a bound of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable


class ByteCache:
    """The bytes most lately asked for, together never more than `most_bytes`."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()

    def get(self, key: Hashable) -> bytes | None:
        """Return what is kept under a key, None if nothing is."""
        content = self._kept.get(key)
        if content is not None:
            self._kept.move_to_end(key)
        return content

    def put(self, key: Hashable, content: bytes) -> None:
        """Keep bytes; those not asked for longest make room, and what is too large is not kept."""
        before = self._kept.pop(key, None)
        if before is not None:
            self.held_bytes -= len(before)
        if len(content) > self.most_bytes:
            return
        self._kept[key] = content
        self.held_bytes += len(content)
        while self.held_bytes > self.most_bytes:
            self.held_bytes -= len(self._kept.popitem(last=False)[1])
