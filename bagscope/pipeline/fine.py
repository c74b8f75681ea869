"""The finer pass of a heatmap: overlapping tiles inside a region of one slide, scored and drawn.

Nothing of it goes into the study's features or scores: those are what predictions are made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope import artifacts
from bagscope.errors import ConfigError, SchemaError, SlideError
from bagscope.heatmaps.choices import FINE_PARTS, ScaleName
from bagscope.pipeline.heatmap import HeatmapRequest, HeatmapTask, plan_heatmaps, study_of
from bagscope.wsi.geojson import Frame

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.artifacts import Json
    from bagscope.features.store import FeatureStore, SlideRecord
    from bagscope.heatmaps.tile_places import TilePlaces
    from bagscope.mil.member import Member
    from bagscope.mil.score_file import ScoreFile
    from bagscope.pipeline.fine_tiles import FineRegion
    from bagscope.pipeline.study import Study
    from bagscope.wsi.slide import Slide
    from bagscope.wsi.tile_file import TileFile
    from bagscope.wsi.tiles import TileSet

NUMERICS = 1
"""Raised by hand, with a changelog line, when the same pass would give other numbers."""
MOST_TILES = 50_000
PICTURE_NAME, REGIONS_NAME, TABLE_NAME = "fine.png", "fine.geojson", "fine.csv"

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FineRequest:
    """Which finer pass is wanted.

    Attributes:
        place: a run, or a folder of predictions.
        region: `X,Y,WIDTH,HEIGHT` in level-0 pixels, or a GeoJSON file.
        slides: the slide's id; may be left out where there is but one.
        scale: of the scores; the usual one of the model's kind if None.
        class_name: whose scores are drawn, where there are several.
        frame: that the region's numbers and the GeoJSON count in.
        limits: first and last number of the colours; from all slides if None.
        parts: finer tiles along a step of the stored ones.
        model: the bundle; that of the run that scored the slide if None.
        out: folder for the output; `heatmaps/<run>` of the study if None.
        dry_run: find the tiles and encode none.
    """

    place: Path
    region: str
    slides: tuple[str, ...] = ()
    scale: ScaleName | None = None
    class_name: str | None = None
    frame: Frame = "qupath"
    limits: tuple[float, float] | None = None
    parts: int = FINE_PARTS
    model: Path | None = None
    out: Path | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FineResult:
    """How a finer pass ended.

    Attributes:
        folder: of the picture, the GeoJSON and the table.
        tiles: finer ones that are scored, or would be; 0 where all was there.
        is_new: whether it was made now.
        warnings: sentences for the user.
    """

    folder: Path
    tiles: int
    is_new: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """The slide that is looked at, and all that is known of it.

    Attributes:
        beside: score files of its bag's other slides, by slide.
    """

    task: HeatmapTask
    study: Study
    file: ScoreFile
    beside: Mapping[str, ScoreFile]
    tiles: TileFile
    places: TilePlaces
    slide_path: Path


def draw_finer(request: FineRequest, tell: Tell = lambda said: None) -> FineResult:
    """Cut, encode and score finer tiles of a region, and draw them beside the heatmap.

    Raises:
        ConfigError: not one slide, a region that is none, or features that can't be made again.
        SlideError: the slide is not there, or has no tissue in the region.
        ArtifactError: the model, the features or the scores are not of one another.
    """
    import numpy as np

    from bagscope.pipeline.fine_sources import encoder_session, features_of, members_of
    from bagscope.pipeline.fine_tiles import (
        chosen_tiles,
        encode_tiles,
        finer_tiles,
        open_tiled,
        parse_region,
    )
    from bagscope.pipeline.study import available_cores
    from bagscope.pipeline.tile import scene_of

    subject = _subject(request)
    task, file, tiles = subject.task, subject.file, subject.tiles
    members = members_of(request.place, subject.study, file, request.model)
    store = features_of(subject.study, file)
    record = store.record(task.slide_id)
    slide = open_tiled(subject.slide_path, tiles, mpp=task.slide_mpp, scene=scene_of(task.slide_id))
    with slide:
        region = parse_region(
            request.region,
            slide_id=task.slide_id,
            size_l0=(slide.info.width_l0, slide.info.height_l0),
            bounds_l0=slide.info.bounds_l0,
            frame=request.frame,
        )
        target = task.target.with_name(f"{task.target.name}-fine-{region.name}")
        fields = _fields(request, subject, record, region)
        if _is_there(target, fields, overwrite=request.overwrite):
            return FineResult(folder=target, tiles=0, is_new=False)
        threads = available_cores()
        found = finer_tiles(
            slide, tiles, region, parts=request.parts, most=MOST_TILES, threads=threads
        )
        if request.dry_run:
            return FineResult(folder=target, tiles=len(found), is_new=False)
        session = encoder_session(subject.study, record)
        seconds = len(found) * session.seconds_per_tile
        tell(f"{len(found):,} finer tiles to encode, about {seconds:.0f} s")
        vectors, readable, problems = encode_tiles(
            slide,
            found.coords_l0,
            found.plan,
            session,
            downscale=str(tiles.attributes.get("downscale", "area")),
            threads=threads,
            tell=lambda done: tell(f"{done:,} of {len(found):,} tiles"),
        )
        if not readable.any():
            raise SlideError(f"{task.slide_id}: no finer tile can be read ({problems[0]})")
        kept = np.flatnonzero(readable)
        found = chosen_tiles(found, kept)
        values = _values(subject, members, store, found, vectors[kept])
        with artifacts.atomic_folder(target, fields, replace=True) as folder:
            _write(folder, request, subject, slide, region, found, values)
    unread = len(readable) - len(kept)
    warnings = (
        (f"{unread} of {len(readable)} finer tiles can't be read and are left out; {problems[0]}",)
        if unread
        else ()
    )
    return FineResult(folder=target, tiles=len(kept), is_new=True, warnings=warnings)


# --- what it is about -----------------------------------------------------------------------


def _subject(request: FineRequest) -> _Subject:
    from bagscope.heatmaps.bag_scores import slides_of_bag
    from bagscope.heatmaps.tile_places import places_of
    from bagscope.mil.score_file import read_score_file
    from bagscope.pipeline.fine_sources import tile_file_of
    from bagscope.wsi.tile_file import read_tile_file

    planned = plan_heatmaps(
        HeatmapRequest(
            place=request.place,
            slides=request.slides,
            scale=request.scale,
            class_name=request.class_name,
            frame=request.frame,
            limits=request.limits,
            out=request.out,
        )
    )
    if len(planned.tasks) != 1:
        raise ConfigError(
            f"--fine is about a region of one slide, and there are {len(planned.tasks)}; name it "
            "with --slide"
        )
    (task,) = planned.tasks.values()
    study, _ = study_of(request.place)
    if study is None:
        raise ConfigError(
            f"{request.place}: in no study; a finer pass needs the study's tiles and features"
        )
    file = read_score_file(task.scores)
    if file.coords_l0 is None:
        raise SlideError(f"{task.slide_id}: never was a slide, so there is nothing to look into")
    if task.slide is None or not task.slide.exists():
        where = "is in no cohort of this study" if task.slide is None else "is not at its path"
        raise SlideError(
            f"{task.slide_id}: the slide {where}, and finer tiles are cut from it; correct its "
            "path in the cohort"
        )
    return _Subject(
        task=task,
        study=study,
        file=file,
        beside={
            slide_id: read_score_file(task.scores.with_name(f"{slide_id}.h5"))
            for slide_id in slides_of_bag(file)
            if slide_id != file.slide_id
        },
        tiles=read_tile_file(tile_file_of(study, file)),
        places=places_of(file.coords_l0, file.grid, file.tile, len(file.scores)),
        slide_path=task.slide,
    )


def _fields(
    request: FineRequest, subject: _Subject, record: SlideRecord, region: FineRegion
) -> dict[str, Json]:
    from shapely import to_wkt

    task = subject.task
    return {
        "stage": "heatmap-fine",
        "numerics": NUMERICS,
        "scores": artifacts.fingerprint(subject.file.fields),
        "features": record.fingerprint,
        "region": to_wkt(region.shape, rounding_precision=3),
        "parts": request.parts,
        "scale": task.scale,
        "class": task.column.name,
        "colours": task.colours.fields(),
        "frame": request.frame,
    }


def _is_there(target: Path, fields: dict[str, Json], *, overwrite: bool) -> bool:
    if overwrite:
        return False
    try:
        stored = artifacts.read_complete(target)["fields"]
    except SchemaError:
        return False
    artifacts.require_same(stored, fields, what=str(target), remedy="replace it with --overwrite")
    return True


# --- numbers --------------------------------------------------------------------------------


def _values(
    subject: _Subject,
    members: Sequence[Member],
    store: FeatureStore,
    found: TileSet,
    vectors: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Return each finer tile's score (n,) on the heatmap's scale."""
    import numpy as np

    from bagscope.features.feature_layout import Float16Overflow, as_stored
    from bagscope.heatmaps.bag_scores import bag_scores, slides_of_bag
    from bagscope.heatmaps.fine import fine_scores, on_the_slide_s_scale
    from bagscope.mil.cases import Case
    from bagscope.mil.sources import CaseBag, StoreSource

    task, file = subject.task, subject.file
    slides = slides_of_bag(file)
    case = Case(case_id=file.case_id, patient_id=file.case_id, slide_ids=slides)
    stored = StoreSource(store, [case]).read(0)
    try:
        # Rounded as the stored ones are, so that equal tiles have equal scores.
        features = as_stored(vectors, np.dtype(store.record(task.slide_id).dtype))
    except Float16Overflow:
        features = vectors
    place = slides.index(task.slide_id)
    fine = CaseBag(
        case=Case(case_id=task.slide_id, patient_id=file.case_id, slide_ids=(task.slide_id,)),
        features=features,
        coords_l0=found.coords_l0,
        grid=found.grid,
        slide_ids=(task.slide_id,),
        tile_slide=np.zeros(len(features), np.int32),
        tile_row=np.arange(len(features), dtype=np.int32),
        tile_um=stored.tile_um[place : place + 1],
        mpp_l0=stored.mpp_l0[place : place + 1],
    )
    known = bag_scores(file, subject.beside)
    asked = fine_scores(
        members, stored, fine, known, wants_contributions=task.scale == "contribution"
    )
    return on_the_slide_s_scale(
        asked, task.scale, task.column, slide=file.scores, bag=known, task=task.task
    )


