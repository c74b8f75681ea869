"""Scanning one slide inside a worker process."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from bagscope.artifacts import Json, fingerprint
from bagscope.cohort.jobs import StageResult
from bagscope.errors import SlideError
from bagscope.pipeline.scan import ScanTask
from bagscope.pipeline.tile import scene_of
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.lattice import spread_sample
from bagscope.wsi.opening import open_slide, stored_faults_l0
from bagscope.wsi.slide import Slide
from bagscope.wsi.tiles import TiledSlide, tile_slide

TIMED_TILES = 48


def scan_task(task: ScanTask) -> StageResult:
    """Return the facts of one slide; a problem with its tiles is a fact too."""
    identity = fingerprint(slide_identity(task.path))
    with open_slide(
        task.path,
        mpp=task.mpp,
        backend=task.backend,
        allow_estimated_mpp=task.spec.allow_estimated_mpp,
        scene=scene_of(task.slide_id),
    ) as slide:
        info = slide.info
        facts: dict[str, Json] = {
            "format": info.format,
            "backend": info.backend,
            "width_px": info.width_l0,
            "height_px": info.height_l0,
            "levels": len(info.levels),
            "mpp": info.spacing.mpp if info.spacing else "",
            "mpp_source": info.spacing.source if info.spacing else "",
            "objective": info.objective if info.objective is not None else "",
            "file_mib": round(_bytes_of(task.path) / 2**20, 2),
        }
        warnings = info.warnings
        try:
            tiled = tile_slide(slide, task.spec, faults_l0=tuple(stored_faults_l0(slide)))
        except SlideError as error:
            facts["problem"] = str(error)
        else:
            warnings = tiled.warnings
            facts |= _tile_facts(slide, tiled)
    return StageResult(outcome="done", fingerprint=identity, facts=facts, warnings=warnings)


def _tile_facts(slide: Slide, tiled: TiledSlide) -> dict[str, Json]:
    tissue = tiled.tissue_map.tissue
    facts: dict[str, Json] = {
        "tiles": len(tiled.tiles),
        "tissue_fraction": round(float(tissue.mean()), 4),
        "tissue_mm2": round(np.count_nonzero(tissue) * tiled.overview.mpp**2 / 1e6, 2),
    }
    if len(tiled.tiles) == 0:
        facts["problem"] = tiled.warnings[-1]
        return facts
    chosen = spread_sample(tiled.tiles.grid, TIMED_TILES, seed=0)
    started = time.perf_counter()
    batch = slide.read_tiles(tiled.tiles.coords_l0[chosen], tiled.tiles.plan)
    facts["read_tiles_per_s"] = round(len(chosen) / (time.perf_counter() - started), 1)
    if not batch.readable.all():
        bad = int(np.count_nonzero(~batch.readable))
        facts["problem"] = f"{bad} of {len(chosen)} tiles tried can't be read ({batch.problems[0]})"
    return facts


def _bytes_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(member.stat().st_size for member in path.rglob("*") if member.is_file())
