"""How a conversion ended: one outcome per slide, and the loop that keeps slides apart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from bagscope.cohort.status import OUTCOMES, Outcome
from bagscope.errors import BagscopeError

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideOutcome:
    """What became of one slide; `error_class` and `message` are empty unless it failed."""

    slide_id: str
    outcome: Outcome
    tiles: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    error_class: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """How a conversion ended.

    Attributes:
        layout: that was read or written.
        outcomes: in order of slide id.
        notes: sentences on what concerns no single slide.
    """

    layout: str
    outcomes: tuple[SlideOutcome, ...]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[Outcome, int]:
        """Return slides by outcome."""
        counted = Counter(found.outcome for found in self.outcomes)
        return {outcome: counted[outcome] for outcome in OUTCOMES}

    @property
    def failures(self) -> tuple[SlideOutcome, ...]:
        """Return the slides that failed."""
        return tuple(found for found in self.outcomes if found.outcome == "failed")


OnSlide = Callable[[SlideOutcome], None]


def each_slide(
    items: Sequence[tuple[str, Item]],
    convert: Callable[[Item], SlideOutcome],
    on_slide: OnSlide | None,
) -> list[SlideOutcome]:
    """Convert (slide id, item) one by one; an error ends its own slide and no other."""
    outcomes = []
    for slide_id, item in items:
        started = time.perf_counter()
        try:
            outcome = convert(item)
        except BagscopeError as error:
            outcome = SlideOutcome(
                slide_id=slide_id,
                outcome="failed",
                error_class=type(error).__name__,
                message=str(error),
            )
        outcome = replace(outcome, seconds=time.perf_counter() - started)
        outcomes.append(outcome)
        if on_slide is not None:
            on_slide(outcome)
    return outcomes
