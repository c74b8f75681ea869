"""What a pathologist drew, against the scores of a run: per slide in a worker, then over slides.

Coordinates are level-0 pixels (`_l0`); files are in QuPath's frame where they do not say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bagscope.artifacts import Json
from bagscope.errors import ArtifactError, ConfigError
from bagscope.heatmaps.tile_places import TilePlaces
from bagscope.mil.evaluation.bootstrap import Statistic, intervals
from bagscope.mil.evaluation.inputs import FloatArray, Value
from bagscope.mil.explain.annotations import (
    FROC_RATES,
    INSIDE,
    SlideDetections,
    TileMetrics,
    detections,
    froc,
    lesions_of,
    on_lesions,
    overlap_shares,
    tile_metrics,
)
from bagscope.mil.explain.question import Array
from bagscope.wsi.geojson import class_names, read_regions
from bagscope.wsi.roi import ENDINGS, load, require_inside
from bagscope.wsi.slide import RectL0

RADIUS_TILES = 2.0
"""A detection silences the tiles whose corners are no further away than so many sides."""
RESAMPLES = 2_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotated:
    """A slide's scores against its annotation.

    Attributes:
        shares: (n,) of each tile inside the drawn area.
        metrics: of the tiles.
        found: its detections, hottest first.
    """

    shares: Array
    metrics: TileMetrics
    found: SlideDetections

    def to_json(self) -> dict[str, Json]:
        """Return all numbers, NaN as None."""
        metrics = self.metrics
        return {
            "tiles_inside": metrics.positive,
            "auroc": or_none(metrics.auroc),
            "auprc": or_none(metrics.auprc),
            "dice": or_none(metrics.dice),
            "threshold": metrics.threshold,
            "lesions": self.found.lesions,
            "detections": {
                "scores": self.found.scores.tolist(),
                "lesion": self.found.lesion.tolist(),
            },
        }


def annotation_files(place: Path, slide_ids: Sequence[str]) -> dict[str, Path]:
    """Return the GeoJSON file of each slide that has one; a single file is of a single slide.

    Raises:
        ConfigError: no such file or folder, one file for several slides, or no file of any slide.
        SlideError: a slide with several files.
    """
    if not place.exists():
        raise ConfigError(f"--annotations {place}: no such GeoJSON file or folder")
    if place.is_file() and len(slide_ids) > 1:
        raise ConfigError(
            f"--annotations {place} is one file for {len(slide_ids)} slides; name its slide with "
            "--slide, or a folder with a file per slide"
        )
    found = {slide_id: load(place, slide_id) for slide_id in slide_ids}
    there = {slide_id: path for slide_id, path in found.items() if path is not None}
    if not there:
        endings = ", ".join(ENDINGS)
        raise ConfigError(
            f"--annotations {place}: has no file of the slides asked about; a file is "
            f"called by its slide's id, {slide_ids[0]}{ENDINGS[0]} (or {endings})"
        )
    return there


def require_classes(files: Mapping[str, Path], classes: Sequence[str] | None) -> None:
    """Refuse a class that no annotation has: it is most likely misspelt.

    Raises:
        ConfigError: names the class and those that are there.
        SlideError: a file can't be read.
    """
    if classes is None:
        return
    present = {name for path in files.values() for name in class_names(path)}
    known = {name.casefold() for name in present}
    for name in classes:
        if name.strip().casefold() not in known:
            listed = ", ".join(repr(one) if one else "unclassified" for one in sorted(present))
            raise ConfigError(
                f"--annotation-class {name!r}: no region has this class; the files have "
                f"{listed or 'no regions at all'}"
            )


def annotated(
    path: Path,
    places: TilePlaces,
    values: Array,
    *,
    slide_id: str,
    bounds_l0: RectL0,
    classes: Sequence[str] | None,
    threshold: float,
) -> Annotated:
    """Compare a slide's scores with its annotation; a file without regions says there is nothing.

    Args:
        path: of the annotation.
        places: of the tiles.
        values: (n,) on the scale that is shown.
        slide_id: for messages.
        bounds_l0: of the slide.
        classes: of the regions that count, letter case aside; all if None.
        threshold: from which a tile is called.

    Raises:
        SlideError: no readable annotation, or regions outside the slide.
        ArtifactError: tiles that have no places.
    """
    if not places.is_slide:
        raise ArtifactError(
            f"{slide_id}: its tiles have no coordinates, so that no annotation can be laid upon "
            "them; leave --annotations out"
        )
    regions = read_regions(path, bounds_l0=bounds_l0)
    require_inside(regions, bounds_l0, slide_name=slide_id, file_name=path.name)
    if classes is not None:
        wanted = {name.strip().casefold() for name in classes}
        regions = [region for region in regions if region.class_name.casefold() in wanted]
    shares = overlap_shares(regions, places.coords_l0, places.extent_l0)
    lesions = lesions_of(regions)
    rows = detections(values, places.coords_l0, radius_l0=RADIUS_TILES * places.extent_l0)
    return Annotated(
        shares=shares,
        metrics=tile_metrics(values, shares, threshold=threshold, inside=INSIDE),
        found=on_lesions(lesions, values, places.coords_l0, places.extent_l0, rows),
    )


# --- over slides ----------------------------------------------------------------------------


def over_slides(
    slides: Mapping[str, Mapping[str, Any]], patients: Mapping[str, str], *, seed: int = 0
) -> dict[str, Json]:
    """Sum up annotated slides: means over slides and FROC, each with an interval over patients.

    Args:
        slides: what `Annotated.to_json` says of each.
        patients: of each slide.
        seed: of the bootstrap's draws.
    """
    names = sorted(slides)
    groups = [patients[name] for name in names]
    statistics: dict[str, Statistic] = {
        metric: _mean(np.array([_number(slides[name][metric]) for name in names]))
        for metric in ("auroc", "auprc", "dice")
    }
    found = [
        SlideDetections(
            scores=np.array(slides[name]["detections"]["scores"], np.float64),
            lesion=np.array(slides[name]["detections"]["lesion"], np.int64),
            lesions=int(slides[name]["lesions"]),
        )
        for name in names
    ]
    lesions = sum(one.lesions for one in found)
    threshold = float(slides[names[0]]["threshold"])
    if lesions:
        statistics["froc"] = froc_statistic(found)
        statistics["lesion_sensitivity"] = _lesion_statistic(found, threshold)
    estimates = intervals(statistics, groups, resamples=RESAMPLES, seed=seed)
    said: dict[str, Json] = {
        "slides": len(names),
        "patients": len(set(groups)),
        "slides_with_lesions": sum(one.lesions > 0 for one in found),
        "lesions": lesions,
        "threshold": threshold,
        "detection_radius_tiles": RADIUS_TILES,
        "estimates": {name: estimate.to_json() for name, estimate in estimates.items()},
        "without_value": {
            metric: [name for name in names if slides[name][metric] is None]
            for metric in ("auroc", "auprc", "dice")
        },
    }
    if lesions:
        curve = froc(found)
        said["froc_rates"] = {f"{rate:g}": curve.sensitivity_at(rate) for rate in FROC_RATES}
        said["false_positives_per_slide"] = float(
            np.mean([((one.lesion < 0) & (one.scores >= threshold)).sum() for one in found])
        )
    return said


def froc_statistic(slides: Sequence[SlideDetections]) -> Statistic:
    """Return FROC's score of slides that count so often: the mean sensitivity at `FROC_RATES`."""
    best, lesion_of = _best_per_lesion(slides)
    miss = np.concatenate([one.scores[one.lesion < 0] for one in slides])
    miss_of = np.repeat(np.arange(len(slides)), [int((one.lesion < 0).sum()) for one in slides])
    order = np.argsort(-miss, kind="stable")
    miss, miss_of = miss[order], miss_of[order]

    def statistic(counts: FloatArray) -> Value:
        values = np.empty(len(counts))
        for place, times in enumerate(counts):
            false = np.cumsum(times[miss_of])
            weights = times[lesion_of]
            at_rates = []
            for rate in FROC_RATES:
                # The first false positive too many closes the curve; what scores higher is found.
                end = int(np.searchsorted(false, rate * times.sum(), side="right"))
                least = miss[end] if end < len(miss) else -math.inf
                at_rates.append(float(weights[best > least].sum()))
            total = weights.sum()
            values[place] = np.mean(at_rates) / total if total else math.nan
        return values

    return statistic


