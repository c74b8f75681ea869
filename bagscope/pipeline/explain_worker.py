"""The explain stage inside a worker: a case's files, checked, explained and written."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagscope import artifacts
from bagscope.arithmetic import compute_on
from bagscope.artifacts import Json
from bagscope.cohort.jobs import StageResult
from bagscope.errors import FingerprintMismatch, SchemaError
from bagscope.features.store import FeatureStore, SlideRecord
from bagscope.heatmaps.colours import shared_scale
from bagscope.heatmaps.geojson import hot_regions
from bagscope.heatmaps.table import write_table
from bagscope.mil.explain.effects import effect_table
from bagscope.mil.explain.search import search_table
from bagscope.mil.score_file import ScoreFile, read_score_file
from bagscope.pipeline.explain import Donor, ExplainTask
from bagscope.pipeline.explain_case import Explained, SlideTiles, explain_case
from bagscope.pipeline.explain_figure import draw
from bagscope.pipeline.explain_parts import HIGH, LOW
from bagscope.pipeline.explain_record import RECORD_NAME, control_columns, record_of, shown_of
from bagscope.wsi.geojson import write_regions
from bagscope.wsi.outline import Region
from bagscope.wsi.slide import Rgb

NUMERICS = 2
"""Raised by hand, with a changelog line, when the same case would be explained otherwise."""
EFFECTS_NAME = "effects.csv"
_COLOURS: Mapping[str, Rgb] = {HIGH: (213, 94, 0), LOW: (0, 114, 178)}


def explain_task(task: ExplainTask) -> StageResult:
    """Explain one case, unless that was done.

    Raises:
        FingerprintMismatch: it was explained otherwise, or its scores are of other members, or
            of other features, than those at hand.
        ArtifactError: features or scores that are missing, damaged or no numbers.
        SlideError: an annotation that can't be used.
    """
    compute_on(task.threads)
    files = {s: read_score_file(task.scores / f"{s}.h5") for s in task.slide_ids}
    donor = None if task.donor is None or task.donor.slide_id in task.slide_ids else task.donor
    needed = (*task.slide_ids, *((donor.slide_id,) if donor else ()))
    store = FeatureStore.open(task.location, only=needed)
    records = {slide_id: store.record(slide_id) for slide_id in needed}
    _require_same_sources(task, files, records)
    fields = _fields(task, files, records, donor)
    facts: dict[str, Json] = {"tiles": sum(len(file.scores) for file in files.values())}
    fingerprint = artifacts.fingerprint(fields)
    stored = _stored(task.folder)
    if stored is not None and not task.overwrite:
        artifacts.require_same(
            stored,
            fields,
            what=str(task.folder),
            remedy="choose another --out, or replace it with --overwrite",
        )
        return StageResult(outcome="skipped", fingerprint=fingerprint, facts=facts)
    explained = explain_case(task, files, store, donor)
    with artifacts.atomic_folder(task.folder, fields, replace=True) as folder:
        _write(folder, explained)
    warnings = tuple(dict.fromkeys(w for one in explained.tiles.values() for w in one.warnings))
    return StageResult(outcome="done", fingerprint=fingerprint, facts=facts, warnings=warnings)


# --- what it is made of ---------------------------------------------------------------------


def _require_same_sources(
    task: ExplainTask, files: Mapping[str, ScoreFile], records: Mapping[str, SlideRecord]
) -> None:
    hashes = {member.name: member.sha256 for member in task.members}
    for slide_id, file in files.items():
        if file.fields["members"] != hashes:
            raise FingerprintMismatch(
                f"{slide_id}: was scored by other members than those of the model; score it anew"
            )
        scored = file.fields["slides"][slide_id]
        if records[slide_id].fingerprint != scored:
            raise FingerprintMismatch(
                f"{slide_id}: its features in {task.location} are not those that it was scored "
                "from (other tiles, or other settings); score it anew, or name theirs with "
                "--features"
            )
        # Of another number of tiles it is said where scores and tiles meet.
        as_many = records[slide_id].shape[0] == len(file.scores)
        if as_many and not _same_places(records[slide_id].coords_l0, file.coords_l0):
            raise FingerprintMismatch(
                f"{slide_id}: its features in {task.location} state that they are those that it "
                "was scored from, and are of tiles at other places: the file was changed; extract "
                "the slide anew, or name unchanged features with --features"
            )


def _same_places(one: NDArray[np.int32] | None, other: NDArray[np.int32] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def _fields(
    task: ExplainTask,
    files: Mapping[str, ScoreFile],
    records: Mapping[str, SlideRecord],
    donor: Donor | None,
) -> dict[str, Json]:
    """Return what the explanation depends on."""
    return {
        "stage": "explain",
        "numerics": NUMERICS,
        "run": task.run,
        "case": task.case_id,
        "members": {member.name: member.sha256 for member in task.members},
        "panel": {member.name: member.sha256 for member in task.panel},
        "scores": {
            slide_id: artifacts.fingerprint(file.fields) for slide_id, file in files.items()
        },
        "features": {slide_id: record.fingerprint for slide_id, record in records.items()},
        "target": task.target,
        "unit": task.unit,
        "options": task.options.fields(),
        "annotations": {
            slide_id: artifacts.sha256_of_file(path) for slide_id, path in task.annotations.items()
        },
        "donor": None
        if donor is None
        else {
            "slide": donor.slide_id,
            "region": None if donor.region is None else artifacts.sha256_of_file(donor.region),
        },
    }


def _stored(folder: Path) -> dict[str, Json] | None:
    """Return what an explanation that is there was made of; None where there is none to trust."""
    try:
        fields: dict[str, Json] = artifacts.read_complete(folder)["fields"]
    except SchemaError:
        return None
    return None if artifacts.folder_faults(folder) else fields


# --- writing --------------------------------------------------------------------------------


def _write(folder: Path, explained: Explained) -> None:
    parts, subject = explained.parts, explained.asked.subject
    if parts.effects:
        effects = [controlled.effect for _, controlled in parts.effects]
        table = effect_table(effects)
        experiments = {"experiment": [experiment for experiment, _ in parts.effects]}
        controls = control_columns(parts.effects)
        _write_csv(folder / EFFECTS_NAME, {**experiments, **table, **controls})
    if parts.searches:
        tables = {name: search_table(subject, one) for name, one in parts.searches.items()}
        searches = [name for name, one in tables.items() for _ in one["removed"]]
        joined = {
            column: [value for one in tables.values() for value in one[column]]
            for column in next(iter(tables.values()))
        }
        _write_csv(folder / "search.csv", {"search": searches, **joined})
    alone = len(explained.tiles) == 1
    start = 0
    for slide_id, tiles in explained.tiles.items():
        rows = slice(start, start + len(tiles.values))
        start = rows.stop
        prefix = "" if alone else f"{slide_id}."
        write_table(
            folder / f"{prefix}tiles.{explained.task.options.table}",
            tiles.places,
            {
                explained.scale: tiles.values,
                **{name: values[rows] for name, values in parts.per_tile.items()},
                **_inside(explained, slide_id),
            },
            slide_id=slide_id,
            grid=tiles.file.grid,
        )
        if parts.searches and tiles.places.is_slide:
            _write_searched(folder / f"{prefix}regions.geojson", explained, tiles, rows, slide_id)
    png = draw(shown_of(explained))
    if png is not None:
        artifacts.write_bytes(folder / "overview.png", png)
    artifacts.write_json(folder / RECORD_NAME, record_of(explained))


def _inside(explained: Explained, slide_id: str) -> dict[str, Any]:
    if slide_id not in explained.annotations:
        return {}
    return {"inside_annotation": explained.annotations[slide_id].shares}


def _write_searched(
    path: Path, explained: Explained, tiles: SlideTiles, rows: slice, slide_id: str
) -> None:
    """Write the tiles that the searches took out as merged areas."""
    places = tiles.places
    regions: list[Region] = []
    for name, search in explained.parts.searches.items():
        taken = np.zeros(len(explained.asked.scores))
        taken[search.order] = 1.0
        unit = shared_scale("probability", tiles.file.score_kind)
        for region in hot_regions(places, taken[rows], 0.5, unit):
            kept = {k: v for k, v in region.measurements.items() if k in ("tiles", "area mm²")}
            regions.append(
                Region(
                    class_name=name.capitalize(),
                    polygons=region.polygons,
                    colour=_COLOURS[name],
                    measurements=kept,
                )
            )
    write_regions(path, regions, bounds_l0=tiles.bounds_l0, slide_name=slide_id)


def _write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    artifacts.write_text(path, text.getvalue())
