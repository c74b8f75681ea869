"""Make splits: whole patients, each class in its share, the same for the same seed and ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from bagscope.errors import CohortError
from bagscope.mil.cases import CaseTable
from bagscope.mil.splits.checking import examine_splits
from bagscope.mil.splits.fixed import given_sides
from bagscope.mil.splits.plan import Side, Split, SplitPlan, SplitSpec, labels_fingerprint
from bagscope.mil.splits.sites import divide_sites
from bagscope.mil.splits.strata import (
    Patient,
    deal,
    draw,
    needed_classes,
    patients_of,
    strata_of,
)
from bagscope.mil.targets import TargetSpec
from bagscope.wording import counted, listed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """One split before its inner validation part is carved out."""

    repeat: int = 0
    fold: int = 0
    test: AbstractSet[str]
    val: AbstractSet[str] = frozenset()
    site: str = ""


def make_splits(table: CaseTable, spec: SplitSpec) -> SplitPlan:
    """Divide the cases of a table by patient, stratified by its first target.

    Raises:
        CohortError: a class with fewer patients than the method needs, patients without a site or
            of several, ids of a fixed split that the cohort does not have, or a side without a
            class; names them.
    """
    patients = patients_of(table)
    target = table.targets[0] if table.targets else None
    rounds, notes = _rounds(table, patients, target, spec)
    splits = tuple(_split(patients, target, spec, round_) for round_ in rounds)
    plan = SplitPlan(
        splits=splits,
        spec=spec,
        patient_of={case.case_id: case.patient_id for case in table.cases},
        per=table.per,
        targets=table.targets,
        labels=labels_fingerprint(table),
        notes=(*table.notes, *notes),
    )
    found = examine_splits(plan, table)
    if found.faults:
        raise CohortError("; ".join(found.faults))
    return replace(plan, notes=(*plan.notes, *found.notes))


def _rounds(
    table: CaseTable, patients: Sequence[Patient], target: TargetSpec | None, spec: SplitSpec
) -> tuple[list[_Round], list[str]]:
    if spec.method == "fixed":
        return [_fixed_round(given_sides(table, spec.file))], []
    if spec.method in ("site_out", "site_preserving"):
        _require_sites(patients)
        return list(_site_rounds(patients, target, spec)), []
    parts = spec.folds if spec.method == "kfold" else 2
    notes = _require_patients(patients, target, spec, parts)
    if spec.method == "kfold":
        return list(_kfold_rounds(patients, target, spec)), notes
    return list(_drawn_rounds(patients, target, spec)), notes


def _kfold_rounds(
    patients: Sequence[Patient], target: TargetSpec | None, spec: SplitSpec
) -> Iterator[_Round]:
    strata = strata_of(patients, target if spec.stratify else None, parts=spec.folds)
    for repeat in range(spec.repeats):
        fold_of = deal(strata, spec.folds, f"{spec.seed}/{repeat}/test")
        for fold in range(spec.folds):
            yield _Round(repeat=repeat, fold=fold, test=_having(fold_of, fold))


def _drawn_rounds(
    patients: Sequence[Patient], target: TargetSpec | None, spec: SplitSpec
) -> Iterator[_Round]:
    strata = strata_of(patients, _by(target, spec), parts=_parts(spec.test_share))
    for repeat in range(spec.repeats):
        test = draw(patients, strata, spec.test_share, f"{spec.seed}/{repeat}/test")
        yield _Round(repeat=repeat, test=test)


def _site_rounds(
    patients: Sequence[Patient], target: TargetSpec | None, spec: SplitSpec
) -> Iterator[_Round]:
    site_of = {patient.patient_id: min(patient.sites) for patient in patients}
    sites = sorted(set(site_of.values()))
    if spec.method == "site_out":
        if len(sites) < 2:
            raise CohortError(f"all patients are of site {sites[0]!r}; nothing can be left out")
        for fold, site in enumerate(sites):
            yield _Round(fold=fold, test=_having(site_of, site), site=site)
        return
    if len(sites) < spec.folds:
        raise CohortError(
            f"{counted(len(sites), 'site')} ({listed(sites)}) can't make {spec.folds} folds of "
            f"whole sites; use --folds {len(sites)}"
            if len(sites) > 1
            else f"all patients are of site {sites[0]!r}; folds of whole sites need several"
        )
    strata = strata_of(patients, _by(target, spec), parts=spec.folds)
    fold_of = divide_sites(patients, strata, spec.folds, f"{spec.seed}/sites")
    for fold in range(spec.folds):
        yield _Round(
            fold=fold, test={name for name, site in site_of.items() if fold_of[site] == fold}
        )


def _fixed_round(side_of: Mapping[str, Side]) -> _Round:
    sides = {side: _having(side_of, side) for side in ("val", "test")}
    return _Round(test=sides["test"], val=sides["val"])


def _split(
    patients: Sequence[Patient], target: TargetSpec | None, spec: SplitSpec, round_: _Round
) -> Split:
    """Carve the inner validation part out of what is not tested, and write cases for patients."""
    rest = [patient for patient in patients if patient.patient_id not in round_.test]
    val = round_.val
    if not val:
        # From the training patients alone, so that what is tested has no say in their quantiles.
        strata = strata_of(rest, _by(target, spec), parts=_parts(spec.val_share))
        salt = f"{spec.seed}/{round_.repeat}/{round_.fold}/val"
        val = draw(rest, strata, spec.val_share, salt)
    cases: dict[Side, list[str]] = {"train": [], "val": [], "test": []}
    for patient in patients:
        name = patient.patient_id
        side: Side = "test" if name in round_.test else "val" if name in val else "train"
        cases[side] += patient.case_ids
    return Split(
        repeat=round_.repeat,
        fold=round_.fold,
        train=tuple(sorted(cases["train"])),
        val=tuple(sorted(cases["val"])),
        test=tuple(sorted(cases["test"])),
        site=round_.site,
    )


def _by(target: TargetSpec | None, spec: SplitSpec) -> TargetSpec | None:
    return target if spec.stratify else None


def _parts(share: float) -> int:
    """Return how many parts of a share there are: a stratum of fewer patients can't give one."""
    return max(2, round(1 / share)) if share > 0 else 2