def _lesion_statistic(slides: Sequence[SlideDetections], threshold: float) -> Statistic:
    best, lesion_of = _best_per_lesion(slides)

    def statistic(counts: FloatArray) -> Value:
        weights = counts[:, lesion_of]
        total = weights.sum(axis=1)
        found = weights[:, best >= threshold].sum(axis=1)
        return np.where(total > 0, found / np.maximum(total, 1), np.nan)

    return statistic


def _best_per_lesion(slides: Sequence[SlideDetections]) -> tuple[Array, np.ndarray]:
    """Return the highest score on each lesion, −∞ for none, and the slide of each."""
    every = []
    for one in slides:
        best = np.full(one.lesions, -np.inf)
        hits = one.lesion >= 0
        np.maximum.at(best, one.lesion[hits], one.scores[hits])
        every.append(best)
    slide_of = np.repeat(np.arange(len(slides)), [one.lesions for one in slides])
    return np.concatenate(every), slide_of


def _mean(values: Array) -> Statistic:
    """Return the mean over the slides that have a value."""
    has = ~np.isnan(values)
    numbers = np.where(has, values, 0.0)

    def statistic(counts: FloatArray) -> Value:
        total = counts @ has
        return np.where(total > 0, counts @ numbers / np.maximum(total, 1), np.nan)

    return statistic


def estimate_text(estimate: Mapping[str, Any]) -> str:
    """Return an estimate with its interval, as people read it."""
    if estimate["value"] is None:
        return "not defined"
    if estimate["low"] is None:
        return f"{estimate['value']:.2f} (too few patients for an interval)"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def or_none(value: float) -> float | None:
    """Return a number as JSON can hold it."""
    return float(value) if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
