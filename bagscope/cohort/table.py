"""The cohort: which slides there are, whose they are, and what is known of them."""

from __future__ import annotations

import csv
import difflib
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bagscope import artifacts
from bagscope.artifacts import portable_name_problem
from bagscope.cohort.cells import TABLE_SUFFIXES, Cells, Row, read_cells, refuse
from bagscope.cohort.discover import find_slides, is_slide_name, slide_ids_of
from bagscope.errors import CohortError
from bagscope.wording import counted, listed

MIN_MPP = 0.08
MAX_MPP = 25.0
REQUIRED_COLUMNS = ("slide_id", "path")
OPTIONAL_COLUMNS = ("patient_id", "mpp", "split", "roi", "site")

_OWN_COLUMNS = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideRow:
    """One slide of a cohort.

    Attributes:
        slide_id: portable file name, unique ignoring case.
        path: of the slide, absolute; it may not exist.
        patient_id: whose slide it is; the slide's own id where the table does not say.
        columns: every other column, as it stands in the table.
        mpp: micrometres per level-0 pixel, overriding the slide's own; None to trust the slide.
        split: name of the split that the table puts it into; empty for none.
        roi: GeoJSON of regions, absolute; None for none.
        site: where it was scanned; empty where the table does not say.
    """

    slide_id: str
    path: Path
    patient_id: str
    columns: Mapping[str, str] = field(default_factory=dict)
    mpp: float | None = None
    split: str = ""
    roi: Path | None = None
    site: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cohort:
    """The slides of a study.

    Attributes:
        rows: in the table's order.
        source: the table, folder or glob that they come from.
        columns: names of the further columns (labels), in the table's order.
        patient_id_given: false where each slide counts as a patient of its own.
        notes: sentences that the user should see; nothing is wrong enough to stop.
    """

    rows: tuple[SlideRow, ...]
    source: str
    columns: tuple[str, ...] = ()
    patient_id_given: bool = False
    notes: tuple[str, ...] = ()


