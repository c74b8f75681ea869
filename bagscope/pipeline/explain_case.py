"""Explaining one case: its members asked, its heatmap judged, its annotations laid upon it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bagscope.errors import ArtifactError, FingerprintMismatch
from bagscope.features.store import FeatureStore
from bagscope.heatmaps.bag_scores import bag_scores
from bagscope.heatmaps.choices import ScaleName
from bagscope.heatmaps.geojson import LEVELS
from bagscope.heatmaps.scores import Column, on_scale, pick_column, require_scale
from bagscope.heatmaps.tile_places import TilePlaces, places_of
from bagscope.mil.cases import Case
from bagscope.mil.explain.annotations import INSIDE
from bagscope.mil.explain.effects import Subject
from bagscope.mil.explain.faithfulness import Agreement, agreement, order_of
from bagscope.mil.explain.members import member_rollout, member_scores, member_subject
from bagscope.mil.explain.pools import AttentionPool, Rows
from bagscope.mil.explain.question import Array
from bagscope.mil.member import Member, load_member
from bagscope.mil.score_file import ScoreFile, read_score_file
from bagscope.mil.sources import StoreSource
from bagscope.pipeline.explain import Donor, ExplainTask
from bagscope.pipeline.explain_annotations import Annotated, annotated
from bagscope.pipeline.explain_gradients import Gradients, gradients_of
from bagscope.pipeline.explain_parts import Asked, Parts, parts_of
from bagscope.pipeline.predict_worker import MemberFolder
from bagscope.wsi.slide import RectL0

_MEMBERS_KEPT = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideTiles:
    """A slide's tiles: where they lie and what the model's heatmap says of them.

    Attributes:
        values: (n,) on the scale that is shown.
        bounds_l0: the corner of QuPath's frame.
        warnings: about what had to be guessed.
    """

    file: ScoreFile
    places: TilePlaces
    values: Array
    bounds_l0: RectL0
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """All that was found out about a case.

    Attributes:
        answers: (A,) of the whole bag.
        decided: column decided for, below 0 where nothing is.
        scale: of the scores by which tiles are hot.
        annotations: by slide.
        tiles: by slide, in the case's order.
    """

    task: ExplainTask
    asked: Asked
    answers: Array
    decided: int
    scale: ScaleName
    parts: Parts
    gradients: Gradients | None
    agreement: Agreement | None
    annotations: Mapping[str, Annotated]
    tiles: Mapping[str, SlideTiles]


def explain_case(
    task: ExplainTask, files: Mapping[str, ScoreFile], store: FeatureStore, donor: Donor | None
) -> Explained:
    """Ask a case's members about it.

    Args:
        task: what is asked for.
        files: the scores of its slides.
        store: of its features, and the donor's.
        donor: None where no tile is transplanted into this case.
    """
    members = [_member(member) for member in task.members]
    cases = [Case(case_id=task.case_id, patient_id="", slide_ids=task.slide_ids)]
    if donor is not None:
        own = (donor.slide_id,)
        cases.append(Case(case_id=donor.slide_id, patient_id="", slide_ids=own))
    source = StoreSource(store, cases)
    subject = member_subject(
        members,
        source,
        0,
        donors=range(1, len(cases)),
        target=task.target,
        model_id=", ".join(member.name for member in task.members),
        device=task.device,
    )
    answers = subject.pool.answers([subject.rows])
    decided = int(subject.pool.question.decided(answers)[0])
    column = _column(task, subject, decided, answers[0])
    name = subject.pool.question.columns[column]
    tiles = _tiles(task, files, name)
    scores = np.concatenate([tiles[slide_id].values for slide_id in task.slide_ids])
    _require_as_many(task.case_id, len(scores), len(subject.rows))
    drawn = {
        slide_id: _annotated(task, path, tiles[slide_id], slide_id)
        for slide_id, path in task.annotations.items()
    }
    asked = Asked(
        subject=subject,
        scores=scores,
        column=column,
        is_closed=_is_closed(task, members, source, subject),
        unit=task.unit,
        marked=_marked(task, drawn),
        donated=None if donor is None else _donated(task, donor, subject, name),
        donor="" if donor is None else donor.slide_id,
        donor_region=donor is not None and donor.region is not None,
    )
    parts = parts_of(asked, task.options)
    gradients = None
    if "gradients" in task.options.wanted:
        gradients = gradients_of(
            members, source, 0, target=task.target, column=column, device=task.device
        )
        parts.per_tile["integrated_gradients"] = gradients.integrated
        parts.per_tile["gradient_times_input"] = gradients.times_input
    if "rollout" in task.options.wanted:
        rolled = member_rollout(members, source, 0, device=task.device)
        if rolled is not None:
            parts.per_tile["rollout"] = rolled.astype(np.float64)
        elif task.options.methods is not None:
            parts.left_out.append(
                "rollout: this model has no layers of attention, or none that can be rolled out."
            )
    if task.donor is not None and donor is None:
        parts.left_out.append("transplant: the slide is the donor itself.")
    return Explained(
        task=task,
        asked=asked,
        answers=answers[0],
        decided=decided,
        scale=_scale(task, files),
        parts=parts,
        gradients=gradients,
        agreement=_agreement(task, source, files, name, parts.left_out),
        annotations=drawn,
        tiles=tiles,
    )


def _column(task: ExplainTask, subject: Subject, decided: int, answers: Array) -> int:
    columns = subject.pool.question.columns
    if task.options.class_name is not None:
        return columns.index(task.options.class_name)
    return decided if decided >= 0 else int(answers.argmax())


def _is_closed(
    task: ExplainTask, members: Sequence[Member], source: StoreSource, subject: Subject
) -> bool:
    if len(members) == 1:
        return isinstance(subject.pool, AttentionPool)
    # An ensemble's members are of one kind: what holds for the first holds for all.
    first = member_subject(members[:1], source, 0, target=task.target, device=task.device)
    return isinstance(first.pool, AttentionPool)


def _scale(task: ExplainTask, files: Mapping[str, ScoreFile]) -> ScaleName:
    kind = next(iter(files.values())).score_kind
    return require_scale(None, kind, task.task)


def _tiles(task: ExplainTask, files: Mapping[str, ScoreFile], answer: str) -> dict[str, SlideTiles]:
    """Return each slide's tiles with the scores that its heatmap shows."""
    scale = _scale(task, files)
    return {
        slide_id: _tiles_of(
            files[slide_id],
            on_scale(
                files[slide_id].scores,
                files[slide_id].score_kind,
                scale,
                _shown_column(files[slide_id].score_names, answer),
                bag_scores=bag_scores(files[slide_id], files),
                task=task.task,
            ),
        )
        for slide_id in task.slide_ids
    }


