"""Tables as text: CSV, TSV, Parquet and XLSX become rows of strings, never coerced.

CSV and TSV are read by the standard library alone, so that commands start fast.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagscope.errors import CohortError
from bagscope.wording import counted

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".xlsx")
MAX_PROBLEMS = 20

_DELIMITERS = (",", ";", "\t")
_LEADING_ZEROS = re.compile(r"0+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row; `number` is what a spreadsheet shows (the header is row 1)."""

    number: int
    cells: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """A table as text."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def read_cells(path: Path) -> Cells:
    """Read a table by its suffix.

    Raises:
        CohortError: missing, unreadable, or with a header or rows that make no table.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise CohortError(
            f"{path}: not a table that can be read (its suffix is {suffix or 'missing'!r}); give "
            f"one of {', '.join(TABLE_SUFFIXES)}, or a folder of slides"
        )
    notes: list[str] = []
    try:
        if suffix == ".parquet":
            lines: Iterable[Sequence[str]] = _parquet_lines(path)
        elif suffix == ".xlsx":
            lines = _xlsx_lines(path, notes)
        else:
            lines = _text_lines(path, "\t" if suffix == ".tsv" else None)
        return _as_table(path, lines, notes)
    except OSError as error:
        raise CohortError(
            f"{path}: the table can't be read ({error.strerror or error}); check the path"
        ) from error


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raise one error that lists the problems of a table, the first 20 of them in full.

    Raises:
        CohortError: there is any problem.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise CohortError(f"{path}: {problems[0]}")
    shown = "".join(f"\n  {problem}" for problem in problems[:MAX_PROBLEMS])
    more = len(problems) - MAX_PROBLEMS
    tail = f"\n  and {more} more" if more > 0 else ""
    raise CohortError(f"{path}: {counted(len(problems), 'problem')}{shown}{tail}")


def _as_table(path: Path, lines: Iterable[Sequence[str]], notes: list[str]) -> Cells:
    numbered = enumerate(lines, start=1)
    header: list[str] = []
    for _, line in numbered:
        header = [name.strip() for name in line]
        break
    if not any(header):
        raise CohortError(f"{path}: has no header row; the first row must name the columns")
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    problems = [f"column {name!r} stands there {header.count(name)} times" for name in repeated]
    rows = []
    for number, line in numbered:
        if not any(cell.strip() for cell in line):
            continue
        extra = [cell for cell in line[len(header) :] if cell.strip()]
        if extra:
            problems.append(
                f"row {number} has {len(line)} cells, the header {len(header)} (too many from "
                f"{extra[0]!r} on); quote values that contain the separator"
            )
        padded = [*line, *[""] * (len(header) - len(line))]
        nameless = [c for name, c in zip(header, padded, strict=False) if not name and c.strip()]
        if nameless:
            problems.append(f"row {number} has the value {nameless[0]!r} in a column without name")
        named = zip(header, padded, strict=False)
        rows.append(Row(number=number, cells={name: cell for name, cell in named if name}))
    refuse(path, problems)
    columns = tuple(name for name in header if name)
    return Cells(path=path, columns=columns, rows=tuple(rows), notes=tuple(notes))


def _text_lines(path: Path, delimiter: str | None) -> Iterator[list[str]]:
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CohortError(f"{path}: is UTF-16 text; save it as UTF-8 (in Excel: CSV UTF-8)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind the mark that it skipped.
        offset = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        row = content[:offset].count(b"\n") + 1
        raise CohortError(
            f"{path}: not UTF-8 (byte 0x{content[offset]:02x} at offset {offset}, about row "
            f"{row}); save it as UTF-8 (in Excel: CSV UTF-8)"
        ) from error
    if "\0" in text:
        raise CohortError(
            f"{path}: is not text (a zero byte at offset {content.index(0)}); give a table as "
            "CSV, TSV, Parquet or XLSX"
        )
    if delimiter is None:
        first_line = text.partition("\n")[0]
        delimiter = max(_DELIMITERS, key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        try:
            line = next(reader, None)
        except csv.Error as error:
            raise CohortError(
                f"{path}: line {reader.line_num} can't be read as a table ({error}); check the "
                "quotation marks"
            ) from error
        if line is None:
            return
        yield line


def _parquet_lines(path: Path) -> Iterator[list[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, ValueError) as error:
        raise CohortError(f"{path}: can't be read as Parquet ({error}); write it again") from error
    yield list(table.column_names)
    columns = [column.to_pylist() for column in table.columns]
    for values in zip(*columns, strict=True):
        yield [_as_text(value) for value in values]


def _xlsx_lines(path: Path, notes: list[str]) -> Iterator[list[str]]:
    try:
        import openpyxl  # type: ignore[import-untyped]
    except ImportError as error:
        raise CohortError(
            f"{path}: reading XLSX needs openpyxl; pip install 'bagscope[xlsx]', or save the "
            "table as CSV UTF-8"
        ) from error
    import zipfile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # styling that openpyxl does not keep
        try:
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise CohortError(
                f"{path}: can't be read as XLSX ({error}); save it again, or as CSV UTF-8"
            ) from error
        with contextlib.closing(book):
            sheet = book.worksheets[0]
            if len(book.worksheets) > 1:
                notes.append(
                    f"{path.name}: read the first of {len(book.worksheets)} sheets, {sheet.title!r}"
                )
            for line in sheet.iter_rows():
                yield [_as_text(cell.value, str(cell.number_format)) for cell in line]


def _as_text(value: Any, number_format: str = "") -> str:
    """Return what the cell shows: 7 with the format 000 is "007"."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int) and _LEADING_ZEROS.fullmatch(number_format):
        return f"{value:0{len(number_format)}d}"
    return str(value)