def _having(side_of: Mapping[str, int | str], wanted: int | str) -> set[str]:
    return {name for name, side in side_of.items() if side == wanted}


# --- refusals -------------------------------------------------------------------------------


def _require_patients(
    patients: Sequence[Patient], target: TargetSpec | None, spec: SplitSpec, parts: int
) -> list[str]:
    """Refuse classes of fewer patients than parts; of labels side by side, note them."""
    what = f"{parts} folds" if spec.method == "kfold" else "two sides"
    if len(patients) < parts:
        raise CohortError(f"{counted(len(patients), 'patient')} can't be divided into {what}")
    if target is None:
        return []
    small = []
    for name in needed_classes(target):
        holders = [patient.patient_id for patient in patients if name in patient.labels]
        if len(holders) >= parts:
            continue
        if target.task == "survival" and not holders:
            raise CohortError(
                f"column {target.columns[1]}: none of {len(patients)} patients had an event; from "
                "censored times alone nothing can be learnt, so check which word says event"
            )
        who = f" ({listed(holders)})" if holders else ""
        small.append((len(holders), f"class {name!r} has {counted(len(holders), 'patient')}{who}"))
    if not small:
        return []
    sentence = (
        f"column {', '.join(target.columns)}: {'; '.join(text for _, text in small)}; fewer than "
        f"the {what} that each need one"
    )
    if target.task == "multilabel":
        return [sentence]
    fewest = min(count for count, _ in small)
    remedy = "take the class out of the table, or join it with another"
    if spec.method == "kfold" and fewest > 1:
        remedy = f"use --folds {fewest}, or {remedy}"
    raise CohortError(f"{sentence}; {remedy}")


def _require_sites(patients: Sequence[Patient]) -> None:
    without = [patient.patient_id for patient in patients if "" in patient.sites]
    if without:
        raise CohortError(
            f"column site: is empty or missing for {len(without)} of {len(patients)} patients "
            f"({listed(without)}); fill it in, or use another --method"
        )
    several = [
        f"{patient.patient_id}: {', '.join(sorted(patient.sites))}"
        for patient in patients
        if len(patient.sites) > 1
    ]
    if several:
        raise CohortError(
            f"column site: {len(several)} patients are of several sites ({listed(several)}), and "
            "neither can be left out; give each one site"
        )