def load_cohort(source: Path | str, *, labels: Path | None = None) -> Cohort:
    """Read a cohort from a table, or make one of a folder, a glob or a single slide.

    Args:
        source: CSV, TSV, Parquet or XLSX with `slide_id` and `path`; or a folder; or a glob.
        labels: a clinical table, joined by `patient_id`, or by `slide_id` where it has none.

    Raises:
        CohortError: lists every problem, each with its row, column and value.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        cohort = _from_table(read_cells(path))
    elif path.is_file() and is_slide_name(path):
        cohort = _from_paths(source, [path])
    elif path.is_dir() or any(c in str(source) for c in "*?["):
        found = find_slides(source)
        cohort = replace(_from_paths(source, found.paths), notes=found.notes)
    elif path.exists():
        cohort = _from_table(read_cells(path))  # refuses the suffix
    else:
        raise CohortError(f"{source}: does not exist; give a table, a folder or a glob of slides")
    return cohort if labels is None else _joined(cohort, read_cells(labels))


def missing_paths(cohort: Cohort) -> list[SlideRow]:
    """Return the rows whose slide does not exist: each will fail alone, the others go on."""
    return [row for row in cohort.rows if not row.path.exists()]


def write_cohort_csv(cohort: Cohort, path: Path, *, also: Iterable[str] = ()) -> None:
    """Write a cohort as CSV, with slide paths relative to it where that is possible.

    Columns of which no row makes use are left out, but for those named in `also`. Reading it back
    gives the same rows.
    """
    folder = path.parent.absolute()
    columns = {
        "slide_id": [row.slide_id for row in cohort.rows],
        "path": [_relative(row.path, folder) for row in cohort.rows],
        "patient_id": [row.patient_id if cohort.patient_id_given else "" for row in cohort.rows],
        "mpp": ["" if row.mpp is None else repr(row.mpp) for row in cohort.rows],
        "split": [row.split for row in cohort.rows],
        "roi": ["" if row.roi is None else _relative(row.roi, folder) for row in cohort.rows],
        "site": [row.site for row in cohort.rows],
    }
    used = {
        name: cells for name, cells in columns.items() if name in REQUIRED_COLUMNS or any(cells)
    }
    for name in cohort.columns:
        used[name] = [row.columns.get(name, "") for row in cohort.rows]
    for name in also:
        used.setdefault(name, [""] * len(cohort.rows))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(used)
    writer.writerows(zip(*used.values(), strict=True))
    artifacts.write_text(path, text.getvalue())


# --- from a table ---------------------------------------------------------------------------


def _from_table(cells: Cells) -> Cohort:
    missing = [name for name in REQUIRED_COLUMNS if name not in cells.columns]
    refuse(cells.path, [_missing_column(name, cells.columns) for name in missing])
    if not cells.rows:
        raise CohortError(f"{cells.path}: has a header but no rows; add one per slide")
    folder = cells.path.parent.absolute()
    others = tuple(name for name in cells.columns if name not in _OWN_COLUMNS)
    problems: list[str] = []
    rows = [_slide_row(row, others, folder, problems) for row in cells.rows]
    problems += _id_problems(cells.rows)
    refuse(cells.path, problems)
    notes = [*cells.notes, *_near_misses(cells.columns), *_spelling_notes(rows, others)]
    given = "patient_id" in cells.columns
    empty = [row for row in cells.rows if given and not row.cells["patient_id"].strip()]
    if empty and len(empty) < len(rows):
        where = listed([f"row {row.number}" for row in empty])
        notes.append(
            f"{cells.path.name}: patient_id is empty in {where}; each of these slides counts as a "
            "patient of its own"
        )
    return Cohort(
        rows=tuple(rows),
        source=str(cells.path),
        columns=others,
        patient_id_given=given and len(empty) < len(rows),
        notes=tuple(notes),
    )


def _slide_row(row: Row, others: tuple[str, ...], folder: Path, problems: list[str]) -> SlideRow:
    own = {name: row.cells.get(name, "").strip() for name in _OWN_COLUMNS}
    path = Path(own["path"])
    if not own["path"]:
        problems.append(f"row {row.number}, column path: is empty; give the slide's file")
    elif "://" in own["path"]:
        problems.append(
            f"row {row.number}, column path: {own['path']!r} is no local file; copy it here first"
        )
    mpp = _mpp(own["mpp"], row.number, problems)
    return SlideRow(
        slide_id=own["slide_id"],
        path=_resolved(folder, path),
        patient_id=own["patient_id"] or own["slide_id"],
        columns={name: row.cells.get(name, "") for name in others},
        mpp=mpp,
        split=own["split"],
        roi=_resolved(folder, Path(own["roi"])) if own["roi"] else None,
        site=own["site"],
    )


def _mpp(text: str, row_number: int, problems: list[str]) -> float | None:
    if not text:
        return None
    where = f"row {row_number}, column mpp: {text!r}"
    try:
        mpp = float(text)
    except ValueError:
        hint = "; write it with a point" if "," in text else "; give micrometres per pixel"
        problems.append(f"{where} is not a number{hint}")
        return None
    if not math.isfinite(mpp) or not MIN_MPP <= mpp <= MAX_MPP:
        problems.append(
            f"{where} is not within {MIN_MPP}-{MAX_MPP:g} micrometres per pixel; correct it, or "
            "leave the cell empty to trust the slide"
        )
        return None
    return mpp


def _id_problems(rows: Iterable[Row]) -> list[str]:
    problems = []
    first: dict[str, tuple[int, str]] = {}
    for row in rows:
        slide_id = row.cells["slide_id"].strip()
        where = f"row {row.number}, column slide_id: {slide_id!r}"
        if problem := portable_name_problem(slide_id):
            problems.append(f"{where} {problem}; an id must be able to be a file name")
            continue
        number, other = first.setdefault(slide_id.casefold(), (row.number, slide_id))
        if number == row.number:
            continue
        if other == slide_id:
            problems.append(f"{where} stands in row {number} already; ids must be unique")
        else:
            problems.append(
                f"{where} differs from {other!r} in row {number} by upper and lower case only; "
                "some systems can't tell such files apart"
            )
    return problems


def _missing_column(name: str, columns: Iterable[str]) -> str:
    present = list(columns)
    lowered = {column.lower().replace(" ", "_"): column for column in present}
    near = difflib.get_close_matches(name, lowered, n=1, cutoff=0.5)
    hint = f"rename {lowered[near[0]]!r}" if near else "add it"
    return f"has no column {name!r} (there are: {', '.join(present)}); {hint}"


def _near_misses(columns: Iterable[str]) -> list[str]:
    """Return a note per column that looks like a misspelt optional one."""
    present = list(columns)
    notes = []
    for name in OPTIONAL_COLUMNS:
        alike = [c for c in present if c != name and c.lower().replace(" ", "_") == name]
        if name not in present and alike:
            notes.append(f"column {alike[0]!r} is taken as a label; for {name}, rename it {name!r}")
    return notes


def _spelling_notes(rows: Iterable[SlideRow], columns: Iterable[str]) -> list[str]:
    """Return a note per pair of values that differ by case or outer spaces only."""
    listed = list(rows)
    notes = []
    for name in columns:
        counts = Counter(row.columns[name] for row in listed)
        first: dict[str, str] = {}
        for value in counts:
            other = first.setdefault(value.strip().casefold(), value)
            if other != value:
                notes.append(
                    f"column {name!r} has both {other!r} ({counted(counts[other], 'row')}) and "
                    f"{value!r} ({counts[value]}), taken as different values"
                )
    return notes


# --- from paths -----------------------------------------------------------------------------


def _from_paths(source: Path | str, paths: Iterable[Path]) -> Cohort:
    found = list(paths)
    ids = slide_ids_of(source, found)
    rows = [
        SlideRow(slide_id=slide_id, path=path.absolute(), patient_id=slide_id)
        for slide_id, path in zip(ids, found, strict=True)
    ]
    return Cohort(rows=tuple(rows), source=str(source))


# --- a clinical table beside it ---------------------------------------------------------------


def _joined(cohort: Cohort, clinical: Cells) -> Cohort:
    key = "patient_id" if "patient_id" in clinical.columns else "slide_id"
    if key not in clinical.columns:
        refuse(clinical.path, [_missing_column("patient_id", clinical.columns)])
    added = tuple(name for name in clinical.columns if name != key)
    taken = [name for name in added if name in cohort.columns or name in _OWN_COLUMNS]
    problems = [
        f"column {name!r} stands in the cohort table too, or means something there; rename it"
        for name in taken
    ]
    by_key: dict[str, Row] = {}
    for row in clinical.rows:
        value = row.cells[key].strip()
        first = by_key.setdefault(value, row)
        if not value:
            problems.append(f"row {row.number}, column {key}: is empty; say whose row it is")
        elif {n: first.cells[n] for n in added} != {n: row.cells[n] for n in added}:
            problems.append(
                f"row {row.number}, column {key}: {value!r} stands in row {first.number} already, "
                "with other values"
            )
    refuse(clinical.path, problems)
    keys = [row.patient_id if key == "patient_id" else row.slide_id for row in cohort.rows]
    rows = tuple(
        replace(row, columns={**row.columns, **_cells_of(by_key.get(value), added)})
        for row, value in zip(cohort.rows, keys, strict=True)
    )
    name = clinical.path.name
    notes = [*cohort.notes, *clinical.notes]
    if key == "patient_id" and not cohort.patient_id_given:
        notes.append(f"the cohort has no patient_id; {name} was joined by slide_id instead")
    without = [
        row.slide_id for row, value in zip(cohort.rows, keys, strict=True) if value not in by_key
    ]
    if without:
        notes.append(f"{listed(without)}: in the cohort, but not in {name}; without its labels")
    unused = sorted(by_key.keys() - set(keys))
    if unused:
        notes.append(f"{name}: {listed(unused)} not in the cohort; left out")
    notes += _spelling_notes((row for row in rows if row.slide_id not in without), added)
    return replace(cohort, rows=rows, columns=(*cohort.columns, *added), notes=tuple(notes))


def _cells_of(row: Row | None, columns: Iterable[str]) -> dict[str, str]:
    return {name: "" if row is None else row.cells[name] for name in columns}


def _resolved(folder: Path, path: Path) -> Path:
    # Not normalised: "a/.." is not here where a is a link to somewhere else.
    return folder / path.expanduser()


def _relative(path: Path, folder: Path) -> str:
    """Return the way from a folder to a file, both by their real places; links keep their name."""
    real = path.parent.resolve() / path.name
    try:
        return Path(os.path.relpath(real, folder.resolve())).as_posix()
    except ValueError:  # another drive
        return path.as_posix()
