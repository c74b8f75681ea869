"""Cases: the labelled bags of a cohort, one per slide or one per patient.

A case is what a split puts on one side, a batch holds and a prediction is of. Whose case it is
stands in it, so that nothing downstream can separate the slides of one patient by mistake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bagscope.cohort.table import Cohort, SlideRow
from bagscope.errors import CohortError
from bagscope.mil.targets import (
    TargetSpec,
    Value,
    is_missing,
    notes_on_classes,
    read_value,
    resolve_classes,
)
from bagscope.wording import MOST_LISTED, listed

Per = Literal["slide", "patient"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One labelled bag.

    Attributes:
        case_id: the slide's id or the patient's.
        slide_ids: whose tiles make up the bag, in the cohort's order.
        targets: the label of each target (see `bagscope.mil.targets`), NaN where missing.
        site: where it comes from; empty where the table does not say.
        split: the side that the cohort table puts it on; empty for none.
        columns: the table's other columns, of the first slide; subgroup tables read them.
    """

    case_id: str
    patient_id: str
    slide_ids: tuple[str, ...]
    targets: Mapping[str, Value] = field(default_factory=dict)
    site: str = ""
    split: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseTable:
    """The cases of a cohort.

    Attributes:
        cases: with at least one label, in the cohort's order.
        targets: with their classes resolved.
        per: what a case is.
        left_out: why a slide or a case is not there, by its id.
        notes: sentences that the user should see.
        known_ids: every slide and patient of the cohort, also those without a case.
    """

    cases: tuple[Case, ...]
    targets: tuple[TargetSpec, ...]
    per: Per
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    known_ids: frozenset[str] = frozenset()

    @property
    def patient_ids(self) -> tuple[str, ...]:
        """Return the patients, each once, in order of appearance."""
        return tuple(dict.fromkeys(case.patient_id for case in self.cases))

    def chosen(self, case_ids: Collection[str]) -> tuple[Case, ...]:
        """Return the named cases, in the table's order."""
        wanted = frozenset(case_ids)
        return tuple(case for case in self.cases if case.case_id in wanted)


def cases_of(
    cohort: Cohort,
    targets: Sequence[TargetSpec],
    *,
    per: Per,
    available: Collection[str] | None = None,
    skip_missing: bool = False,
) -> CaseTable:
    """Read the labels of a cohort.

    Args:
        cohort: its table, joined with the clinical one.
        targets: what to read; none at all gives cases without labels, for prediction.
        per: whether a case is a slide or a patient.
        available: slides that have features; None for all.
        skip_missing: leave slides without features out in place of refusing.

    Raises:
        CohortError: slides without features, labels that are none, contradicting labels of a
            patient, two targets of one name, or no labelled case at all; names rows, columns and
            values.
    """
    rows = [_cells(row) for row in cohort.rows]
    resolved = tuple(resolve_classes(target, rows) for target in targets)
    if twice := [name for name, n in Counter(t.name for t in resolved).items() if n > 1]:
        raise CohortError(f"targets are named twice: {listed(twice)}; name each column once")
    on_classes = [
        note
        for given, whole in zip(targets, resolved, strict=True)
        for note in notes_on_classes(given, whole, rows)
    ]
    left_out: dict[str, str] = {}
    present = _with_features(cohort.rows, available, skip_missing, left_out)
    problems: list[str] = []
    labels: dict[str, dict[str, Value]] = {}
    for row in present:
        cells = _cells(row)
        try:
            labels[row.slide_id] = {
                target.name: read_value(target, cells, f"slide {row.slide_id}")
                for target in resolved
            }
        except CohortError as error:
            problems.append(str(error))
    _refuse(problems)
    groups: dict[str, list[SlideRow]] = {}
    for row in present:
        groups.setdefault(row.slide_id if per == "slide" else row.patient_id, []).append(row)
    cases = []
    for case_id, members in groups.items():
        values = {target.name: _agreed(target, members, labels, problems) for target in resolved}
        if resolved and all(is_missing(value) for value in values.values()):
            left_out[case_id] = "has no label"
            continue
        cases.append(_case(case_id, members, values, problems))
    _refuse(problems)
    if not cases:
        columns = ", ".join(column for target in resolved for column in target.columns)
        raise CohortError(f"{cohort.source}: no slide has features and a label in {columns}")
    return CaseTable(
        cases=tuple(cases),
        targets=resolved,
        per=per,
        left_out=left_out,
        notes=(*on_classes, *_differences(cases, resolved), *_notes(cohort, left_out)),
        known_ids=frozenset(name for row in cohort.rows for name in (row.slide_id, row.patient_id)),
    )


