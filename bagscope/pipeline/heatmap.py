"""The heatmap stage: score files of a run or a prediction → a folder of pictures and files a slide.

Colours are the same for all slides of the run, whether they are drawn now or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope import artifacts
from bagscope.cohort.jobs import Job, RunReport, StageResult
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.errors import ArtifactError, ConfigError, FingerprintMismatch, SchemaError
from bagscope.heatmaps.choices import (
    DEFAULT_FORMATS,
    FORMATS,
    MAX_TILES,
    RATIOS,
    GalleryOptions,
    ScaleName,
    Shows,
)
from bagscope.heatmaps.judgement import judgement_of
from bagscope.heatmaps.scores import Column, pick_column, require_scale
from bagscope.pipeline.bundle import SCORES_NAME
from bagscope.pipeline.heatmap_captions import CaseCaption, read_captions
from bagscope.pipeline.study import COHORT_NAME, STUDY_NAME, RunSpec, Study, open_study
from bagscope.pipeline.tile import run_options
from bagscope.specs import did_you_mean
from bagscope.wsi.geojson import Frame

if TYPE_CHECKING:
    from bagscope.heatmaps.colours import ColourScale
    from bagscope.mil.score_file import ScoreFile

STAGE = "heatmap"
WORKER_MODULES = ("bagscope.pipeline.heatmap_worker",)
_PICTURE_MODULES = ("matplotlib.figure", "matplotlib.backends.backend_agg")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatmapRequest:
    """Which heatmaps are wanted.

    Attributes:
        place: a run, or a folder of predictions.
        slides: ids; all if empty.
        scale: of the scores; the usual one of the model's kind if None.
        class_name: whose scores are drawn, where there are several.
        shows: the scores, or how far the members are apart.
        formats: of the files.
        frame: where the (0, 0) of GeoJSON and rasters lies.
        levels: from which score on a region is hot; the scale's usual ones if None.
        max_tiles: with more tiles than this GeoJSON has regions only.
        limits: first and last number of the colours; from all slides if None.
        out: folder for the output; `heatmaps/<run>` of the study if None.
        workers: processes; the study's setting if None.
        shard: (i, n), to draw the i-th of n parts of the slides.
        gallery: which tiles, where `gallery` is among the formats.
    """

    place: Path
    slides: tuple[str, ...] = ()
    scale: ScaleName | None = None
    class_name: str | None = None
    shows: Shows = "score"
    formats: tuple[str, ...] = DEFAULT_FORMATS
    frame: Frame = "qupath"
    levels: tuple[float, ...] | None = None
    max_tiles: int = MAX_TILES
    limits: tuple[float, float] | None = None
    out: Path | None = None
    workers: int | None = None
    overwrite: bool = False
    shard: tuple[int, int] | None = None
    gallery: GalleryOptions = field(default_factory=GalleryOptions)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatmapTask:
    """All that a worker needs to draw one slide.

    Attributes:
        scores: the slide's score file; those of its patient's other slides lie beside it.
        target: the folder to make.
        slide: the slide's file, None where the cohort names none.
        tilings: folder of the study's tilings, for the tissue's outline.
        task: of the model's target, None where unknown.
    """

    slide_id: str
    scores: Path
    target: Path
    slide: Path | None
    slide_mpp: float | None
    tilings: Path | None
    scale: ScaleName
    column: Column
    colours: ColourScale
    task: str | None
    caption: CaseCaption
    source: str
    formats: tuple[str, ...]
    frame: Frame
    levels: tuple[float, ...] | None
    max_tiles: int
    overwrite: bool
    shows: Shows = "score"
    gallery: GalleryOptions = field(default_factory=GalleryOptions)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedHeatmaps:
    """Heatmaps before they are drawn.

    Attributes:
        folder: of the output; a slide's files lie in `<slide_id>/<drawn>/`.
        drawn: the scale, and the class where there is one, as a folder's name.
        colours: of all slides.
        of: whose scores are drawn; empty where a model has but one column, or their mean.
        tasks: by slide.
        notes: sentences that the user should see.
        doubted: slides whose heatmaps are not to be believed; each says why.
        outdated: slides whose heatmaps that are there are of other scores than those of now.
    """

    folder: Path
    status_dir: Path
    run: RunSpec
    name: str
    drawn: str
    colours: ColourScale
    of: str
    tasks: Mapping[str, HeatmapTask]
    notes: tuple[str, ...]
    doubted: tuple[str, ...]
    outdated: tuple[str, ...]


def plan_heatmaps(request: HeatmapRequest) -> PlannedHeatmaps:
    """Find what is to be drawn, on which scale and in which colours.

    Raises:
        ConfigError: no scores there, or options that do not fit them.
    """
    _require_known_formats(request.formats)
    study, name = study_of(request.place, request.workers)
    files, damaged = score_files(request.place)
    # What can't be read fails by itself, with its reason.
    wanted = _wanted(request.slides, sorted({*files, *damaged}))
    first = next(iter(files.values()))
    task = task_of(request.place, study)
    scale = require_scale(
        request.scale,
        first.score_kind,
        task,
        contributions=first.contributions is not None,
        rollout=first.rollout is not None,
    )
    _require_several_members(request, scale, files)
    captions = read_captions(request.place / "predictions.csv")
    columns = {
        slide_id: pick_column(
            _names(file, scale), request.class_name, captions[file.case_id].predicted
        )
        for slide_id, file in files.items()
    }
    colours, unusable = _colours(request, files, columns, scale, task)
    names = _names(first, scale)
    by_prediction = request.class_name is None and len(names) > 2 and not names[0].isdigit()
    of = "the predicted class" if by_prediction else columns[first.slide_id].name
    shown = f"disagreement-{scale}" if request.shows == "disagreement" else scale
    drawn = f"{shown}-predicted" if by_prediction else f"{shown}-{of}" if of else shown
    if artifacts.portable_name_problem(drawn):
        drawn = f"{shown}-{names.index(of)}"
    folder = request.out or (study.folder / "heatmaps" / name if study else None)
    if folder is None:
        raise ConfigError(f"{request.place}: in no study; name where the output goes with --out")
    rows = {row.slide_id: row for row in study.cohort().rows} if study else {}
    tasks = {
        slide_id: HeatmapTask(
            slide_id=slide_id,
            scores=request.place / SCORES_NAME / f"{slide_id}.h5",
            target=folder / slide_id / drawn,
            slide=rows[slide_id].path if slide_id in rows else None,
            slide_mpp=rows[slide_id].mpp if slide_id in rows else None,
            tilings=study.folder / "tilings" if study else None,
            scale=scale,
            column=columns.get(slide_id, columns[first.slide_id]),
            colours=colours,
            task=task,
            caption=captions[files[slide_id].case_id if slide_id in files else slide_id],
            source=f"scores of {name}",
            formats=request.formats,
            frame=request.frame,
            levels=request.levels,
            max_tiles=request.max_tiles,
            overwrite=request.overwrite,
            shows=request.shows,
            gallery=request.gallery,
        )
        for slide_id in wanted
    }
    return PlannedHeatmaps(
        folder=folder,
        status_dir=study.status_folder if study else folder / "status",
        run=study.spec.run if study else RunSpec(workers=request.workers),
        name=name,
        drawn=drawn,
        colours=colours,
        of=of,
        tasks=tasks,
        notes=unusable,
        doubted=tuple(
            slide_id
            for slide_id in wanted
            if request.shows == "score"
            and slide_id in files
            and judgement_of(files[slide_id], scale, columns[slide_id].name).warning
        ),
        outdated=tuple(
            slide_id
            for slide_id, one in tasks.items()
            if slide_id in files and _is_of_other_scores(one.target, files[slide_id])
        ),
    )


def draw_heatmaps(planned: PlannedHeatmaps, request: HeatmapRequest, report: Reporter) -> RunReport:
    """Draw planned heatmaps; resumes where an earlier call stopped.

    Raises:
        FingerprintMismatch: there are heatmaps of other scores, and they are not to be replaced.
    """
    if planned.outdated and not request.overwrite:
        # Said at once: all of them would be refused slide by slide, each with its hashes.
        raise FingerprintMismatch(
            f"{planned.folder}: holds heatmaps of other scores than those of now "
            f"({len(planned.outdated)} of {len(planned.tasks)}; a newer bagscope, or another "
            "training, made the scores anew); draw them again with: "
            f"bagscope heatmap {request.place} --overwrite"
        )
    pictures = {"png", "svg", "gallery"}.intersection(request.formats)
    modules = (*WORKER_MODULES, *(_PICTURE_MODULES if pictures else ()))
    options = run_options(planned.run, request.shard, "local", preload=modules)
    folders = tuple(task.target.parent for task in planned.tasks.values())
    return run_cohort(
        [Job(slide_id=slide_id, payload=task) for slide_id, task in planned.tasks.items()],
        heatmap_one,
        stage=f"{STAGE}/{planned.name}/{planned.drawn}",
        status_dir=planned.status_dir,
        options=dataclasses.replace(options, sweep=folders),
        report=report,
    )


def heatmap_one(job: Job) -> StageResult:
    """Draw one slide, in a worker."""
    from bagscope.pipeline.heatmap_worker import heatmap_task

    return heatmap_task(job.payload)


def _require_known_formats(formats: Sequence[str]) -> None:
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"--formats: no format {name!r}{did_you_mean(name, FORMATS)}")
    if not formats:
        raise ConfigError(f"--formats names none; choose of {', '.join(FORMATS)}")


def study_of(place: Path, workers: int | None = None) -> tuple[Study | None, str]:
    """Return the study that a run or a prediction lies in, and what is made of it is called by.

    Raises:
        ConfigError: no such folder.
    """
    if not place.is_dir():
        raise ConfigError(f"{place}: no such folder; name a run, or a prediction")
    place = place.resolve()
    for above, name in (
        (place.parents[1], place.name),
        # A model's answers about two cohorts, and its own run, are three sets of heatmaps.
        (place.parents[min(2, len(place.parents) - 1)], f"{place.parent.name}.{place.name}"),
    ):
        if (above / STUDY_NAME).exists() or (above / COHORT_NAME).exists():
            return open_study(above, {"run": {"workers": workers}}), name
    return None, place.name


def score_files(place: Path) -> tuple[dict[str, ScoreFile], dict[str, str]]:
    """Return the readable score files of a run or a prediction and what others lack, by slide.

    Raises:
        ConfigError: there is none, or they are of different models.
    """
    from bagscope.mil.score_file import read_score_file

    folder = place / SCORES_NAME
    paths = sorted(folder.glob("[!.]*.h5"))
    if not paths:
        raise ConfigError(
            f"{folder}: no scores there; name a run that has come to its end, or a prediction"
        )
    files, damaged = {}, {}
    for path in paths:
        try:
            files[path.stem] = read_score_file(path)
        except ArtifactError as error:
            damaged[path.stem] = str(error)
    if not files:
        raise ConfigError(next(iter(damaged.values())))
    kinds = {(file.score_kind, file.score_names) for file in files.values()}
    # What an older bagscope wrote names no logits.
    logits = {file.contribution_names for file in files.values()} - {()}
    if len(kinds) > 1 or len(logits) > 1:
        raise ConfigError(f"{folder}: holds scores of different models; predict anew")
    return files, damaged


def _is_of_other_scores(target: Path, file: ScoreFile) -> bool:
    try:
        fields = artifacts.read_complete(target)["fields"]
    except SchemaError:
        return False
    return bool(fields.get("scores") != artifacts.fingerprint(file.fields))


def _names(file: ScoreFile, scale: ScaleName) -> tuple[str, ...]:
    """Return what the columns are of that a scale is made of."""
    if scale == "rollout":
        return ("0",)
    return file.contribution_names if scale == "contribution" else file.score_names


def _require_several_members(
    request: HeatmapRequest, scale: ScaleName, files: Mapping[str, ScoreFile]
) -> None:
    from bagscope.heatmaps.layers import has_disagreement

    if request.shows == "score":
        return
    if scale in ("contribution", "rollout"):
        raise ConfigError(
            f"--show disagreement: of {scale} the score files hold the members' mean alone; "
            "choose another --scale"
        )
    if not any(has_disagreement(file) for file in files.values()):
        raise ConfigError(
            f"--show disagreement: one model alone answered about each slide of {request.place}; "
            "predict with the ensemble (--members ensemble), or train with --repeats"
        )


def _wanted(slides: Sequence[str], there: Sequence[str]) -> tuple[str, ...]:
    for slide_id in slides:
        if slide_id not in there:
            raise ConfigError(f"--slide {slide_id}: has no scores{did_you_mean(slide_id, there)}")
    return tuple(dict.fromkeys(slides)) or tuple(there)


def task_of(place: Path, study: Study | None) -> str | None:
    """Return the task of the model's only target, None where that can't be known."""
    from bagscope.mil.bundle import BUNDLE_NAME, DESCRIPTION_NAME

    runs = (
        [place] if study is None else [place, study.folder / "runs" / place.resolve().parent.name]
    )
    for run in runs:
        path = run / BUNDLE_NAME / DESCRIPTION_NAME
        if path.is_file():
            models = artifacts.read_json(path)["models"].values()
            targets = list(next(iter(models))["targets"].values())
            return str(targets[0]["task"]) if len(targets) == 1 else None
    return None


def _colours(
    request: HeatmapRequest,
    files: Mapping[str, ScoreFile],
    columns: Mapping[str, Column],
    scale: ScaleName,
    task: str | None,
) -> tuple[ColourScale, tuple[str, ...]]:
    """Return the colours of all slides, and what stands in the way of some."""
    from bagscope.heatmaps.colours import shared_scale, usual_range
    from bagscope.heatmaps.layers import LayerKind, layer_values

    limits, shows = request.limits, request.shows
    if limits is not None and not limits[0] < limits[1]:
        raise ConfigError(f"--range {limits[0]:g} {limits[1]:g}: the second must be the larger")
    is_ratio = scale in RATIOS and shows == "score"
    if limits is not None and is_ratio and limits[0] <= 0:
        raise ConfigError(f"--range {limits[0]:g} …: a ratio is above 0; start above it")
    ranges, notes = [], []
    fixed = shows == "score" and scale in ("percentile", "probability")
    if limits is None and not fixed:
        for slide_id, file in files.items():
            kind = LayerKind(scale=scale, shows=shows, column=columns[slide_id])
            try:
                ranges.append(usual_range(layer_values(file, kind, files, task)))
            except ArtifactError as error:
                notes.append(f"{slide_id}: {str(error).removeprefix(f'{slide_id}: ')}")
    score_kind = next(iter(files.values())).score_kind
    colours = shared_scale(scale, score_kind, ranges, limits=limits, shows=shows)
    return colours, tuple(notes)
