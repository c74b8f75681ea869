"""One slide's part of a review, inside a worker process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.cohort.jobs import StageResult
from bagscope.errors import ArtifactError, BagscopeError, SchemaError, SlideError
from bagscope.heatmaps.bag_scores import slides_of_bag
from bagscope.heatmaps.gallery import cut_tiles, cutting_plan, open_as_tiled
from bagscope.heatmaps.judgement import agreement_text, judgement_of
from bagscope.heatmaps.layers import Layer, layers_of
from bagscope.heatmaps.review.folder import (
    FACTS_NAME,
    SLIDE_SCRIPT_NAME,
    THUMB_NAME,
    picture_name,
)
from bagscope.heatmaps.review.pyramid import (
    Picture,
    picture_tile,
    plan_picture,
    thumbnail_jpeg,
)
from bagscope.heatmaps.review.scripts import script
from bagscope.heatmaps.review.slide_data import (
    GalleryTile,
    faithfulness_data,
    pick_gallery,
    slide_data,
)
from bagscope.heatmaps.tile_places import TilePlaces, places_of, require_same_slide
from bagscope.mil.score_file import ScoreFile, read_score_file
from bagscope.pipeline.review import ReviewTask
from bagscope.pipeline.tile import scene_of
from bagscope.pipeline.tiled_slide import find_tiling, require_tiled_slide
from bagscope.wording import counted
from bagscope.wsi.contact_sheet import without_folders
from bagscope.wsi.geojson import read_regions
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.outline import Region
from bagscope.wsi.overlay import encode_jpeg
from bagscope.wsi.roi import require_inside
from bagscope.wsi.slide import RectL0, Slide

NUMERICS = 2
"""Raised by hand, with a changelog line, when the same slide would look different."""
_TILE_QUALITY = 90


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a slide's scores have to show.

    Attributes:
        file: of the scores; None where it can't be read.
        places: of the tiles; None where there are none to show.
        faithfulness: of the layer that is shown first.
        judged: faithfulness of each layer, by its id.
        notes: sentences about what is missing.
        reasons: why, where the notes may not say.
    """

    file: ScoreFile | None = None
    places: TilePlaces | None = None
    layers: tuple[Layer, ...] = ()
    gallery: tuple[GalleryTile, ...] = ()
    faithfulness: Json = None
    judged: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclass(kw_only=True, slots=True)
class _Shown:
    """What of a slide's pixels lies in its folder; `um` is the size of a pixel of its picture."""

    picture: Picture | None = None
    um: float | None = None
    cut: frozenset[int] = frozenset()
    regions: Sequence[Region] = ()
    notes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def lacks(self, what: str, error: Exception, task: ReviewTask) -> None:
        """Note what can't be shown, and why: on the page, or for the user alone."""
        notes, reasons = _told(what, error, task)
        self.notes += notes
        self.reasons += reasons


def review_task(task: ReviewTask) -> StageResult:
    """Make one slide's part, unless it was made so already.

    A slide that is not there or can't be read is shown without a picture, and a sentence says so.

    Raises:
        FingerprintMismatch: it was made otherwise.
    """
    scored = scored_slide(task)
    path = task.slide.path
    there = path is not None and path.exists() and (scored.places is None or scored.places.is_slide)
    fields = _fields(task, path if there else None)
    stored = _stored(task.target)
    facts: dict[str, Json] = {"tiles": task.slide.tiles}
    if stored is not None and not task.overwrite:
        # A slide that is gone for now leaves its picture as it is.
        fields["slide"] = fields["slide"] or stored["slide"]
        compared = {**stored, "slide": stored["slide"] or fields["slide"]}
        artifacts.require_same(
            compared, fields, what=str(task.target), remedy="replace it with --overwrite"
        )
        if stored == fields:
            return StageResult(
                outcome="skipped", fingerprint=artifacts.fingerprint(fields), facts=facts
            )
    with artifacts.atomic_folder(task.target, fields, replace=True) as folder:
        shown = _Shown(notes=list(scored.notes), reasons=list(scored.reasons))
        if there:
            _show(task, scored, folder, shown)
        elif scored.places is None or scored.places.is_slide:
            where = "is in no cohort of this study" if path is None else "is not at its path"
            shown.notes.append(f"The slide {where}, so there is no picture of it.")
        if shown.picture is None:
            fields["slide"] = None  # so that it is tried again
        content = slide_bytes(
            task, scored, picture=shown.picture, cut=shown.cut, regions=shown.regions,
            notes=shown.notes,
        )  # fmt: skip
        artifacts.write_bytes(folder / SLIDE_SCRIPT_NAME, content)
        picture = None if shown.picture is None else shown.picture.to_json()
        told = {"notes": shown.notes, "picture": picture, "um": shown.um}
        artifacts.write_json(folder / FACTS_NAME, told)
    return StageResult(
        outcome="done",
        fingerprint=artifacts.fingerprint(fields),
        facts=facts,
        warnings=(*shown.notes, *shown.reasons),
    )


