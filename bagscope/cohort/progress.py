"""What a cohort run tells while it goes on; who listens decides how it looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from bagscope.artifacts import Json
from bagscope.cohort.jobs import RunReport
from bagscope.cohort.status import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        finished: slides with an outcome.
        total: slides of this run.
        failed: of the finished ones.
        tiles: tiles of the slides made in this run (not of those found made).
        seconds: since the run started.
        tiles_per_s: rate of this run; 0 before the first slide is done.
        left_s: estimated seconds to the end; None while nothing can be said.
    """

    finished: int
    total: int
    failed: int
    tiles: int
    seconds: float
    tiles_per_s: float
    left_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    """A run begins."""

    stage: str
    total: int
    workers: int
    shard: tuple[int, int] | None = None
    noun: str = "slide"


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideStarted:
    """A worker took a slide."""

    stage: str
    slide_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideTold:
    """A worker tells how far it is, in one line and as facts."""

    stage: str
    slide_id: str
    text: str
    facts: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideFinished:
    """A slide has its outcome."""

    stage: str
    slide_id: str
    outcome: Outcome
    seconds: float
    progress: Progress
    facts: Mapping[str, Json] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error_class: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunWaiting:
    """Nothing is left but slides that other processes work on."""

    stage: str
    slide_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFinished:
    """A run ended, or was interrupted."""

    report: RunReport


Event = RunStarted | SlideStarted | SlideTold | SlideFinished | RunWaiting | RunFinished


class Reporter(Protocol):
    """Whoever listens to a run."""

    def emit(self, event: Event) -> None:
        """Take notice of an event; called from the thread that runs the cohort."""
        ...


class SilentReporter:
    """Listens and says nothing."""

    def emit(self, event: Event) -> None:
        """Do nothing."""


def estimate_left_s(
    seconds: float, *, made_weight: float, found_weight: float, left_weight: float
) -> float | None:
    """Return the estimated seconds to the end of a run.

    Slides found made cost next to nothing, so the pace is that of the slides made in this run, as
    long as there are any; how many of those to come are already made is not known, so the estimate
    errs on the long side when a run is resumed.

    Args:
        seconds: since the run started.
        made_weight: of slides made, or failed, in this run.
        found_weight: of slides that were found made.
        left_weight: of slides to come.
    """
    if left_weight <= 0:
        return 0.0
    if made_weight > 0:
        return seconds * left_weight / made_weight
    return seconds * left_weight / found_weight if found_weight > 0 else None
