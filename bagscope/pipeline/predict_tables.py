"""What a prediction leaves beside its score files: tables for people and programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bagscope import __version__, artifacts
from bagscope.errors import ArtifactError
from bagscope.mil.cases import Case
from bagscope.mil.prediction import combine, ood_columns, prediction_columns
from bagscope.mil.prediction_table import KEYS
from bagscope.mil.score_file import ScoreFile, read_score_file
from bagscope.pipeline.bundle import SCORES_NAME

if TYPE_CHECKING:
    from bagscope.mil.bundle import MemberPlace
    from bagscope.pipeline.predict import PlannedPrediction

TABLE_NAME = "predictions.csv"
RECORD_NAME = "predictions.json"
EMBEDDINGS_NAME = "embeddings.npz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What was written.

    Attributes:
        table: the predictions; None where no case has an answer.
        cases: that stand in it.
        flagged: those of them that are unlike the training bags.
        notes: sentences that the user should see.
    """

    table: Path | None
    cases: int
    flagged: tuple[str, ...]
    notes: tuple[str, ...]


def write_tables(
    planned: PlannedPrediction,
    cases: Sequence[Case],
    members: Mapping[str, str],
    failures: Mapping[str, str],
    *,
    each_member: bool,
    embeddings: bool,
    notes: Sequence[str],
) -> Written:
    """Write the table, its record and the embeddings of all cases that have an answer.

    Args:
        planned: the prediction.
        cases: that were asked about.
        members: hashes of those that were asked, by name.
        failures: why a case has no answer, by its first slide.
        each_member: a row per member in place of their mean.
        embeddings: whether to write them.
        notes: for the record.
    """
    folder = planned.place.folder
    found, missing = _answers(folder / SCORES_NAME, cases, members, failures)
    there = [case for case in cases if case.case_id in found]
    answers = [found[case.case_id] for case in there]
    table = folder / TABLE_NAME if answers else None
    flagged: tuple[str, ...] = ()
    if table is not None:
        columns = _columns(planned, there, answers, each_member=each_member)
        artifacts.write_text(table, _csv(columns))
        pairs = zip(columns["case_id"], columns["ood"], strict=True)
        flagged = tuple(dict.fromkeys(case_id for case_id, flag in pairs if flag == "1"))
        if embeddings:
            _write_embeddings(folder / EMBEDDINGS_NAME, there, answers)
    trusted = _assumed(answers)
    artifacts.write_json(
        folder / RECORD_NAME,
        {
            "schema_version": 1,
            "bagscope_version": __version__,
            "model": {
                "run": planned.bundle.run,
                "fingerprint": planned.bundle.fingerprint,
                "members": list(members),
                "default": planned.bundle.default,
            },
            "features": planned.bundle.origin.to_json(),
            "assumed": trusted,
            "thresholds": _thresholds(planned),
            "ood_false_alarm_rate": _false_alarm_rate(planned),
            "cases": len(there),
            "missing": missing,
            "flagged": list(flagged),
            "notes": list(notes),
        },
    )
    said = []
    if trusted:
        fields = ", ".join(trusted["fields"])
        said.append(f"taken on your word as those of {trusted['encoder']}: {fields} (unknown)")
    if all(planned.bundle.members[place.name].ood is None for place in planned.chosen):
        said.append(
            "no case is flagged as unlike the training slides: what those look like is not known"
        )
    return Written(table=table, cases=len(there), flagged=flagged, notes=tuple(said))


def _answers(
    folder: Path, cases: Sequence[Case], members: Mapping[str, str], failures: Mapping[str, str]
) -> tuple[dict[str, ScoreFile], dict[str, str]]:
    """Return the cases' answers by these members, and why a case has none."""
    found: dict[str, ScoreFile] = {}
    missing: dict[str, str] = {}
    for case in cases:
        first = case.slide_ids[0]
        if first in failures:
            missing[case.case_id] = failures[first]
            continue
        try:
            file = read_score_file(folder / f"{first}.h5")
        except ArtifactError:
            missing[case.case_id] = "not asked about yet"
            continue
        if file.fields["members"] == members and set(file.fields["slides"]) == set(case.slide_ids):
            found[case.case_id] = file
        else:
            missing[case.case_id] = "answered by another model; predict again with --overwrite"
    return found, missing


def _columns(
    planned: PlannedPrediction,
    cases: Sequence[Case],
    answers: Sequence[ScoreFile],
    *,
    each_member: bool,
) -> dict[str, list[Any]]:
    logits = np.stack([answer.logits for answer in answers], axis=1)
    distances = np.stack([answer.ood_distance for answer in answers], axis=1)
    count = len(planned.chosen)
    groups = [[place] for place in range(count)] if each_member else [list(range(count))]
    table: dict[str, list[Any]] = {}
    for group in groups:
        places = [planned.chosen[one] for one in group]
        alone = places[0] if each_member else None
        members = [planned.bundle.members[place.name] for place in places]
        predicted = combine(members, logits[group])
        part: dict[str, list[Any]] = {
            **_keys(cases, alone),
            **prediction_columns(planned.bundle.targets, cases, predicted),
            **ood_columns(distances[group]),
            "members": [len(group)] * len(cases),
        }
        for name, values in part.items():
            table.setdefault(name, []).extend(values)
    return table


def _keys(cases: Sequence[Case], member: MemberPlace | None) -> dict[str, list[Any]]:
    numbers = (0, 0, 0) if member is None else (member.repeat, member.fold, member.seed)
    columns: dict[str, list[Any]] = {
        "case_id": [case.case_id for case in cases],
        "patient_id": [case.patient_id for case in cases],
        "site": [case.site for case in cases],
    }
    for name, number in zip(KEYS[3:], numbers, strict=True):
        columns[name] = [number] * len(cases)
    return columns


def _csv(columns: Mapping[str, Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def _write_embeddings(path: Path, cases: Sequence[Case], answers: Sequence[ScoreFile]) -> None:
    with artifacts.atomic_file(path) as temporary, temporary.open("wb") as handle:
        np.savez(
            handle,
            case_id=np.array([case.case_id for case in cases]),
            member=np.array(answers[0].members),
            embedding=np.stack([answer.embedding for answer in answers]),
        )


def _assumed(answers: Sequence[ScoreFile]) -> dict[str, Any]:
    """Return what of all answers was taken on the user's word; empty for nothing."""
    stated = [answer.fields["assumed"] for answer in answers if "assumed" in answer.fields]
    if not stated:
        return {}
    fields = dict.fromkeys(name for one in stated for name in one["fields"])
    return {"encoder": stated[0]["encoder"], "fields": list(fields), "cases": len(stated)}


def _thresholds(planned: PlannedPrediction) -> dict[str, float]:
    members = [planned.bundle.members[place.name] for place in planned.chosen]
    names = members[0].thresholds
    return {name: float(np.mean([member.thresholds[name] for member in members])) for name in names}


def _false_alarm_rate(planned: PlannedPrediction) -> float | None:
    usual = [planned.bundle.members[place.name].ood for place in planned.chosen]
    rates = [one.false_alarm_rate for one in usual if one is not None and len(one.scores)]
    return max(rates) if rates else None
