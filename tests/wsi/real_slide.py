"""The real slide that some tests read, where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_slide() -> Path:
    """Return the path of CMU-1-Small-Region (20×, RGB JPEG tiles of 240 px), or skip the test."""
    shared = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("BAGSCOPE_DATA", shared))
    path = folder / "slides" / "cmu-1-small-region.svs"
    if not path.is_file():
        pytest.skip("the real slide is not here; set BAGSCOPE_DATA to the folder that holds it")
    return path
