"""Slides that look like tissue and of which everything is known. See docs/architecture.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bagscope.wsi.synthetic.cohort import plan_cohort, write_cohort
    from bagscope.wsi.synthetic.faults import (
        corrupt_tile_copy,
        missing_tile_copy,
        truncated_copy,
        zero_byte_file,
    )
    from bagscope.wsi.synthetic.slide import write_slide
    from bagscope.wsi.synthetic.spec import SyntheticSpec, SyntheticTruth

__all__ = [
    "SyntheticSpec",
    "SyntheticTruth",
    "corrupt_tile_copy",
    "missing_tile_copy",
    "plan_cohort",
    "truncated_copy",
    "write_cohort",
    "write_slide",
    "zero_byte_file",
]

_HOMES = {
    "SyntheticSpec": "spec",
    "SyntheticTruth": "spec",
    "corrupt_tile_copy": "faults",
    "missing_tile_copy": "faults",
    "plan_cohort": "cohort",
    "truncated_copy": "faults",
    "write_cohort": "cohort",
    "write_slide": "slide",
    "zero_byte_file": "faults",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
