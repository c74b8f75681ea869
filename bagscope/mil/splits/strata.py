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
    return _thinned(patients, parts)


def _binned(patients: Sequence[Patient], target: TargetSpec, parts: int) -> dict[str, str]:
    strata = {patient.patient_id: "unlabelled" for patient in patients}
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


def _thinned(patients: Sequence[Patient], parts: int) -> dict[str, str]:
    """Return combinations of classes; one that can't reach all parts counts as its rarest class."""
    combinations = Counter(patient.labels for patient in patients)
    classes = Counter(label for patient in patients for label in patient.labels)
    strata = {}
    for patient in patients:
        labels = sorted(patient.labels)
        if len(labels) > 1 and combinations[patient.labels] < parts:
            labels = [min(labels, key=lambda label: (classes[label], label))]
        strata[patient.patient_id] = "\0".join(labels)
    return strata


def _by_stratum(strata: Mapping[str, str], salt: str) -> list[list[str]]:
    """Return the patients of each stratum in the salt's order; strata in order of name."""
    groups: dict[str, list[str]] = {}
    for patient_id in hash_order(strata, salt):
        groups.setdefault(strata[patient_id], []).append(patient_id)
    return [groups[stratum] for stratum in sorted(groups)]


def hash_order(names: Iterable[str], salt: str) -> list[str]:
    """Return names in an order that looks random and depends on them and the salt alone."""

    def key(name: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{salt}\0{name}".encode(), digest_size=8).digest(), name

    return sorted(names, key=key)


# --- dividing -------------------------------------------------------------------------------


def deal(strata: Mapping[str, str], folds: int, salt: str) -> dict[str, int]:
    """Deal patients out like cards, stratum after stratum; return the fold of each.

    Each stratum, and the whole, comes to the same size in every fold within one patient.
    """
    dealt = [patient_id for group in _by_stratum(strata, salt) for patient_id in group]
    return {patient_id: position % folds for position, patient_id in enumerate(dealt)}


def draw(
    patients: Sequence[Patient], strata: Mapping[str, str], share: float, salt: str
) -> set[str]:
    """Draw a share of the patients, each stratum by its size (largest remainders).

    No class is drawn to its last patient, and each that has two patients or more is drawn at least
    once, unless another class would lose its last one by that.
    """
    total = len(patients)
    if share <= 0 or total < 2:
        return set()
    wanted = min(max(round(share * total), 1), total - 1)
    groups = _by_stratum(strata, salt)
    quotas = [wanted * len(group) // total for group in groups]
    by_remainder = sorted(range(len(groups)), key=lambda i: -(wanted * len(groups[i]) % total))
    for i in by_remainder[: wanted - sum(quotas)]:
        quotas[i] += 1
    drawn = {name for group, n in zip(groups, quotas, strict=True) for name in group[:n]}
    order = hash_order((patient.patient_id for patient in patients), salt)
    labels_by_id = {patient.patient_id: patient.labels for patient in patients}
    holders = {
        label: [name for name in order if label in labels_by_id[name]]
        for label in sorted(frozenset().union(*labels_by_id.values()))
    }
    for names in holders.values():
        if len(names) > 1 and drawn.isdisjoint(names):
            drawn.add(names[0])
    for names in holders.values():
        if drawn.issuperset(names):
            drawn.discard(names[-1])
    return drawn
