"""Patients, the strata that a split keeps apart, and how they are dealt and drawn.

Nothing here draws random numbers: patients are put into the order of a keyed hash of their ids.
So a split depends on seed and ids alone, not on the table's order or a library's version.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bagscope.mil.cases import Case, CaseTable
from bagscope.mil.targets import TargetSpec, Value, is_missing

EVENT = "event"
"""The one class that every side needs of survival."""
MOST_BINS = 10
"""Quantiles of a regression target; of survival times there are `MOST_TIME_BINS` per outcome."""
MOST_TIME_BINS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Patient:
    """What a split moves as one.

    Attributes:
        labels: the classes that the patient's cases have, of the first target; of survival
            `EVENT`, or nothing where censored; empty for numbers and for missing labels.
        number: mean of the cases' values or times, of regression and survival.
        sites: of the cases.
    """

    patient_id: str
    case_ids: tuple[str, ...]
    labels: frozenset[str] = frozenset()
    number: float | None = None
    sites: frozenset[str] = frozenset()


def patients_of(table: CaseTable) -> list[Patient]:
    """Return the patients of a table, in order of name."""
    groups: dict[str, list[Case]] = {}
    for case in sorted(table.cases, key=lambda case: case.case_id):
        groups.setdefault(case.patient_id, []).append(case)
    target = table.targets[0] if table.targets else None
    return [_patient(name, groups[name], target) for name in sorted(groups)]


def _patient(patient_id: str, cases: Sequence[Case], target: TargetSpec | None) -> Patient:
    labels: frozenset[str] = frozenset()
    number = None
    if target is not None:
        values = [case.targets[target.name] for case in cases]
        values = [value for value in values if not is_missing(value)]
        labels = frozenset(label for value in values for label in labels_of(target, value))
        if values and target.task in ("regression", "survival"):
            number = sum(value[0] for value in values) / len(values)
    return Patient(
        patient_id=patient_id,
        case_ids=tuple(case.case_id for case in cases),
        labels=labels,
        number=number,
        sites=frozenset(case.site for case in cases),
    )


def labels_of(target: TargetSpec, value: Value) -> tuple[str, ...]:
    """Return the classes of one label that is not missing."""
    if target.task == "survival":
        return (EVENT,) if value[1] else ()
    if target.task == "multilabel":
        return tuple(name for name, on in zip(target.classes, value, strict=True) if on)
    return (target.classes[int(value[0])],) if target.is_categorical else ()


def needed_classes(target: TargetSpec) -> tuple[str, ...]:
    """Return the classes that a side can't do without."""
    return (EVENT,) if target.task == "survival" else target.classes


# --- strata ---------------------------------------------------------------------------------


def strata_of(
    patients: Sequence[Patient], target: TargetSpec | None, *, parts: int
) -> dict[str, str]:
    """Return the stratum of every patient, by id.

    Classes: the patient's classes together. Numbers: quantiles. Survival: quantiles of the time,
    apart for events and censored. Patients without a label are a stratum of their own.

    Args:
        patients: to be divided.
        target: the first one; None for one stratum of all.
        parts: how many parts they will be divided into; a bin holds that many where it can.
    """
    if target is None:
        return {patient.patient_id: "" for patient in patients}
    if target.task in ("regression", "survival"):
        return _binned(patients, target, parts)
    return _combined(patients)


def _binned(patients: Sequence[Patient], target: TargetSpec, parts: int) -> dict[str, str]:
    strata = {patient.patient_id: "" for patient in patients}
    most = MOST_TIME_BINS if target.task == "survival" else MOST_BINS
    for outcome in (frozenset[str](), frozenset({EVENT})):
        group = [p for p in patients if p.number is not None and p.labels == outcome]
        if not group:
            continue
        numbers = np.array([p.number for p in group], np.float64)
        bins = min(most, max(1, len(group) // parts))
        edges = np.quantile(numbers, np.arange(1, bins) / bins)
        for patient, bin_ in zip(group, np.searchsorted(edges, numbers, "right"), strict=True):
            strata[patient.patient_id] = f"{'+'.join(sorted(outcome))} {int(bin_):02d}"
    return strata


def _combined(patients: Sequence[Patient]) -> dict[str, str]:
    """Return combinations of classes, named so that those of one rare class are neighbours.

    What is dealt out runs on from one stratum to the next, so neighbours share alike even where
    each alone has too few patients.
    """
    counts = Counter(label for patient in patients for label in patient.labels)

    def rarity(label: str) -> tuple[int, str]:
        return counts[label], label

    return {
        patient.patient_id: "\0".join(sorted(patient.labels, key=rarity)) for patient in patients
    }


def hash_order(names: Iterable[str], salt: str) -> list[str]:
    """Return names in an order that looks random and depends on them and the salt alone."""
    return sorted(names, key=lambda name: (_hash(f"{salt}\0{name}"), name))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _in_a_row(strata: Mapping[str, str], salt: str) -> list[str]:
    """Return patients stratum after stratum, within each in the salt's order."""
    return sorted(hash_order(strata, salt), key=lambda patient_id: strata[patient_id])


# --- dividing -------------------------------------------------------------------------------


def deal(strata: Mapping[str, str], folds: int, salt: str) -> dict[str, int]:
    """Deal patients out like cards, stratum after stratum; return the fold of each.

    Each stratum, and the whole, comes to the same size in every fold within one patient.
    """
    row = _in_a_row(strata, salt)
    return {patient_id: position % folds for position, patient_id in enumerate(row)}


def draw(
    patients: Sequence[Patient], strata: Mapping[str, str], share: float, salt: str
) -> set[str]:
    """Draw a share of the patients at even steps along their row of strata.

    So each stratum gives its share within one patient. Then no class is drawn to its last
    patient, and each that has two or more is drawn at least once, unless another class would lose
    its last one by that.
    """
    total = len(patients)
    if share <= 0 or total < 2:
        return set()
    wanted = min(max(round(share * total), 1), total - 1)
    start = _hash(salt) % total
    drawn = {
        patient_id
        for position, patient_id in enumerate(_in_a_row(strata, salt))
        if (start + position * wanted) % total < wanted
    }
    labels_by_id = {patient.patient_id: patient.labels for patient in patients}
    holders: dict[str, list[str]] = {}
    for patient_id in hash_order(labels_by_id, salt):
        for label in labels_by_id[patient_id]:
            holders.setdefault(label, []).append(patient_id)
    for label in sorted(holders):
        if len(holders[label]) > 1 and drawn.isdisjoint(holders[label]):
            drawn.add(holders[label][0])
    for label in sorted(holders):
        if drawn.issuperset(holders[label]):
            drawn.discard(holders[label][-1])
    return drawn
