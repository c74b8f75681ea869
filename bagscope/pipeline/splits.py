"""Splits of a study: what the command and the library call."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bagscope.artifacts import portable_name_problem
from bagscope.errors import ConfigError
from bagscope.features.store import FeatureStore
from bagscope.mil.cases import CaseTable, Per, cases_of
from bagscope.mil.splits.checking import SplitFindings, examine_splits
from bagscope.mil.splits.duplicates import judge_shared_tiles, shared_tiles
from bagscope.mil.splits.files import read_splits, was_edited, write_splits
from bagscope.mil.splits.making import make_splits
from bagscope.mil.splits.plan import (
    DEFAULT_NAME,
    SHARED_OPTIONS,
    Side,
    SplitPlan,
    SplitSpec,
)
from bagscope.mil.splits.strata import Patient, patients_of
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.study import COHORT_NAME, STUDY_NAME, Study, open_study
from bagscope.specs import parse_spec

FOLDER_NAME = "splits"


@dataclass(frozen=True, kw_only=True, slots=True)
class SideSummary:
    """What stands on one side of one split.

    Attributes:
        split: its name.
        site: that it holds out; empty for none.
        counts: patients by class, of survival by outcome; of a number, nothing.
        median: of a number or a time; None for classes.
    """

    split: str
    site: str
    side: Side
    patients: int
    slides: int
    counts: dict[str, int]
    median: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeSplits:
    """A plan, where it lies, and whether its file is new or changed."""

    plan: SplitPlan
    table: CaseTable
    path: Path
    written: bool


def splits_path(study: Study, name: str) -> Path:
    """Return where a study's splits of a name lie.

    Raises:
        ConfigError: the name can't be a file's.
    """
    if problem := portable_name_problem(name):
        raise ConfigError(f"--name {name!r} {problem}; it must be able to be a file name")
    return study.folder / FOLDER_NAME / f"{name}.csv"


def split_spec(study: Study, given: Mapping[str, Any] | None = None) -> SplitSpec:
    """Return how a study's cases are to be split: its own options, and over them given ones.

    Where another method is given, the options of the study's own method are left aside. A file
    that study.yaml names lies relative to the study, a given one to the working directory.

    Raises:
        ConfigError: an option that does not fit, or that the method makes no use of.
    """
    chosen = {name: value for name, value in (given or {}).items() if value is not None}
    if "file" in chosen:
        chosen.setdefault("method", "fixed")
    own = study.spec.splits.model_dump(exclude_unset=True)
    if own.get("file"):
        own["file"] = str(study.folder / own["file"])
    if chosen.get("method", study.spec.splits.method) != study.spec.splits.method:
        own = {name: value for name, value in own.items() if name in SHARED_OPTIONS}
    return parse_spec(SplitSpec, {**own, **chosen}, where="options")


def make_study_splits(
    study: Study,
    targets: Sequence[TargetSpec],
    spec: SplitSpec,
    *,
    per: Per,
    name: str = DEFAULT_NAME,
    overwrite: bool = False,
    dry_run: bool = False,
) -> MadeSplits:
    """Divide the labelled cases of a study, and write `splits/<name>.csv`.

    Raises:
        CohortError: labels or patients that can't be divided as asked.
        FingerprintMismatch: other splits of that name are there, and `overwrite` is not set.
    """
    path = splits_path(study, name)
    table = cases_of(study.cohort(), targets, per=per)
    plan = make_splits(table, spec)
    written = False if dry_run else write_splits(plan, path, overwrite=overwrite)
    return MadeSplits(plan=plan, table=table, path=path, written=written)


def check_study_splits(
    place: Path,
    name: str | None = None,
    *,
    features: Path | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> tuple[Path, SplitFindings]:
    """Look for whatever is wrong with splits; return their path and what was found.

    Args:
        place: a study, or the file of its splits.
        name: of the splits of a study; "default" if not set.
        features: a feature folder of the study, in which to look for tissue scanned twice.
        advance: is told (done, total) after each slide of the features.

    Raises:
        ConfigError: no such study.
        ArtifactError: no such splits, or no features.
    """
    if place.is_file():
        if name is not None:
            raise ConfigError(f"--name {name!r} belongs to a study, and {place} is a file")
        path, study = place, _study_of(place)
    else:
        study = open_study(place)
        path = splits_path(study, name or DEFAULT_NAME)
    plan = read_splits(path)
    table = None
    slides: dict[str, str] = {}
    notes: list[str] = []
    if study is None:
        notes.append("no study beside the splits: classes, and who is missing, were not looked at")
        slides = dict(plan.patient_of)
    else:
        cohort = study.cohort()
        slides = {row.slide_id: row.patient_id for row in cohort.rows}
        table = cases_of(cohort, plan.targets, per=plan.per or _per_of(plan, slides))
        notes += table.notes
    found = examine_splits(plan, table)
    if edited := was_edited(plan, path):
        notes.append("the table was edited since it was made")
    elif edited is None:
        notes.append("no settings beside the table: classes were not looked at")
    if features is None:
        notes.append("pass --features FOLDER to look for tissue that was scanned twice")
        shared = SplitFindings()
    else:
        pairs = shared_tiles(FeatureStore.open(features), slides, advance)
        shared = judge_shared_tiles(plan, pairs, table)
    return path, replace(
        found,
        faults=(*found.faults, *shared.faults),
        notes=(*notes, *found.notes, *shared.notes),
    )


def _study_of(path: Path) -> Study | None:
    folder = path.absolute().parent.parent
    if path.absolute().parent.name != FOLDER_NAME:
        return None
    there = (folder / STUDY_NAME).exists() or (folder / COHORT_NAME).exists()
    return open_study(folder) if there else None


def _per_of(plan: SplitPlan, slides: dict[str, str]) -> Per:
    """Return what the cases of a table without settings are."""
    return "slide" if plan.patient_of.keys() & slides.keys() else "patient"


def summarise_splits(made: MadeSplits) -> list[SideSummary]:
    """Return one summary per split and side."""
    table = made.table
    patients = patients_of(table)
    slides_of = {case.case_id: len(case.slide_ids) for case in table.cases}
    summaries = []
    for split in made.plan.splits:
        for side, case_ids in split.sides():
            cases = frozenset(case_ids)
            chosen = [patient for patient in patients if cases.issuperset(patient.case_ids)]
            numbers = [patient.number for patient in chosen if patient.number is not None]
            summaries.append(
                SideSummary(
                    split=split.name,
                    site=split.site,
                    side=side,
                    patients=len(chosen),
                    slides=sum(slides_of[case_id] for case_id in case_ids),
                    counts=_counts(chosen, table.targets[0] if table.targets else None),
                    median=statistics.median(numbers) if numbers else None,
                )
            )
    return summaries


def _counts(patients: Sequence[Patient], target: TargetSpec | None) -> dict[str, int]:
    if target is None or target.task == "regression":
        return {}
    found = Counter(label for patient in patients for label in patient.labels)
    if target.task == "survival":
        labelled = sum(patient.number is not None for patient in patients)
        return {"event": found["event"], "censored": labelled - found["event"]}
    return {name: found[name] for name in target.classes}
