"""The baselines' answers as a file beside a run's predictions, so that they are fitted once.

`baselines.csv` has a row per target, baseline, case and fold, with its predictions p_0, p_1, … in
the order of the target's classes; `baselines.json` says what they were made from and which are
missing, why, and holds the hash of the table.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.errors import ArtifactError
from bagscope.mil.baselines import BASELINES, Baseline, answers_to
from bagscope.mil.cases import Case
from bagscope.mil.evaluation.answers import Answers
from bagscope.mil.targets import TargetSpec

TABLE_NAME = "baselines.csv"
FACTS_NAME = "baselines.json"
SCHEMA_VERSION = 1
_KEYS = ("target", "baseline", "case_id", "patient_id", "site", "repeat", "fold")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineAnswers:
    """All baselines, by target.

    Attributes:
        answers: of those that there are.
        skipped: why the others are not there.
    """

    answers: Mapping[str, Mapping[Baseline, Answers]]
    skipped: Mapping[str, Mapping[Baseline, str]]


def write_baselines(folder: Path, found: BaselineAnswers, fields: Mapping[str, Json]) -> None:
    """Write the table and, last, what it was made from."""
    artifacts.write_text(folder / TABLE_NAME, _as_csv(found))
    artifacts.write_json(
        folder / FACTS_NAME,
        {
            "schema_version": SCHEMA_VERSION,
            "fields": dict(fields),
            "fingerprint": artifacts.fingerprint(fields),
            "skipped": {target: dict(reasons) for target, reasons in found.skipped.items()},
            "table_sha256": artifacts.sha256_of_file(folder / TABLE_NAME),
        },
    )


def read_baselines(
    folder: Path, targets: Sequence[TargetSpec], cases: Sequence[Case], fields: Mapping[str, Json]
) -> BaselineAnswers | None:
    """Return what was written for the same fields; None where there is nothing, or it changed."""
    try:
        facts = artifacts.read_json(folder / FACTS_NAME)
        if facts["schema_version"] != SCHEMA_VERSION:
            return None
        if facts["fingerprint"] != artifacts.fingerprint(fields):
            return None
        if facts["table_sha256"] != artifacts.sha256_of_file(folder / TABLE_NAME):
            return None
        text = (folder / TABLE_NAME).read_text(encoding="utf-8")
    except (ArtifactError, OSError, KeyError, TypeError):
        return None  # they are made again, whatever is wrong with them
    rows = list(csv.DictReader(io.StringIO(text)))
    place = {case.case_id: number for number, case in enumerate(cases)}
    answers: dict[str, dict[Baseline, Answers]] = {}
    for target in targets:
        answers[target.name] = {}
        width = len(target.classes) or 1
        for baseline in BASELINES:
            own = [r for r in rows if r["target"] == target.name and r["baseline"] == baseline]
            if own:
                answers[target.name][baseline] = answers_to(
                    target,
                    cases,
                    np.array([place[row["case_id"]] for row in own], np.int64),
                    np.array([int(row["repeat"]) for row in own], np.int64),
                    np.array([int(row["fold"]) for row in own], np.int64),
                    np.array([[float(row[f"p_{k}"]) for k in range(width)] for row in own]),
                )
    return BaselineAnswers(answers=answers, skipped=facts["skipped"])


def _as_csv(found: BaselineAnswers) -> str:
    widths = [one.predicted.shape[1] for own in found.answers.values() for one in own.values()]
    width = max(widths, default=0)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_KEYS, *(f"p_{k}" for k in range(width))])
    for target, own in found.answers.items():
        for baseline, one in own.items():
            keys = zip(
                one.case.tolist(), one.patient.tolist(), one.site.tolist(),
                one.repeat.tolist(), one.fold.tolist(), one.predicted.tolist(), strict=True,
            )  # fmt: skip
            for case, patient, site, repeat, fold, values in keys:
                # Every digit, so that reading it back changes no bit.
                cells = [*map(repr, values), *[""] * (width - len(values))]
                writer.writerow([target, baseline, case, patient, site, repeat, fold, *cells])
    return text.getvalue()
