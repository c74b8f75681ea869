"""Tiling one slide inside a worker process: everything between its path and its artefacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bagscope import artifacts
from bagscope.artifacts import Json, fingerprint, sha256_of_file
from bagscope.cohort.jobs import StageResult
from bagscope.errors import ArtifactError, SlideError
from bagscope.pipeline.tile import TileTask, scene_of
from bagscope.wsi import geojson, overlay, roi
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.opening import open_slide, stored_faults_l0
from bagscope.wsi.outline import MaskFrame, masks_from_regions, regions_of
from bagscope.wsi.overview import Overview, read_overview
from bagscope.wsi.slide import Slide
from bagscope.wsi.spacing import require_spacing
from bagscope.wsi.tile_export import export
from bagscope.wsi.tile_file import (
    TileFileRecord,
    read_tile_file,
    read_tile_record,
    write_tile_file,
)
from bagscope.wsi.tiles import TiledSlide, TileSet, plan_for, refuse_if_unreadable, tile_slide
from bagscope.wsi.tiling import NUMERICS, tiling_name
from bagscope.wsi.tissue import METHOD, TissueMap


@dataclass(frozen=True, kw_only=True, slots=True)
class _FramedMasks:
    """The masks of a slide and where they lie on it, as outlines are drawn of."""

    tissue: NDArray[np.bool_]
    pen: NDArray[np.bool_]
    fold: NDArray[np.bool_]
    frame: MaskFrame


def tile_task(task: TileTask) -> StageResult:
    """Tile one slide, unless an artefact with the same fingerprint is there already.

    Raises:
        FingerprintMismatch: the artefact was made from another slide or with other annotations.
        SlideError: the slide can't be tiled.
    """
    cv2.setNumThreads(task.threads)
    edited = _own_annotation(task, task.annotations.masks)
    region_file = _own_annotation(task, task.annotations.roi)
    fields = _fingerprint_fields(task, edited, region_file)
    path = _tile_path(task, task.spec.mpp)
    existing = _existing_record(path)
    if existing and existing.fingerprint == fingerprint(fields) and _all_there(task):
        tiles_made = False
        summary: Mapping[str, Json] = existing.summary
    else:
        if existing and not task.overwrite:
            artifacts.require_same(
                existing.fields, fields, what=str(path), remedy="replace it with --overwrite"
            )
        tiles_made = True
        with _open(task) as slide:
            tiled = _tile(slide, task, edited, region_file)
        summary = _summary(tiled)
        _write(task, tiled, fields, summary, existing, edited)
    exported = _export(task, fields)
    done = tiles_made or exported
    return StageResult(
        outcome="done" if done else "skipped",
        fingerprint=fingerprint(fields),
        content_hash=sha256_of_file(path),
        facts={name: value for name, value in summary.items() if name != "warnings"},
        warnings=tuple(summary["warnings"]),
    )


def _fingerprint_fields(
    task: TileTask, edited: Path | None, region_file: Path | None
) -> dict[str, Json]:
    annotated = edited is not None or region_file is not None
    return {
        "stage": "tile",
        "numerics": NUMERICS,
        "tissue_method": METHOD,
        "spec": task.spec.model_dump(mode="json"),
        "slide": slide_identity(task.path),
        "scene": scene_of(task.slide_id),
        "mpp_override": task.mpp,
        "mask_sha256": sha256_of_file(edited) if edited else None,
        "roi_sha256": sha256_of_file(region_file) if region_file else None,
        "annotation_frame": task.annotations.frame if annotated else None,
    }


def _open(task: TileTask) -> Slide:
    return open_slide(
        task.path,
        mpp=task.mpp,
        backend=task.backend,
        allow_estimated_mpp=task.spec.allow_estimated_mpp,
        scene=scene_of(task.slide_id),
    )


def _tile(
    slide: Slide, task: TileTask, edited_file: Path | None, region_file: Path | None
) -> TiledSlide:
    spacing = require_spacing(slide.info)
    overview = read_overview(slide, spacing.mpp, threads=task.threads)
    edited = None
    if edited_file is not None:
        regions = geojson.read_regions(
            edited_file,
            bounds_l0=slide.info.bounds_l0,
            default_frame=task.annotations.frame,
        )
        tissue, pen, fold = masks_from_regions(regions, overview.frame)
        edited = TissueMap(
            tissue=tissue & overview.readable,
            pen=pen,
            fold=fold,
            mpp=overview.mpp,
            background=slide.info.background,
        )
    allowed = _allowed(slide, task, overview, region_file)
    return tile_slide(
        slide,
        task.spec,
        allowed=allowed,
        edited=edited,
        overview=overview,
        faults_l0=tuple(stored_faults_l0(slide)),
        threads=task.threads,
    )


def _allowed(
    slide: Slide, task: TileTask, overview: Overview, region_file: Path | None
) -> NDArray[np.bool_] | None:
    if region_file is None:
        if task.annotations.roi is not None:
            raise SlideError(
                f"{task.slide_id}: no annotation file for it in {task.annotations.roi.name}; add "
                f"{task.slide_id}.geojson, or leave the slide out of the cohort"
            )
        return None
    bounds_l0 = slide.info.bounds_l0
    regions = geojson.read_regions(
        region_file, bounds_l0=bounds_l0, default_frame=task.annotations.frame
    )
    roi.require_inside(regions, bounds_l0, slide_name=task.slide_id, file_name=region_file.name)
    chosen = task.spec.roi
    selection = roi.RoiSelection(include=chosen.include, exclude=chosen.exclude)
    allowed: NDArray[np.bool_] = roi.allowed_mask(regions, selection, overview.frame) >= 0.5
    return allowed


def _own_annotation(task: TileTask, source: Path | None) -> Path | None:
    return roi.load(source, task.slide_id) if source is not None else None


# --- artefacts ------------------------------------------------------------------------------


def _tile_path(task: TileTask, mpp: float) -> Path:
    return task.tilings_folder / tiling_name(task.spec, mpp) / f"{task.slide_id}.h5"


def _outline_path(task: TileTask) -> Path:
    folder = task.tilings_folder / tiling_name(task.spec) / "masks"
    return folder / f"{task.slide_id}.geojson"


def _existing_record(path: Path) -> TileFileRecord | None:
    """Return what an existing tile file says of itself; None where there is none to trust."""
    if not path.exists():
        return None
    try:
        return read_tile_record(path)
    except ArtifactError:
        # A damaged artefact is no reason to stop: it is made again.
        return None


def _all_there(task: TileTask) -> bool:
    """Return whether the files that are written before the tile file are still there."""
    coarser = all(_tile_path(task, mpp).exists() for mpp in task.spec.coarser_mpp)
    outline = _outline_path(task)
    return coarser and outline.exists() and outline.with_suffix(".jpg").exists()


def _write(
    task: TileTask,
    tiled: TiledSlide,
    fields: dict[str, Json],
    summary: Mapping[str, Json],
    existing: TileFileRecord | None,
    edited: Path | None,
) -> None:
    """Write outlines, picture and tile files; the finest tile file comes last and vouches."""
    frame = tiled.overview.frame
    masks = tiled.tissue_map
    regions = regions_of(
        _FramedMasks(tissue=masks.tissue, pen=masks.pen, fold=masks.fold, frame=frame)
    )
    outline = geojson.dump_regions(
        regions, bounds_l0=tiled.tiles.info.bounds_l0, slide_name=task.slide_id
    )
    outline_path = _outline_path(task)
    given_back = edited is not None and edited.resolve() == outline_path.resolve()
    if not given_back:
        _refuse_to_lose_edits(outline_path, outline, existing)
        artifacts.write_text(outline_path, outline)
    picture = overlay.encode_overview(
        tiled.overview.rgb,
        masks.tissue,
        masks.pen,
        masks.fold,
        frame,
        mpp=tiled.overview.mpp,
        tiles=overlay.KeptTiles(
            corners_l0=tiled.tiles.coords_l0, extent_l0=tiled.tiles.plan.extent_l0
        ),
    )
    artifacts.write_bytes(outline_path.with_suffix(".jpg"), picture)
    tiles: TileSet | None = tiled.tiles
    chain = []
    while tiles is not None:
        chain.append(tiles)
        tiles = tiles.coarser
    for tiles in reversed(chain):
        write_tile_file(
            _tile_path(task, tiles.plan.mpp),
            tiles,
            slide_id=task.slide_id,
            fields=fields,
            tissue_method=METHOD if edited is None else "edited",
            outline_geojson=outline,
            summary=summary,
        )


def _refuse_to_lose_edits(path: Path, outline: str, existing: TileFileRecord | None) -> None:
    """Refuse to overwrite an outline that somebody changed after it was written."""
    if not path.exists():
        return
    written = {outline} | ({existing.outline_geojson} if existing else set())
    if existing is not None and path.read_text(encoding="utf-8") not in written:
        raise ArtifactError(
            f"{path}: was edited since it was written, and would be overwritten; use the edited "
            f"masks with --masks {path.parent.name}, or remove the file"
        )


def _summary(tiled: TiledSlide) -> dict[str, Json]:
    tiles, masks = tiled.tiles, tiled.tissue_map
    dropped = dict(tiles.dropped)
    judged = len(tiles) + dropped.get("blurred", 0)
    tissue_px = int(np.count_nonzero(masks.tissue))
    return {
        "tiles": len(tiles),
        "dropped": dropped,
        "tissue_fraction": round(tissue_px / masks.tissue.size, 5),
        "pen_fraction": round(float(masks.pen.mean()), 5),
        "fold_fraction": round(int(np.count_nonzero(masks.fold)) / max(1, tissue_px), 5),
        "blurred_fraction": round(dropped.get("blurred", 0) / max(1, judged), 5),
        "fragments": _fragments(masks.tissue),
        "mpp_l0": tiles.spacing.mpp,
        "mpp_source": tiles.spacing.source,
        "mpp_effective": tiles.plan.mpp_effective,
        "width_l0": tiles.info.width_l0,
        "height_l0": tiles.info.height_l0,
        "warnings": list(tiled.warnings),
    }


def _fragments(tissue: NDArray[np.bool_]) -> int:
    return int(cv2.connectedComponents(tissue.view(np.uint8))[0]) - 1


# --- export ---------------------------------------------------------------------------------


def _export(task: TileTask, fields: Mapping[str, Json]) -> bool:
    """Write the tiles' pixels where that is asked for; return whether anything was written.

    The record beside them is written last and carries the tiling's fingerprint.
    """
    wanted = task.export
    if wanted is None:
        return False
    record_path = wanted.folder / f"{task.slide_id}.json"
    record: dict[str, Json] = {"fingerprint": fingerprint(fields), "layout": wanted.layout}
    if record_path.exists() and not task.overwrite:
        stored = artifacts.read_json(record_path)
        artifacts.require_same(
            {key: stored.get(key) for key in record},
            record,
            what=str(record_path.with_suffix("")),
            remedy="replace it with --overwrite, or export into another folder",
        )
        return False
    suffix = ".tar" if wanted.layout == "tar" else ""
    with _open(task) as slide:
        written, unreadable = export(
            slide,
            read_tile_file(_tile_path(task, task.spec.mpp)).coords_l0,
            plan_for(slide.info, require_spacing(slide.info), task.spec, task.spec.mpp),
            wanted.folder / f"{task.slide_id}{suffix}",
            slide_id=task.slide_id,
            layout=wanted.layout,
            downscale="dct" if task.spec.downscale == "dct" else "area",
            threads=task.threads,
            fields=record,
        )
    refuse_if_unreadable(unreadable, written, task.spec.max_unreadable)
    artifacts.write_json(record_path, {**record, "tiles": written, "unreadable": unreadable})
    return True