def _tiles_of(file: ScoreFile, values: Array) -> SlideTiles:
    places = places_of(file.coords_l0, file.grid, file.tile, len(file.scores))
    bounds, warnings = places.area_l0, places.notes
    if places.is_slide and "bounds_l0" not in file.tile:
        right, bottom = (places.coords_l0.max(axis=0) + int(places.extent_l0)).tolist()
        bounds = RectL0(x_l0=0, y_l0=0, width_l0=right, height_l0=bottom)
        warnings += ("the slide's bounds are not stated: QuPath's frame is taken for level 0",)
    return SlideTiles(file=file, places=places, values=values, bounds_l0=bounds, warnings=warnings)


def _shown_column(names: Sequence[str], answer: str | None) -> Column:
    """Return the scores of the class that is explained, where each class has its own."""
    return pick_column(names, answer if answer in names else None)


def _annotated(task: ExplainTask, path: Path, tiles: SlideTiles, slide_id: str) -> Annotated:
    scale = _scale(task, {slide_id: tiles.file})
    levels = LEVELS[scale]
    return annotated(
        path,
        tiles.places,
        tiles.values,
        slide_id=slide_id,
        bounds_l0=tiles.bounds_l0,
        classes=task.options.annotation_classes,
        # Half the probability is a logit of 0.
        threshold=levels[0] if levels else 0.0,
    )


def _marked(task: ExplainTask, drawn: Mapping[str, Annotated]) -> Rows | None:
    """Return the case's rows inside annotations; None unless every slide of it has a file."""
    if not drawn or any(slide_id not in drawn for slide_id in task.slide_ids):
        return None
    inside = [drawn[slide_id].shares >= INSIDE for slide_id in task.slide_ids]
    return np.flatnonzero(np.concatenate(inside))


def _require_as_many(name: str, scores: int, tiles: int) -> None:
    if scores != tiles:
        raise FingerprintMismatch(
            f"{name}: has {scores} scores and features of {tiles} tiles; score it anew"
        )


def _donated(task: ExplainTask, donor: Donor, subject: Subject, answer: str) -> Rows:
    """Return the donor's rows in the pool, hottest first by its own heatmap."""
    file = read_score_file(task.scores / f"{donor.slide_id}.h5")
    column = _shown_column(file.score_names, answer)
    values = on_scale(file.scores, file.score_kind, "percentile", column, task=task.task)
    rows = subject.rows_of(1)
    _require_as_many(donor.slide_id, len(values), len(rows))
    order = order_of(values)
    if donor.region is not None:
        own = _tiles_of(file, values)
        region = annotated(
            donor.region,
            own.places,
            values,
            slide_id=donor.slide_id,
            bounds_l0=own.bounds_l0,
            classes=None,
            threshold=0.0,
        )
        order = order[region.shares[order] >= INSIDE]
        if not len(order):
            raise ArtifactError(
                f"{donor.slide_id}: no tile lies at least half inside {donor.region.name}; draw a "
                "larger region"
            )
    return rows[order]


def _agreement(
    task: ExplainTask,
    source: StoreSource,
    files: Mapping[str, ScoreFile],
    answer: str,
    left_out: list[str],
) -> Agreement | None:
    """Compare what every fold's member says of the tiles."""
    if "agreement" not in task.options.wanted:
        return None
    if len(task.panel) < 2 or source.lengths[0] < 2:
        left_out.append("agreement: it takes two members and two tiles.")
        return None
    file, scale = next(iter(files.values())), _scale(task, files)
    members = [_member(member) for member in task.panel]
    each = []
    for scores in member_scores(members, source, 0, device=task.device):
        column = _shown_column(file.score_names, answer)
        if scores.shape[1] != len(file.score_names):  # a member that was tuned to other branches
            column = Column(name="", index=None if scores.shape[1] > 1 else 0)
        each.append(on_scale(scores, file.score_kind, scale, column, task=task.task))
    return agreement(each)


@lru_cache(maxsize=_MEMBERS_KEPT)
def _member(member: MemberFolder) -> Member:
    return load_member(member.folder)
