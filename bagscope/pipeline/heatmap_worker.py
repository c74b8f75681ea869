"""Drawing one slide inside a worker process: everything between its scores and its files."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.cohort.jobs import StageResult
from bagscope.errors import SchemaError
from bagscope.heatmaps.bag_scores import slides_of_bag
from bagscope.heatmaps.choices import GalleryOptions, Shows
from bagscope.heatmaps.gallery import GalleryPart, open_as_tiled, write_gallery
from bagscope.heatmaps.geojson import write_geojson
from bagscope.heatmaps.judgement import Judgement, agreement_text, judgement_of
from bagscope.heatmaps.layers import (
    ROLLOUT,
    LayerKind,
    contribution_columns,
    has_disagreement,
    layer_values,
    score_columns,
)
from bagscope.heatmaps.ome_tiff import Content, write_ome_tiff
from bagscope.heatmaps.ome_zarr import write_ome_zarr
from bagscope.heatmaps.overview import Caption, draw_overview, picture_frame, slide_picture
from bagscope.heatmaps.scores import Column, scales_for
from bagscope.heatmaps.table import write_table
from bagscope.heatmaps.tile_places import TilePlaces, places_of, require_same_slide
from bagscope.mil.score_file import ScoreFile, read_score_file
from bagscope.pipeline.heatmap import HeatmapTask
from bagscope.pipeline.tile import scene_of
from bagscope.pipeline.tiled_slide import find_tiling, require_tiled_slide
from bagscope.wsi.geojson_parse import parse_features
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.opening import open_slide
from bagscope.wsi.outline import TISSUE, Region
from bagscope.wsi.tile_file import TileFile

NUMERICS = 2
"""Raised by hand, with a changelog line, when the same scores would be drawn differently."""

GALLERY = "gallery"
SHOW_PIXELS = frozenset({"png", "svg", GALLERY})

Measured = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A slide's heatmap before it is written.

    Attributes:
        values: (n,) that are drawn, on the scale of the task's colours.
        measured: (n,) by name, of every scale and column that there is.
        judgement: whether the heatmap can be believed.
        tissue: its outline, where the tiling is there.
    """

    task: HeatmapTask
    file: ScoreFile
    places: TilePlaces
    values: NDArray[np.float64]
    measured: Measured
    judgement: Judgement
    tissue: Sequence[Region]

    @property
    def facts(self) -> dict[str, float]:
        """Return what tables and regions say of the heatmap as a whole; NaN where not known."""
        score = self.judgement.score
        return {
            "faithfulness": math.nan if score is None else score,
            "faithfulness_warning": float(bool(self.judgement.warning)),
        }


def heatmap_task(task: HeatmapTask) -> StageResult:
    """Draw one slide, unless it was drawn so already.

    A heatmap that lacks a format, or was drawn without its slide, is drawn again with all of them.

    Raises:
        FingerprintMismatch: it was drawn otherwise.
        SlideError: the slide is not the file that was tiled, or can't be read.
        ArtifactError: scores that are damaged, or no numbers.
    """
    file = read_score_file(task.scores)
    places = places_of(file.coords_l0, file.grid, file.tile, len(file.scores))
    slide = task.slide if task.slide is not None and task.slide.exists() else None
    if not places.is_slide:
        slide = None
    tiles = find_tiling(task.tilings, task.slide_id, file.coords_l0)
    if slide is not None and SHOW_PIXELS.intersection(task.formats):
        require_tiled_slide(slide, tiles, task.slide_id)
    fields = _fields(task, file, slide, tiles)
    stored = _stored(task.target)
    facts: dict[str, Json] = {"tiles": len(places)}
    warnings = list(places.notes)
    if slide is None and GALLERY in task.formats:
        warnings.append(f"no gallery: {_where_it_is_not(task, places)}")
    if stored is not None and not task.overwrite:
        fields = _grown(fields, stored)
        artifacts.require_same(
            _compared(stored, fields),
            _compared(fields, stored),
            what=str(task.target),
            remedy="replace it with --overwrite",
        )
        if fields == stored:
            return StageResult(
                outcome="skipped",
                fingerprint=artifacts.fingerprint(fields),
                facts=facts,
                warnings=tuple(warnings),
            )
    measured = _measured(task, file)
    drawing = Drawing(
        task=task,
        file=file,
        places=places,
        values=measured[_measurement(_kind(task), file)],
        measured=measured,
        judgement=judgement_of(file, task.scale, task.column.name),
        tissue=_tissue(tiles),
    )
    if slide is None and places.is_slide:
        warnings.append(f"{_where_it_is_not(task, places)}: its tiles are drawn alone")
    with artifacts.atomic_folder(task.target, fields, replace=True) as folder:
        formats: list[str] = fields["formats"]
        pictures = [name for name in formats if name in ("png", "svg")]
        if pictures:
            for name, content in _overview(drawing, pictures, slide).items():
                artifacts.write_bytes(folder / f"overview.{name}", content)
        for name in formats:
            if name == GALLERY and slide is None:  # drawn when the slide was there
                shutil.copytree(task.target / GALLERY, folder / GALLERY)
            elif name == GALLERY and slide is not None:
                options = GalleryOptions(**fields[GALLERY])
                warnings += _gallery(drawing, folder, slide, options)
            elif name not in pictures:
                warnings += _write(drawing, folder, name)
    return StageResult(
        outcome="done",
        fingerprint=artifacts.fingerprint(fields),
        facts=facts,
        warnings=tuple(dict.fromkeys(warnings)),
    )