# --- files ----------------------------------------------------------------------------------


def _write(
    folder: Path,
    request: FineRequest,
    subject: _Subject,
    slide: Slide,
    region: FineRegion,
    found: TileSet,
    values: NDArray[np.float64],
) -> None:
    from bagscope.heatmaps.fine_picture import cell_regions
    from bagscope.heatmaps.raster import cells_of
    from bagscope.heatmaps.table import write_table
    from bagscope.wsi.geojson import write_regions

    task = subject.task
    places = dataclasses.replace(
        subject.places,
        coords_l0=found.coords_l0,
        extent_l0=found.plan.extent_l0,
        step_l0=found.lattice.step_l0,
        origin_l0=(found.lattice.origin_x_l0, found.lattice.origin_y_l0),
    )
    cells = cells_of(places, values)
    x_l0 = (cells.x_edges_l0[1:] + cells.x_edges_l0[:-1]) / 2
    y_l0 = (cells.y_edges_l0[1:] + cells.y_edges_l0[:-1]) / 2
    write_regions(
        folder / REGIONS_NAME,
        list(cell_regions(cells, region.holds(x_l0, y_l0), task.colours)),
        bounds_l0=slide.info.bounds_l0,
        slide_name=task.slide_id,
        frame=request.frame,
    )
    write_table(
        folder / TABLE_NAME,
        places,
        {task.scale: values},
        slide_id=task.slide_id,
        grid=found.grid,
    )
    picture = _picture(subject, slide, region, places, found.spacing.mpp, values)
    artifacts.write_bytes(folder / PICTURE_NAME, picture)


