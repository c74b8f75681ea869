"""Where the time of an extraction went, in one table and one sentence."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Phase = Literal["waiting", "transfer", "encoding", "writing"]

BOUNDS = ("reading", "decoding", "transfer", "encoding", "writing")
_NOUNS = {
    "reading": "reading (disk or network)",
    "decoding": "decoding",
    "transfer": "transfer",
    "encoding": "encoder",
    "writing": "writing",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of wall-clock time by what the run was waiting for.

    Attributes:
        reading_s: for bytes of slides.
        decoding_s: for readers to make tiles of bytes.
        transfer_s: for tiles to be laid out for the encoder.
        encoding_s: for the encoder.
        writing_s: for vectors to be stored.
        other_s: for everything else: opening, claims, status.
        total_s: in all.
        tiles: encoded, summed over encoders.
    """

    reading_s: float
    decoding_s: float
    transfer_s: float
    encoding_s: float
    writing_s: float
    other_s: float
    total_s: float
    tiles: int

    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase, the longest first."""
        found = {name: float(getattr(self, f"{name}_s")) for name in BOUNDS}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def sentence(self) -> str:
        """Return what the run was bound by: "bound by: encoder (93 %)"."""
        if not self.tiles or self.total_s <= 0:
            return "nothing was encoded"
        name, seconds = next(iter(self.seconds().items()))
        return f"bound by: {_NOUNS[name]} ({seconds / self.total_s:.0%})"


class Ledger:
    """Keeps the time of the one thread that everything passes through."""

    def __init__(self) -> None:
        self._begin_s = time.perf_counter()
        self._spent: dict[Phase, float] = {
            "waiting": 0.0, "transfer": 0.0, "encoding": 0.0, "writing": 0.0
        }  # fmt: skip
        self._blocked_s = 0.0
        self._working_s = 0.0
        self.tiles = 0

    @contextlib.contextmanager
    def spending(self, phase: Phase) -> Iterator[None]:
        """Count the time of the block to a phase."""
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self._spent[phase] += time.perf_counter() - begin_s

    def add_reader(self, *, wall_s: float, working_s: float) -> None:
        """Note how long a reader took for a chunk, and how much of it was work."""
        self._working_s += working_s
        self._blocked_s += max(0.0, wall_s - working_s)

    def timing(self) -> Timing:
        """Return the account so far."""
        total_s = time.perf_counter() - self._begin_s
        read_s = self._blocked_s + self._working_s
        blocked = self._blocked_s / read_s if read_s > 0 else 0.0
        waiting_s = self._spent["waiting"]
        spent = sum(self._spent.values())
        return Timing(
            reading_s=waiting_s * blocked,
            decoding_s=waiting_s * (1 - blocked),
            transfer_s=self._spent["transfer"],
            encoding_s=self._spent["encoding"],
            writing_s=self._spent["writing"],
            other_s=max(0.0, total_s - spent),
            total_s=total_s,
            tiles=self.tiles,
        )