# --- what was drawn before ------------------------------------------------------------------


def _fields(
    task: HeatmapTask, file: ScoreFile, slide: Path | None, tiles: TileFile | None
) -> dict[str, Json]:
    judgement = judgement_of(file, task.scale, task.column.name)
    formats = [name for name in task.formats if name != GALLERY or slide is not None]
    return {
        "stage": "heatmap",
        "numerics": NUMERICS,
        "scores": artifacts.fingerprint(file.fields),
        "scale": task.scale,
        "class": task.column.name,
        "shows": task.shows,
        "faithfulness": {"score": judgement.score, "warning": judgement.warning},
        "colours": task.colours.fields(),
        "caption": task.caption.text,
        "source": task.source,
        "frame": task.frame,
        "levels": None if task.levels is None else list(task.levels),
        "max_tiles": task.max_tiles,
        "tissue": None if tiles is None else artifacts.fingerprint({"": tiles.outline_geojson}),
        "slide": None if slide is None else slide_identity(slide),
        "formats": sorted(formats),
        GALLERY: dataclasses.asdict(task.gallery) if GALLERY in formats else None,
    }


def _stored(target: Path) -> dict[str, Json] | None:
    """Return what a heatmap that is there was made of; None where there is none to trust."""
    try:
        fields: dict[str, Json] = artifacts.read_complete(target)["fields"]
        return fields
    except SchemaError:
        return None


def _grown(fields: dict[str, Json], stored: Mapping[str, Json]) -> dict[str, Json]:
    """Return the fields with the formats that are there too, and with the slide if it has moved."""
    return {
        **fields,
        "formats": sorted({*fields["formats"], *stored.get("formats", ())}),
        "slide": fields["slide"] or stored.get("slide"),
        GALLERY: fields[GALLERY] or stored.get(GALLERY),
    }


def _compared(fields: Mapping[str, Json], other: Mapping[str, Json]) -> dict[str, Json]:
    """Return the fields that must be the same; formats, a slide and a gallery may be added."""
    added = {"formats"} | {
        name for name in ("slide", GALLERY) if None in (fields.get(name), other.get(name))
    }
    return {name: value for name, value in fields.items() if name not in added}


# --- numbers --------------------------------------------------------------------------------


def _kind(task: HeatmapTask) -> LayerKind:
    return LayerKind(scale=task.scale, shows=task.shows, column=task.column)


def _measured(task: HeatmapTask, file: ScoreFile) -> Measured:
    """Return every column of the scores on every scale that it has, and what else is known."""
    others = {
        slide_id: read_score_file(task.scores.with_name(f"{slide_id}.h5"))
        for slide_id in slides_of_bag(file)
        if slide_id != file.slide_id
    }
    columns = [Column(name=name, index=i) for i, name in enumerate(file.score_names)]
    if len(columns) == 1:
        columns = [Column(name="", index=0)]
    if task.column.index is None:
        columns.append(task.column)
    shows: tuple[Shows, ...] = ("score", "disagreement") if has_disagreement(file) else ("score",)
    kinds = [
        LayerKind(scale=scale, shows=show, column=column)
        for show in shows
        for scale in scales_for(file.score_kind, task.task)
        for column in columns
    ]
    if file.contributions is not None:
        kinds += [
            LayerKind(scale="contribution", shows="score", column=column)
            for column in contribution_columns(file)
        ]
    if file.rollout is not None:
        kinds.append(ROLLOUT)
    if _kind(task) not in kinds:  # asked of a file that has no such numbers: it says why
        layer_values(file, _kind(task), others, task.task)
    return {_measurement(kind, file): layer_values(file, kind, others, task.task) for kind in kinds}


def _measurement(kind: LayerKind, file: ScoreFile) -> str:
    name = f"disagreement_{kind.scale}" if kind.shows == "disagreement" else kind.scale
    if kind == ROLLOUT or (kind.scale != "contribution" and len(file.score_names) == 1):
        return name
    if kind.column.index is None:
        return f"{name}_mean"
    names = file.contribution_names if kind.scale == "contribution" else file.score_names
    return name if len(names) == 1 else f"{name}_{names[kind.column.index]}"


# --- files ----------------------------------------------------------------------------------