def _picture(
    subject: _Subject,
    slide: Slide,
    region: FineRegion,
    places: TilePlaces,
    mpp_l0: float,
    values: NDArray[np.float64],
) -> bytes:
    import numpy as np

    from bagscope.heatmaps.fine_picture import Panel, draw_fine, region_frame
    from bagscope.heatmaps.judgement import judgement_of
    from bagscope.heatmaps.layers import LayerKind, layer_values
    from bagscope.heatmaps.raster import raster
    from bagscope.wsi.reading import read_region_mpp

    task, coarse = subject.task, subject.places
    frame = region_frame(region.box_l0)
    finer = raster(places, values, frame)
    finer[~region.mask(frame)] = np.nan
    rgb = read_region_mpp(
        slide,
        x_l0=region.box_l0.x_l0,
        y_l0=region.box_l0.y_l0,
        width_px=frame.shape[1],
        height_px=frame.shape[0],
        mpp=frame.px_l0_x * mpp_l0,
    )
    kind = LayerKind(scale=task.scale, shows="score", column=task.column)
    stored = layer_values(subject.file, kind, subject.beside, task.task)
    every_um = [f"every {one.step_l0 * mpp_l0:.0f} µm" for one in (coarse, places)]
    return draw_fine(
        rgb,
        [
            Panel(title=f"As it was tiled: {every_um[0]}", scores=raster(coarse, stored, frame)),
            Panel(title=f"Finer: {len(values):,} tiles, {every_um[1]}", scores=finer),
        ],
        frame,
        task.colours,
        slide_id=task.slide_id,
        of=task.column.name,
        mpp=mpp_l0,
        remarks=(
            task.source,
            "A pixel of the finer one is the mean of the tiles over it, each scored as if it stood "
            "in the slide's own bag. The prediction is not made of them.",
        ),
        warning=judgement_of(subject.file, task.scale, task.column.name).warning,
    )
