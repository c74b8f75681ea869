"""Splits: which cases teach, which choose, and which are only ever asked at the end."""

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
