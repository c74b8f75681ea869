"""Sides that were fixed elsewhere: the cohort table's column `split`, or a table of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from bagscope.cohort.cells import Row, read_cells, refuse
from bagscope.errors import CohortError
from bagscope.mil.cases import Case, CaseTable
from bagscope.mil.splits.plan import Side
from bagscope.wording import listed

KEYS = ("case_id", "patient_id", "slide_id")
WORDS: Mapping[str, Side] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def given_sides(table: CaseTable, file: str | None) -> dict[str, Side]:
    """Return the side of every patient.

    Args:
        table: the cases.
        file: a table with one of the columns `case_id`, `patient_id`, `slide_id`, and with
            `split`; None for the cohort table's own column `split`.

    Raises:
        CohortError: words that are no side, ids that the cohort does not have, cases without a
            side, or patients on two; names them.
    """
    where = file or "column split"
    if file is None:
        words = {case.case_id: case.split for case in table.cases}
        if not any(words.values()):
            raise CohortError(
                "column split: is empty or missing; fill in train, val and test, or pass --from "
                "with a table of slide_id and split"
            )
        problems = [
            f"{_unknown_word(word)} ({listed(names)})"
            for word, names in _grouped(words).items()
            if word and word.lower() not in WORDS
        ]
        if problems:
            raise CohortError(f"{where}: {'; '.join(problems)}")
    else:
        words = _from_file(table, Path(file))
    without = [case_id for case_id, word in words.items() if not word]
    if without:
        raise CohortError(
            f"{where}: {len(without)} of {len(words)} labelled cases have no side "
            f"({listed(without)}); write train, val or test for each"
        )
    return _by_patient(table.cases, words, where)


def _from_file(table: CaseTable, path: Path) -> dict[str, str]:
    """Return the word of every case, empty where the file has none."""
    cells = read_cells(path)
    keys = [name for name in KEYS if name in cells.columns]
    if not keys or "split" not in cells.columns:
        raise CohortError(
            f"{path}: has the columns {', '.join(cells.columns)}; split and one of "
            f"{', '.join(KEYS)} are needed"
        )
    key = keys[0]
    cases_of: dict[str, list[str]] = {}
    for case in table.cases:
        names = {
            "case_id": (case.case_id,),
            "patient_id": (case.patient_id,),
            "slide_id": case.slide_ids,
        }
        for name in names[key]:
            cases_of.setdefault(name, []).append(case.case_id)
    problems = _row_problems(cells.rows, key, {*cases_of, *table.known_ids})
    words = {case.case_id: "" for case in table.cases}
    for row in cells.rows:
        word = row.cells["split"].strip()
        for case_id in cases_of.get(row.cells[key].strip(), ()):
            before = words[case_id]
            if before and word and WORDS.get(before.lower()) != WORDS.get(word.lower()):
                problems.append(f"row {row.number}: {case_id} is on {word} and on {before}")
            words[case_id] = word or before
    refuse(path, problems)
    return words


def _row_problems(rows: Iterable[Row], key: str, known: set[str]) -> list[str]:
    problems = []
    for row in rows:
        name, word = row.cells[key].strip(), row.cells["split"].strip()
        if name not in known:
            problems.append(f"row {row.number}, column {key}: {name!r} is not in the cohort")
        elif word and word.lower() not in WORDS:
            problems.append(f"row {row.number}, column split: {_unknown_word(word)}")
    return problems


def _by_patient(cases: Iterable[Case], words: Mapping[str, str], where: str) -> dict[str, Side]:
    sides: dict[str, dict[Side, list[str]]] = {}
    for case in cases:
        side = WORDS[words[case.case_id].lower()]
        sides.setdefault(case.patient_id, {}).setdefault(side, []).append(case.case_id)
    torn = [
        f"{patient_id} ({', '.join(f'{side}: {listed(ids)}' for side, ids in found.items())})"
        for patient_id, found in sides.items()
        if len(found) > 1
    ]
    if torn:
        raise CohortError(
            f"{where}: {len(torn)} patients are on several sides: {listed(torn)}; put all slides "
            "of a patient on one"
        )
    return {patient_id: next(iter(found)) for patient_id, found in sides.items()}


def _grouped(words: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, word in words.items():
        groups.setdefault(word, []).append(name)
    return groups


def _unknown_word(word: str) -> str:
    return f"{word!r} is none of train, val and test"