def slides_of(cases: Iterable[Case]) -> set[str]:
    """Return the slides of cases."""
    return {slide_id for case in cases for slide_id in case.slide_ids}


def _cells(row: SlideRow) -> dict[str, str]:
    return {**row.columns, "site": row.site}


def _with_features(
    rows: Sequence[SlideRow],
    available: Collection[str] | None,
    skip_missing: bool,
    left_out: dict[str, str],
) -> list[SlideRow]:
    if available is None:
        return list(rows)
    known = frozenset(available)
    missing = [row.slide_id for row in rows if row.slide_id not in known]
    if missing and (not skip_missing or len(missing) == len(rows)):
        raise CohortError(
            f"{len(missing)} of {len(rows)} slides have no features ({listed(missing)}); run "
            "bagscope extract, or pass --skip-missing to leave them out"
        )
    left_out.update(dict.fromkeys(missing, "has no features"))
    return [row for row in rows if row.slide_id in known]


def _agreed(
    target: TargetSpec,
    members: Sequence[SlideRow],
    labels: Mapping[str, Mapping[str, Value]],
    problems: list[str],
) -> Value:
    """Return the one label of a case's slides; a slide without one follows the others."""
    found = {row.slide_id: labels[row.slide_id][target.name] for row in members}
    stated = {slide_id: value for slide_id, value in found.items() if not is_missing(value)}
    if not stated:
        return next(iter(found.values()))
    counts = Counter(stated.values())
    if len(counts) > 1:
        cells = {row.slide_id: _cells(row) for row in members}
        shown = [
            f"{slide_id}: {', '.join(cells[slide_id][column] for column in target.columns)}"
            for slide_id in stated
        ]
        problems.append(
            f"patient {members[0].patient_id}, column {', '.join(target.columns)}: its slides "
            f"contradict each other ({listed(shown, 4)}); correct them, or take each slide as a "
            "bag (--per slide; of train, --set bags.per=slide)"
        )
    return next(iter(stated.values()))


def _case(
    case_id: str,
    members: Sequence[SlideRow],
    values: Mapping[str, Value],
    problems: list[str],
) -> Case:
    first = members[0]
    for name in ("site", "split"):
        if len(different := sorted({getattr(row, name) for row in members})) > 1:
            problems.append(
                f"patient {first.patient_id}, column {name}: its slides have "
                f"{' and '.join(map(repr, different))}; a patient is of one {name}"
            )
    return Case(
        case_id=case_id,
        patient_id=first.patient_id,
        slide_ids=tuple(row.slide_id for row in members),
        targets=values,
        site=first.site,
        split=first.split,
        columns=dict(first.columns),
    )


def _differences(cases: Sequence[Case], targets: Sequence[TargetSpec]) -> list[str]:
    """Return what to say of patients whose cases are of different labels.

    Slide by slide both may be true; what is of the patient, such as survival, is then a mistake.
    """
    notes = []
    for target in targets:
        stated: dict[str, dict[str, Value]] = {}
        for case in cases:
            if not is_missing(value := case.targets[target.name]):
                stated.setdefault(case.patient_id, {})[case.case_id] = value
        found = [
            f"{patient_id}: {listed(list(labels), 4)}"
            for patient_id, labels in stated.items()
            if len(set(labels.values())) > 1
        ]
        if found:
            notes.append(
                f"column {', '.join(target.columns)}: the slides of {len(found)} of {len(stated)} "
                f"patients have different labels ({listed(found, 4)}); each slide is taken at its "
                "own, so correct them where the label is the patient's"
            )
    return notes


def _notes(cohort: Cohort, left_out: Mapping[str, str]) -> tuple[str, ...]:
    notes = list(cohort.notes)
    if not cohort.patient_id_given:
        notes.append(
            "the cohort has no patient_id: every slide counts as a patient of its own, and two "
            "slides of one patient may stand on both sides of a split"
        )
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, why in left_out.items() if why == reason]
        notes.append(f"left out, {reason}: {listed(names)} ({len(names)})")
    return tuple(notes)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
        raise CohortError("\n  ".join(problems[:MOST_LISTED]) + more)
