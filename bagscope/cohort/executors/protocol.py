"""What the runner asks of whoever carries out the work, and the record that comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from bagscope.cohort.jobs import Job, StageResult

Work = Callable[[Job], StageResult]
"""A module-level function, or a `functools.partial` of one, so that it can be pickled."""

Record = dict[str, Any]
"""JSON: `outcome`, then the fields of a `StageResult`, or error_class, message and traceback; from
a worker also `seconds`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A job that came to its end, good or bad.

    `requeue` is true when the job never began (its worker vanished first); then it has no record.
    """

    slide_id: str
    record: Record
    seconds: float
    host: str
    requeue: bool = False


class Executor(Protocol):
    """Carries out jobs. All methods but `wake` are called from one thread."""

    def slots(self) -> int:
        """Return how many more jobs can be started now."""
        ...

    def size(self) -> int:
        """Return how many jobs can run at a time."""
        ...

    def start(self, job: Job) -> None:
        """Start a job; there must be a slot."""
        ...

    def wait(self, timeout_s: float) -> list[Finished]:
        """Return jobs that ended, at the latest after `timeout_s`; empty when woken."""
        ...

    def wake(self) -> None:
        """Make a running `wait` return at once; safe in a signal handler."""
        ...

    def close(self) -> None:
        """Stop everything that still runs, and come back when it has stopped."""
        ...


def failed(error_class: str, message: str, traceback: str = "") -> Record:
    """Return the record of a job that failed."""
    return {
        "outcome": "failed",
        "error_class": error_class,
        "message": message,
        "traceback": traceback,
    }
