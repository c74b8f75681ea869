"""What can be wrong with splits, found and named.

A fault makes a number that comes out of the splits untrue, or impossible to compute. A note is
something to know.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bagscope.mil.cases import CaseTable
from bagscope.mil.splits.plan import SIDES, Side, Split, SplitPlan, labels_fingerprint
from bagscope.mil.splits.strata import Patient, needed_classes, patients_of
from bagscope.mil.targets import TargetSpec
from bagscope.wording import listed

_SEPARATORS = re.compile(r"[\s_.\-]+")
_TESTS_EVERY_CASE_ONCE = ("kfold", "site_out", "site_preserving")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitFindings:
    """Sentences about splits."""

    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check_splits(plan: SplitPlan, table: CaseTable) -> list[str]:
    """Return one sentence per fault of a plan; none where it can be used with the table."""
    return list(examine_splits(plan, table).faults)


def examine_splits(plan: SplitPlan, table: CaseTable | None) -> SplitFindings:
    """Look for whatever is wrong with a plan.

    Args:
        plan: the splits.
        table: of the cohort; without it, only what the plan says of itself is looked at.
    """
    faults: list[str] = []
    notes: list[str] = []
    if not plan.splits:
        faults.append("there is no split")
    if table is not None:
        if plan.per not in (None, table.per):
            return SplitFindings(
                faults=(
                    f"the splits are per {plan.per}, the cases per {table.per}; make them again "
                    f"with --per {table.per}",
                )
            )
        faults += _identity_faults(plan, table)
        if plan.labels and plan.labels != labels_fingerprint(table):
            notes.append(
                "labels, sites or slides have changed since the splits were made; they may no "
                "longer be stratified"
            )
    patient_of = dict(plan.patient_of)
    if table is not None:
        patient_of |= {case.case_id: case.patient_id for case in table.cases}
    notes += _alike(patient_of.values())
    patients = [] if table is None else patients_of(table)
    for split in plan.splits:
        faults += _case_faults(split, patient_of)
        faults += _patient_faults(split, patient_of)
        if table is not None:
            target = table.targets[0] if table.targets else None
            faults += _side_faults(plan, split, patients, target, notes)
    faults += _round_faults(plan)
    return SplitFindings(faults=tuple(faults), notes=tuple(notes))


def _alike(patient_ids: Iterable[str]) -> list[str]:
    """Return a note per group of patients whose ids a person would read as one."""
    groups: dict[str, list[str]] = {}
    for patient_id in sorted(set(patient_ids)):
        groups.setdefault(_SEPARATORS.sub("-", patient_id.casefold()), []).append(patient_id)
    return [
        f"patients {' and '.join(map(repr, names))} are taken as different; if they are one, "
        "write the id in one way"
        for names in groups.values()
        if len(names) > 1
    ]


def _identity_faults(plan: SplitPlan, table: CaseTable) -> list[str]:
    cases = {case.case_id: case.patient_id for case in table.cases}
    faults = []
    if unknown := sorted(plan.patient_of.keys() - cases.keys()):
        faults.append(f"not a labelled case of the cohort: {listed(unknown)} ({len(unknown)})")
    if missing := sorted(cases.keys() - plan.patient_of.keys()):
        faults.append(f"in the cohort, but not in the splits: {listed(missing)} ({len(missing)})")
    moved = [
        f"{case_id} ({patient_id} there, {cases[case_id]} in the cohort)"
        for case_id, patient_id in sorted(plan.patient_of.items())
        if cases.get(case_id, patient_id) != patient_id
    ]
    if moved:
        faults.append(f"of another patient than in the cohort: {listed(moved)}")
    return faults


def _case_faults(split: Split, patient_of: Mapping[str, str]) -> list[str]:
    faults = []
    placed: dict[str, list[Side]] = {}
    for side, case_ids in split.sides():
        for case_id in case_ids:
            placed.setdefault(case_id, []).append(side)
    for case_id, sides in sorted(placed.items()):
        if len(sides) > 1:
            where = f"on {' and '.join(dict.fromkeys(sides))}"
            where = where if len(set(sides)) > 1 else f"{len(sides)} times {where}"
            faults.append(f"{split.name}: case {case_id} is {where}")
    if nowhere := sorted(patient_of.keys() - placed.keys()):
        faults.append(f"{split.name}: on no side: {listed(nowhere)} ({len(nowhere)})")
    if unknown := sorted(placed.keys() - patient_of.keys()):
        faults.append(f"{split.name}: unknown cases: {listed(unknown)} ({len(unknown)})")
    return faults


def _patient_faults(split: Split, patient_of: Mapping[str, str]) -> list[str]:
    sides: dict[str, dict[Side, list[str]]] = {}
    for side, case_ids in split.sides():
        for case_id in case_ids:
            patient_id = patient_of.get(case_id, case_id)
            sides.setdefault(patient_id, {}).setdefault(side, []).append(case_id)
    return [
        f"{split.name}: patient {patient_id} is on {' and '.join(found)} "
        f"({'; '.join(f'{side}: {listed(ids, 4)}' for side, ids in found.items())})"
        for patient_id, found in sorted(sides.items())
        if len(found) > 1
    ]


def _side_faults(
    plan: SplitPlan,
    split: Split,
    patients: Sequence[Patient],
    target: TargetSpec | None,
    notes: list[str],
) -> list[str]:
    """Return faults of sides that are empty or lack a class; what is no fault goes into `notes`."""
    faults: list[str] = []
    side_of = {case_id: side for side, case_ids in split.sides() for case_id in case_ids}
    held: dict[Side, Counter[str]] = {side: Counter() for side in SIDES}
    for patient in patients:
        for side in {side_of[c] for c in patient.case_ids if c in side_of}:
            held[side].update(patient.labels)
    for side, case_ids in split.sides():
        where = f"{split.name}{f' ({split.site})' if split.site else ''}, {side}"
        if not case_ids:
            if side != "val" or plan.spec.val_share > 0:
                (notes if side == "val" else faults).append(f"{where}: has no case")
            continue
        if target is None:
            continue
        absent = [name for name in needed_classes(target) if not held[side][name]]
        if not absent:
            continue
        sentence = (
            f"{where}: has no patient of class {listed(absent)} ({', '.join(target.columns)})"
        )
        # Whole sites, and labels that stand side by side, leave no choice.
        unavoidable = plan.spec.method.startswith("site") or target.task == "multilabel"
        is_fault = side == "train" or (side == "test" and not unavoidable)
        (faults if is_fault else notes).append(sentence)
    return faults


def _round_faults(plan: SplitPlan) -> list[str]:
    faults = []
    names = Counter(split.name for split in plan.splits)
    if twice := [name for name, count in names.items() if count > 1]:
        faults.append(f"splits of the same name: {listed(twice)}")
    if plan.spec.method not in _TESTS_EVERY_CASE_ONCE:
        return faults
    for repeat in sorted({split.repeat for split in plan.splits}):
        rounds = [split for split in plan.splits if split.repeat == repeat]
        faults += _tested_faults(repeat, rounds, plan.case_ids)
    return faults


def _tested_faults(repeat: int, rounds: Sequence[Split], case_ids: Sequence[str]) -> list[str]:
    tested = Counter(case_id for split in rounds for case_id in dict.fromkeys(split.test))
    faults = []
    if never := [case_id for case_id in case_ids if not tested[case_id]]:
        faults.append(f"repeat {repeat}: never tested: {listed(never)} ({len(never)})")
    if often := sorted(case_id for case_id, count in tested.items() if count > 1):
        faults.append(f"repeat {repeat}: tested in several folds: {listed(often)} ({len(often)})")
    return faults
