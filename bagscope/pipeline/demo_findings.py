"""What the demo found, held against what was planted: the line works, the task is not trivial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bagscope import artifacts
from bagscope.errors import ArtifactError
from bagscope.heatmaps.scores import Column, on_scale
from bagscope.heatmaps.tile_places import places_of
from bagscope.mil.evaluation.inputs import FloatArray
from bagscope.mil.evaluation.ranking import binary_auroc
from bagscope.mil.explain.annotations import INSIDE, overlap_shares
from bagscope.mil.plain_models import predict
from bagscope.pipeline.finished_run import read_run
from bagscope.pipeline.heatmap import score_files
from bagscope.pipeline.review_run import open_run
from bagscope.wsi.geojson import read_regions

if TYPE_CHECKING:
    from bagscope.mil.score_file import ScoreFile
    from bagscope.mil.targets import TargetSpec
    from bagscope.pipeline.finished_run import FinishedRun


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoFindings:
    """The demo in numbers; every AUROC is of slides, or tiles of slides, that no model had seen.

    Attributes:
        slides: that were tested.
        auroc: of the models, all slides pooled.
        auroc_low: lower end of its 95 % interval over patients.
        auroc_high: its upper end.
        linear_auroc: of a logistic regression on the mean of a slide's features.
        colour_auroc: of one on the mean colour of a slide's tissue.
        tile_auroc: of attention (times the slide's tiles) against the planted tumour, the tiles of
            all slides pooled.
        tile_auroc_within: the mean over slides with tumour of the AUROC among their own tiles.
            Both are None where the slides are so small that no tile is half inside tumour.
        tiles: how many there are.
        tumor_tiles: of these at least half inside tumour.
        warned_tumor: slides with tumour whose heatmap is not to be believed.
        warned_normal: slides without, likewise; on these there is nothing to find.
    """

    slides: int
    auroc: float
    auroc_low: float
    auroc_high: float
    linear_auroc: float
    colour_auroc: float
    tile_auroc: float | None
    tile_auroc_within: float | None
    tiles: int
    tumor_tiles: int
    warned_tumor: int
    warned_normal: int


def findings_of(run: Path, truth: Path) -> DemoFindings:
    """Hold an evaluated run of synthetic slides against their truth.

    Args:
        run: folder of the run, evaluated.
        truth: folder of a GeoJSON of tumour outlines per slide.

    Raises:
        ArtifactError: the run is not finished or not evaluated.
    """
    finished = read_run(run)
    (target,) = finished.targets
    numbers = artifacts.read_json(run / "metrics.json")["targets"][target.name]
    auroc = numbers["pooled"]["auroc"]
    scores, inside = _tiles(run, truth)
    within = [
        float(binary_auroc(is_tumor, values))
        for values, is_tumor in zip(scores, inside, strict=True)
        if is_tumor.any() and not is_tumor.all()
    ]
    all_inside = np.concatenate(inside)
    warned = _warned(finished, target)
    return DemoFindings(
        slides=numbers["cases"],
        auroc=auroc["value"],
        auroc_low=auroc["low"],
        auroc_high=auroc["high"],
        linear_auroc=numbers["baselines"]["linear"]["headline"]["value"],
        colour_auroc=colour_auroc(finished, target),
        tile_auroc=float(binary_auroc(all_inside, np.concatenate(scores))) if within else None,
        tile_auroc_within=float(np.mean(within)) if within else None,
        tiles=len(all_inside),
        tumor_tiles=int(all_inside.sum()),
        warned_tumor=sum(has for has in warned),
        warned_normal=sum(not has for has in warned),
    )


def colour_auroc(run: FinishedRun, target: TargetSpec) -> float:
    """Return the AUROC of a logistic regression on slides' mean colours, by the run's folds."""
    answers = run.answers(target)
    paths = {slide.slide_id: slide.path for slide in open_run(run.folder).slides}
    place = {str(case): row for row, case in enumerate(answers.case)}
    colours = np.stack([_mean_colour(paths[case]) for case in place])
    labels, patients = answers.truth[:, 0], answers.patient
    told, truth = [], []
    for split in run.plan.splits:
        train, test = (
            [place[case] for case in ids] for ids in ((*split.train, *split.val), split.test)
        )
        parts = colours[train], labels[train, None], patients[train], colours[test]
        told.append(predict("linear", target, *parts)[:, 1])
        truth.append(labels[test])
    return float(binary_auroc(np.concatenate(truth), np.concatenate(told)))


def _mean_colour(slide: Path | None) -> FloatArray:
    """Return the mean colour of a slide's tissue, by its truth mask: (3,)."""
    import cv2

    from bagscope.wsi.opening import open_slide
    from bagscope.wsi.reading import thumbnail

    assert slide is not None, "the run lies in a study"
    mask = cv2.imread(str(slide.with_suffix(".truth.png")), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise ArtifactError(f"{slide}: its truth mask is missing; make the demo anew")
    with open_slide(slide) as opened:
        small = thumbnail(opened, longest_px=max(mask.shape))
    tissue = cv2.resize(mask, small.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
    mean: FloatArray = small[tissue].mean(axis=0, dtype=np.float64)
    return mean


def _tiles(run: Path, truth: Path) -> tuple[list[FloatArray], list[NDArray[np.bool_]]]:
    """Return each slide's scores (n,) on one scale, and which tiles are tumour (n,) bool."""
    files, _ = score_files(run)
    scores: list[FloatArray] = []
    inside: list[NDArray[np.bool_]] = []
    for slide_id, file in files.items():
        scores.append(_ratio(file))
        places = places_of(file.coords_l0, file.grid, file.tile, len(file.scores))
        regions = read_regions(truth / f"{slide_id}.geojson", bounds_l0=places.area_l0)
        shares = overlap_shares(regions, places.coords_l0, places.extent_l0)
        inside.append(shares >= INSIDE)
    return scores, inside


def _ratio(file: ScoreFile) -> FloatArray:
    return on_scale(file.scores, file.score_kind, "ratio", Column(name="", index=None))


def _warned(run: FinishedRun, target: TargetSpec) -> list[bool]:
    """Return of each slide whose heatmap warns whether it has tumour."""
    answers = run.answers(target)
    has_tumor = dict(zip(answers.case.tolist(), answers.truth[:, 0] > 0, strict=True))
    judged = {slide.slide_id: slide.faithfulness for slide in open_run(run.folder).slides}
    return [bool(has_tumor[name]) for name, one in judged.items() if one and one["warning"]]
