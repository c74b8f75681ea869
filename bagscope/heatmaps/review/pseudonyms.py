"""Pseudonyms of slides and patients, in a table that stays at home.

    kind,id,pseudonym
    key,,64 hexadecimal digits
    slide,case-7,S-k3m9xq2a
    patient,Doe,P-7w2hd5ne

A new pseudonym is made of the id and the table's key, which is drawn by chance: who has the table
always gets the same one, and who has not can't get it from the id.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import hmac
import io
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bagscope import artifacts
from bagscope.artifacts import Json, portable_name_problem
from bagscope.cohort.cells import read_cells, refuse
from bagscope.errors import ConfigError
from bagscope.heatmaps.review.spreadsheet import guarded, unguarded

COLUMNS = ("kind", "id", "pseudonym")
_PREFIX = {"slide": "S", "patient": "P"}
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pseudonyms:
    """A table of pseudonyms.

    Attributes:
        key: 64 hexadecimal digits that new pseudonyms are made with.
        slides: by slide id.
        patients: by patient id.
    """

    key: str
    slides: Mapping[str, str]
    patients: Mapping[str, str]

    def digest(self, value: Json) -> str:
        """Return a hash of JSON that nobody without the table can compare with a guess."""
        return _keyed(self.key, artifacts.canonical_json(value)).hex()

    def scrubbed(self, text: str) -> str:
        """Return a sentence with the ids in it replaced."""
        known = {
            one.casefold(): name for one, name in (*self.patients.items(), *self.slides.items())
        }
        if not known:
            return text
        # The longest first, so that no id is cut by another that it begins with.
        listed = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
        words = re.compile(rf"(?<![A-Za-z0-9])(?:{listed})(?![A-Za-z0-9])", re.IGNORECASE)
        return words.sub(lambda found: known[found[0].casefold()], text)


def require_outside(table: Path, bundle: Path) -> None:
    """Refuse a table that would be handed on with the bundle.

    Raises:
        ConfigError: it lies in the bundle.
    """
    if table.resolve().is_relative_to(bundle.resolve()):
        raise ConfigError(
            f"{table}: lies in the review, and would be handed on with it; keep the table of "
            "pseudonyms elsewhere"
        )


def read_pseudonyms(path: Path) -> Pseudonyms:
    """Read a table; one without a key, made by hand, gets one.

    Raises:
        CohortError: lists the rows that make no sense.
    """
    table = read_cells(path)
    lacking = [name for name in COLUMNS if name not in table.columns]
    refuse(path, [f"has no column {name!r}; it needs {', '.join(COLUMNS)}" for name in lacking])
    found: dict[str, dict[str, str]] = {"slide": {}, "patient": {}}
    key = ""
    problems: list[str] = []
    taken: dict[str, str] = {}
    for row in table.rows:
        kind, one, name = (unguarded(row.cells[column].strip()) for column in COLUMNS)
        where = f"row {row.number}"
        if kind == "key":
            if key or not _KEY.fullmatch(name):
                problems.append(f"{where}: there is one key, of 64 hexadecimal digits")
            key = name
        elif kind not in found:
            problems.append(f"{where}, column kind: {kind!r} is none of key, slide, patient")
        elif not one or one in found[kind]:
            problems.append(f"{where}, column id: {one!r} is empty, or stands there twice")
        elif (problem := portable_name_problem(name)) is not None:
            problems.append(f"{where}, column pseudonym: {name!r} {problem}")
        elif taken.setdefault(name.casefold(), one) != one:
            problems.append(f"{where}, column pseudonym: {name!r} stands for another id already")
        else:
            found[kind][one] = name
    real = {one.casefold() for ids in found.values() for one in ids}
    problems += [
        f"column pseudonym: {name!r} is somebody's id"
        for ids in found.values()
        for name in ids.values()
        if name.casefold() in real
    ]
    refuse(path, problems)
    return Pseudonyms(
        key=key or secrets.token_hex(32), slides=found["slide"], patients=found["patient"]
    )


def extended(path: Path, slides: Iterable[str], patients: Iterable[str]) -> Pseudonyms:
    """Return a table's pseudonyms, with new ones for slides and patients that it lacks.

    Nothing is written (see `write_pseudonyms`); without a table all of them are new.

    Raises:
        CohortError: a table that makes no sense.
    """
    before = (
        read_pseudonyms(path)
        if path.exists()
        else Pseudonyms(key=secrets.token_hex(32), slides={}, patients={})
    )
    taken = {name.casefold() for name in (*before.slides.values(), *before.patients.values())}
    return Pseudonyms(
        key=before.key,
        slides=_added("slide", before.key, before.slides, slides, taken),
        patients=_added("patient", before.key, before.patients, patients, taken),
    )


def write_pseudonyms(path: Path, table: Pseudonyms) -> None:
    """Write a table, if it holds more than what is there.

    Raises:
        ConfigError: another process has written another one meanwhile.
        ArtifactError: it can't be written.
    """
    text = _csv(table)
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        there = read_pseudonyms(path)
        if any(
            known.get(one, name) != name
            for known, names in (
                (table.slides, there.slides),
                (table.patients, there.patients),
            )
            for one, name in names.items()
        ):
            raise ConfigError(f"{path}: was written by another process meanwhile; run again")
    artifacts.write_text(path, text)


def _added(
    kind: str, key: str, known: Mapping[str, str], wanted: Iterable[str], taken: set[str]
) -> dict[str, str]:
    made = dict(known)
    for one in wanted:
        attempt = 0
        while one not in made:
            # A patient of one slide has its id, and must not have its pseudonym.
            told = _keyed(key, artifacts.canonical_json([kind, one, attempt]))
            name = f"{_PREFIX[kind]}-{base64.b32encode(told).decode()[:8].lower()}"
            attempt += 1
            if name.casefold() not in taken:
                taken.add(name.casefold())
                made[one] = name
    return made


def _keyed(key: str, content: bytes) -> bytes:
    return hmac.new(bytes.fromhex(key), content, hashlib.sha256).digest()


def _csv(table: Pseudonyms) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerow(("key", "", table.key))
    for kind, names in (("slide", table.slides), ("patient", table.patients)):
        writer.writerows((kind, guarded(one), guarded(name)) for one, name in names.items())
    return text.getvalue()
