"""What a worker does for a case: asks a model's members about it and keeps what they say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from bagscope import artifacts
from bagscope.arithmetic import compute_on
from bagscope.artifacts import Json
from bagscope.cohort.jobs import Job, StageResult
from bagscope.errors import ArtifactError, FingerprintMismatch
from bagscope.features.store import FeatureStore, SlideRecord
from bagscope.mil.cases import Case
from bagscope.mil.explain.members import member_scores
from bagscope.mil.explain.question import Array
from bagscope.mil.feature_origin import FeatureOrigin, compare
from bagscope.mil.member import Member, load_member
from bagscope.mil.prediction import Answer, Panel, logit_names, score_names
from bagscope.mil.score_file import ScoreFile, read_score_file, write_score_file
from bagscope.mil.sources import StoreSource
from bagscope.pipeline.judging import judged

NUMERICS = 4
"""Raised by hand, with a changelog line, when the same members would say other numbers."""
_MEMBERS_KEPT = 32
"""Loaded members, of a few MB each, that a worker keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberFolder:
    """Where a member lies, and the hash of its JSON, which holds that of its weights."""

    name: str
    folder: Path
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTask:
    """All that a worker needs to ask members about one case.

    Attributes:
        location: of the feature store.
        out: folder of the score files.
        origin: of the features that the members were trained on; not compared if None.
        assume: the encoder that unknown features are vouched to be of.
        others: members that saw the case in training: their tile scores are compared, no more.
    """

    case: Case
    members: tuple[MemberFolder, ...]
    location: str
    out: Path
    device: str
    threads: int
    overwrite: bool
    origin: FeatureOrigin | None = None
    assume: str | None = None
    others: tuple[MemberFolder, ...] = ()


def score_one(job: Job) -> StageResult:
    """Ask about one case, in a worker, or find that it was asked.

    Raises:
        FingerprintMismatch: features that the members do not know, or an answer of others.
    """
    task: ScoreTask = job.payload
    compute_on(task.threads)
    slide_ids = task.case.slide_ids
    store = FeatureStore.open(task.location, only=slide_ids)
    records = [store.record(slide_id) for slide_id in slide_ids]
    fields, assumed = _fields(task, records)
    fingerprint = artifacts.fingerprint(fields)
    made = all(_is_made(task, slide_id, fields) for slide_id in slide_ids)
    facts: dict[str, Json] = {"tiles": sum(record.shape[0] for record in records)}
    if assumed:
        facts["assumed"] = {"encoder": task.assume, "fields": list(assumed)}
    if not made:
        panel = _panel(task.members, task.device)
        source = StoreSource(store, [task.case])
        answer = panel.ask(source)
        faithfulness = judged(answer, panel.members, _others_scores(task, panel, source))
        for place, record in enumerate(records):
            file = _file_of(task, answer, place, record, fields, faithfulness)
            write_score_file(task.out / f"{record.slide_id}.h5", file)
            artifacts.step("slide-scored")
    return StageResult(outcome="skipped" if made else "done", fingerprint=fingerprint, facts=facts)


def _others_scores(task: ScoreTask, panel: Panel, source: StoreSource) -> list[Array]:
    """Return what models of the same kind that saw the case in training say of its tiles."""
    name = panel.members[0].recipe.aggregator.name
    others = [other for other in map(_member, task.others) if other.recipe.aggregator.name == name]
    return member_scores(others, source, 0, device=task.device)


@lru_cache(maxsize=1)
def _panel(members: tuple[MemberFolder, ...], device: str) -> Panel:
    # A worker is asked about one case after another by the same members.
    return Panel([_member(member) for member in members], device)


@lru_cache(maxsize=_MEMBERS_KEPT)
def _member(member: MemberFolder) -> Member:
    # Of repeated folds, each case has another panel of the same members.
    return load_member(member.folder)


def _fields(task: ScoreTask, records: list[SlideRecord]) -> tuple[dict[str, Json], tuple[str, ...]]:
    """Return what the answer depends on, and which unknown fields were taken on trust."""
    assumed: tuple[str, ...] = ()
    if task.origin is not None:
        for record in records:
            found = compare(task.origin, record, task.assume)
            if found.fault:
                raise FingerprintMismatch(f"{record.slide_id}: {found.fault}")
            assumed = tuple(dict.fromkeys((*assumed, *found.assumed)))
    fields: dict[str, Json] = {
        "stage": "scores",
        "numerics": NUMERICS,
        "members": {member.name: member.sha256 for member in task.members},
        "case": task.case.case_id,
        "slides": {record.slide_id: record.fingerprint for record in records},
    }
    if task.others:
        fields["others"] = {member.name: member.sha256 for member in task.others}
    if assumed:
        fields["assumed"] = {"encoder": task.assume, "fields": list(assumed)}
    return fields, assumed


def _is_made(task: ScoreTask, slide_id: str, fields: dict[str, Json]) -> bool:
    path = task.out / f"{slide_id}.h5"
    if not path.exists():
        return False
    try:
        stored = read_score_file(path).fields
    except ArtifactError:
        return False  # a damaged file is no reason to stop: it is made again
    if artifacts.fingerprint(stored) == artifacts.fingerprint(fields):
        return True
    if not task.overwrite:
        artifacts.require_same(
            stored,
            fields,
            what=str(path),
            remedy="choose another --name, or replace it with --overwrite",
        )
    return False


def _file_of(
    task: ScoreTask,
    answer: Answer,
    place: int,
    record: SlideRecord,
    fields: dict[str, Json],
    faithfulness: dict[str, Json],
) -> ScoreFile:
    own = answer.tile_slide == place
    scores, added = answer.scores[own], answer.contributions
    first = _panel(task.members, task.device).members[0]
    return ScoreFile(
        slide_id=record.slide_id,
        case_id=task.case.case_id,
        fields=fields,
        members=tuple(member.name for member in task.members),
        scores=scores,
        score_kind=answer.score_kind,
        score_names=score_names(first.targets, scores.shape[1]),
        coords_l0=record.coords_l0,
        grid=record.grid,
        # JSON knows no NaN; what is not known is not stated.
        tile={name: value for name, value in record.attributes.items() if _is_known(value)},
        logits=answer.logits,
        embedding=answer.embedding,
        ood_distance=answer.ood_distance,
        member_scores=answer.member_scores[:, own],
        contributions=None if added is None else added[own],
        contribution_bias=answer.contribution_bias,
        contribution_names=logit_names(first.objective),
        rollout=None if answer.rollout is None else answer.rollout[own],
        faithfulness=faithfulness,
    )


def _is_known(value: object) -> bool:
    return not isinstance(value, float) or bool(np.isfinite(value))
