"""Splits: which cases teach, which choose, and which are only ever asked at the end.

Names are imported on first use: a study reads `SplitSpec`, and needs no NumPy for that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagscope.mil.splits.checking import SplitFindings, check_splits, examine_splits
    from bagscope.mil.splits.duplicates import SharedTiles, judge_shared_tiles, shared_tiles
    from bagscope.mil.splits.files import read_splits, write_splits
    from bagscope.mil.splits.making import make_splits
    from bagscope.mil.splits.plan import Method, Side, Split, SplitPlan, SplitSpec

__all__ = [
    "Method",
    "SharedTiles",
    "Side",
    "Split",
    "SplitFindings",
    "SplitPlan",
    "SplitSpec",
    "check_splits",
    "examine_splits",
    "judge_shared_tiles",
    "make_splits",
    "read_splits",
    "shared_tiles",
    "write_splits",
]

_HOMES = {
    "checking": ("SplitFindings", "check_splits", "examine_splits"),
    "duplicates": ("SharedTiles", "judge_shared_tiles", "shared_tiles"),
    "files": ("read_splits", "write_splits"),
    "making": ("make_splits",),
    "plan": ("Method", "Side", "Split", "SplitPlan", "SplitSpec"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