def scored_slide(task: ReviewTask) -> Scored:
    """Return what a slide's scores have to show; opens no slide."""
    places: TilePlaces | None = None
    try:
        file = read_score_file(task.slide.scores)
    except ArtifactError as error:
        notes, reasons = _told("Its scores can't be read", error, task)
        return Scored(notes=notes, reasons=reasons)
    try:
        places = places_of(file.coords_l0, file.grid, file.tile, len(file.scores))
        beside = {
            slide_id: read_score_file(task.slide.scores.with_name(f"{slide_id}.h5"))
            for slide_id in slides_of_bag(file)
            if slide_id != file.slide_id
        }
        layers = layers_of(file, beside, task.colours, task.task)
    except ArtifactError as error:
        notes, reasons = _told("Its scores can't be shown", error, task)
        return Scored(file=file, places=places, notes=notes, reasons=reasons)
    first = next((one for one in layers if one.kind.id == task.slide.first_layer), layers[0])
    judged = {
        layer.kind.id: faithfulness_data(judgement_of(file, layer.kind.scale, layer.class_name))
        for layer in layers
        if layer.kind.shows == "score"
    }
    return Scored(
        file=file,
        places=places,
        layers=layers,
        gallery=pick_gallery(layers, places),
        faithfulness=judged.get(first.kind.id),
        judged=judged,
        notes=places.notes,
    )


def slide_bytes(
    task: ReviewTask,
    scored: Scored,
    *,
    picture: Picture | None,
    cut: Iterable[int] | None = None,
    regions: Sequence[Region] = (),
    notes: Sequence[str] = (),
) -> bytes:
    """Return `slide.js`; opens no slide.

    Args:
        task: of the slide.
        scored: what its scores have to show.
        picture: of the slide; None where there is none.
        cut: rows of the gallery's tiles that have a picture; all of them if None.
        regions: annotations.
        notes: sentences that a reader must know.
    """
    rows = {tile.row for tile in scored.gallery} if cut is None else cut
    return script(
        "slide",
        slide_data(
            task.key,
            places=scored.places,
            layers=scored.layers,
            first_layer=task.slide.first_layer,
            picture=picture,
            gallery=scored.gallery,
            cut=frozenset(rows) if picture is not None else frozenset(),
            faithfulness=scored.faithfulness,
            judged=scored.judged,
            agreement=agreement_text(scored.file) if scored.file else "",
            annotations=regions,
            notes=notes,
        ),
    )


# --- the slide's pixels ---------------------------------------------------------------------


def _show(task: ReviewTask, scored: Scored, folder: Path, shown: _Shown) -> None:
    """Write what is to be seen of a slide; what can't be read is told in the notes."""
    assert task.slide.path is not None, "only slides that are there are shown"
    tile = scored.file.tile if scored.file else {}
    with ExitStack() as stack:
        try:
            slide, notes = open_as_tiled(
                task.slide.path, tile, mpp=task.slide.mpp, scene=scene_of(task.slide.slide_id)
            )
            stack.enter_context(slide)
            if scored.places is not None:
                require_same_slide(scored.places, slide.info, task.slide.slide_id)
                tiles = find_tiling(task.tilings, task.slide.slide_id, scored.places.coords_l0)
                require_tiled_slide(task.slide.path, tiles, task.slide.slide_id)
            picture = plan_picture(slide.info, int(task.settings["max_px"]))
            thumb = thumbnail_jpeg(slide, picture)
        except (BagscopeError, OSError) as error:
            shown.lacks("The slide can't be shown", error, task)
            return
        if task.pseudonyms is None:
            shown.notes += [without_folders(note) for note in notes]
        artifacts.write_bytes(folder / THUMB_NAME, thumb)
        _write_pyramid(slide, picture, folder, int(task.settings["quality"]), shown)
        shown.picture = picture
        spacing = slide.info.spacing
        shown.um = None if spacing is None else round(spacing.mpp * picture.downsample, 4)
        _cut_gallery(slide, scored, folder, shown)
        _read_annotation(slide, task, shown)


