"""Counts and lists as they stand in sentences."""

from __future__ import annotations

from collections.abc import Sequence

MOST_LISTED = 10
"""More names than this are no help in a sentence."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number and what it counts: "1 slide", "1,200 slides"; `plural` where no s does."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def listed(names: Sequence[str], most: int = MOST_LISTED) -> str:
    """Return names separated by commas, the first of them where there are many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