def _write(drawing: Drawing, folder: Path, name: str) -> Sequence[str]:
    """Write one format into a folder; return sentences for the user."""
    task, places = drawing.task, drawing.places
    if name in ("csv", "parquet"):
        write_table(
            folder / f"tiles.{name}",
            places,
            drawing.measured,
            slide_id=task.slide_id,
            grid=drawing.file.grid,
            facts=drawing.facts,
        )
    elif name in ("ome-tiff", "ome-zarr"):
        write, ending = {
            "ome-tiff": (write_ome_tiff, "ome.tif"),
            "ome-zarr": (write_ome_zarr, "ome.zarr"),
        }[name]
        contents: tuple[Content, ...] = ("score", "colour")
        for content in contents:
            write(
                folder / f"{content}.{ending}",
                places,
                drawing.values,
                task.colours,
                content,
                slide_id=task.slide_id,
                of=task.column.name,
                frame=task.frame,
            )
    else:
        return write_geojson(
            folder / f"heatmap.{name}",
            places,
            drawing.values,
            task.colours,
            slide_id=task.slide_id,
            measurements=drawing.measured,
            levels=task.levels,
            max_tiles=task.max_tiles,
            tissue=drawing.tissue,
            frame=task.frame,
            about={"heatmap": _about(task, drawing.judgement)},
            facts={name: one for name, one in drawing.facts.items() if math.isfinite(one)},
        )
    return ()


def _about(task: HeatmapTask, judgement: Judgement) -> dict[str, Json]:
    return {
        "shows": task.shows,
        "scale": task.scale,
        "class": task.column.name,
        "faithfulness": judgement.score,
        "warning": judgement.warning,
    }


def _overview(drawing: Drawing, formats: Sequence[str], slide: Path | None) -> dict[str, bytes]:
    task, places = drawing.task, drawing.places
    frame, rgb = picture_frame(places), None
    if slide is not None:
        with open_slide(slide, mpp=task.slide_mpp, scene=scene_of(task.slide_id)) as opened:
            require_same_slide(places, opened.info, task.slide_id)
            rgb = slide_picture(opened, frame)
    # Of the members' disagreement no picture can be wrong: the warning is about the scores.
    judgement, is_scores = drawing.judgement, task.shows == "score"
    told = judgement.text if is_scores else f"Of the scores: {' '.join(judgement.sentences)}"
    caption = Caption(
        slide_id=task.slide_id,
        prediction=task.caption.text,
        of=task.column.name,
        source=task.source,
        warning=judgement.warning if is_scores else "",
        remarks=[
            told,
            *filter(None, [agreement_text(drawing.file)]),
            *([] if rgb is not None else ["drawn without the slide"]),
        ],
    )
    return draw_overview(
        places, drawing.values, task.colours, caption, rgb=rgb, frame=frame, formats=formats
    )


def _gallery(drawing: Drawing, folder: Path, slide: Path, options: GalleryOptions) -> Sequence[str]:
    """Cut a gallery's tiles; return sentences for the user."""
    task, file = drawing.task, drawing.file
    opened, notes = open_as_tiled(
        slide, file.tile, mpp=task.slide_mpp, scene=scene_of(task.slide_id)
    )
    with opened:
        require_same_slide(drawing.places, opened.info, task.slide_id)
        return (
            *notes,
            *write_gallery(
                folder / GALLERY,
                opened,
                drawing.places,
                _parts(drawing),
                slide_id=task.slide_id,
                tile_px=file.tile.get("tile_px"),
                options=options,
                source=task.source,
                warning=drawing.judgement.warning,
            ),
        )


def _parts(drawing: Drawing) -> list[GalleryPart]:
    """Return what is drawn, and the other classes on the same scale."""
    task, file = drawing.task, drawing.file
    added = task.scale == "contribution"
    columns = contribution_columns(file) if added else score_columns(file.score_names)
    # Of two probabilities, one's highest are the other's lowest.
    mirrored = len(columns) == 2 and task.scale == "probability"
    alone = task.shows == "disagreement" or task.scale == "rollout" or mirrored
    others = () if alone else columns
    kinds = [dataclasses.replace(_kind(task), column=column) for column in others]
    return [
        GalleryPart(
            of=kind.column.name,
            values=drawing.measured[_measurement(kind, file)],
            colours=task.colours,
        )
        for kind in dict.fromkeys([_kind(task), *kinds])
    ]


def _where_it_is_not(task: HeatmapTask, places: TilePlaces) -> str:
    if not places.is_slide:
        return "this never was a slide"
    where = "is in no cohort of this study" if task.slide is None else "is not at its path"
    return f"the slide {where}"


def _tissue(tiles: TileFile | None) -> tuple[Region, ...]:
    """Return the tissue's outline from the tiling that the tiles are of, where that is there."""
    if tiles is None or not tiles.outline_geojson:
        return ()
    bounds = tiles.bounds_l0
    regions = parse_features(
        tiles.slide_id, json.loads(tiles.outline_geojson), (bounds.x_l0, bounds.y_l0)
    )
    return tuple(region for region in regions if region.class_name == TISSUE)
