"""What workers need imported before they start. Imports nothing, so that the entry can read it."""

from __future__ import annotations

WORKER_MODULES = (
    "bagscope.pipeline.tile_worker",
    "bagscope.pipeline.scan_worker",
    "bagscope.features.reader",
    "bagscope.wsi.jpegtiff_backend",
    "bagscope.wsi.openslide_backend",
    "openslide",
    "simplejpeg",
)
"""Modules of slide-reading stages, with what they would otherwise import at the first slide."""
VERBS = frozenset({"tile", "scan", "extract", "run", "demo"})
"""Commands that start such workers."""
