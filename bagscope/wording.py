"""Counts and lists as they stand in sentences."""

from __future__ import annotations

from collections.abc import Sequence

MOST_LISTED = 10
"""More names than this are no help in a sentence."""


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts, a regular noun: "1 slide", "1,200 slides"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def listed(names: Sequence[str], most: int = MOST_LISTED) -> str:
    """Return names separated by commas, the first of them where there are many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