def _write_pyramid(
    slide: Slide, picture: Picture, folder: Path, quality: int, shown: _Shown
) -> None:
    damaged = total = 0
    for level, column, row in picture.tiles():
        content, whole = picture_tile(slide, picture, level, column, row, quality=quality)
        path = folder / picture_name(level, column, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        damaged += not whole
        total += 1
    if damaged:
        shown.notes.append(
            f"{damaged} of {total} parts of the picture can't be read whole; what is missing is "
            "striped."
        )


def _cut_gallery(slide: Slide, scored: Scored, folder: Path, shown: _Shown) -> None:
    named = {tile.row: tile.name for tile in scored.gallery}
    if scored.places is None or scored.file is None or not named:
        return
    rows = sorted(named)
    plan = cutting_plan(slide, scored.places, scored.file.tile.get("tile_px"))
    cut = cut_tiles(slide, scored.places, rows, plan)
    found = {row: one for row, one in zip(rows, cut.images, strict=True) if one is not None}
    for row, image in found.items():
        path = folder / named[row]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_jpeg(image, quality=_TILE_QUALITY))
    if len(found) < len(rows):
        shown.notes.append(
            f"{counted(len(rows) - len(found), 'tile')} of the gallery can't be read."
        )
    shown.cut = frozenset(found)


def _read_annotation(slide: Slide, task: ReviewTask, shown: _Shown) -> None:
    shown.regions, notes, reasons = annotation_of(task, slide.info.bounds_l0)
    shown.notes += notes
    shown.reasons += reasons


def annotation_of(
    task: ReviewTask, bounds_l0: RectL0
) -> tuple[list[Region], tuple[str, ...], tuple[str, ...]]:
    """Return what was drawn on a slide, and why it can't be shown: for the page, for the user."""
    if task.annotation is None:
        return [], (), ()
    try:
        regions = read_regions(task.annotation, bounds_l0=bounds_l0)
        require_inside(
            regions,
            bounds_l0,
            slide_name=task.slide.slide_id,
            file_name=task.annotation.name,
        )
    except SlideError as error:
        return [], *_told("Its annotation can't be shown", error, task)
    names = task.pseudonyms
    scrubbed = [
        replace(one, class_name=names.scrubbed(one.class_name)) if names else one for one in regions
    ]
    return scrubbed, (), ()


def _told(what: str, error: Exception, task: ReviewTask) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return sentences for the page, without folders, and for the user alone.

    A reason may hold a file's name, and a file's name may be a patient's.
    """
    reason = " ".join(str(error).split())
    if task.pseudonyms is not None:
        return (f"{what}.",), (f"{what}: {reason}",)
    return (f"{what}: {without_folders(reason)}",), ()


# --- what was made before -------------------------------------------------------------------


def _fields(task: ReviewTask, slide: Path | None) -> dict[str, Json]:
    """Return what the part is made of; hashes, keyed where ids must not be guessed from them."""
    layers = [[kind.id, colours.fields()] for kind, colours in task.colours.items()]
    return {
        "stage": "review",
        "numerics": NUMERICS,
        "settings": dict(task.settings),
        "scores": digest_of_scores(task),
        "layers": _hashed(task, [layers, task.slide.first_layer]),
        "annotation": None
        if task.annotation is None
        else _hashed(task, artifacts.sha256_of_file(task.annotation)),
        "slide": None if slide is None else _identity(task, slide),
    }


def digest_of_scores(task: ReviewTask) -> str:
    """Return the hash of the score file and those of its bag's other slides that are there."""
    paths = [task.slide.scores.with_name(f"{name}.h5") for name in task.slide.bag]
    return _hashed(task, [artifacts.stated_seal(path) for path in paths if path.is_file()])


def _identity(task: ReviewTask, slide: Path) -> str | None:
    try:
        return _hashed(task, slide_identity(slide))
    except (SlideError, OSError):
        return None


def _hashed(task: ReviewTask, value: Json) -> str:
    if task.pseudonyms is not None:
        return task.pseudonyms.digest(value)
    return artifacts.fingerprint({"": value})


def _stored(target: Path) -> dict[str, Json] | None:
    """Return what a part that is there was made of; None where there is none to trust."""
    try:
        fields: Mapping[str, Json] = artifacts.read_complete(target)["fields"]
    except SchemaError:
        return None
    return None if fields.get("failed") else dict(fields)
