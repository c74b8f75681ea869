"""Splits as files: a table that a spreadsheet shows, and beside it how it was made.

`<name>.csv` has one row per case, in order of name, with `case_id`, `patient_id` and one column
per split, `r0_f0`, `r0_f1`, ... (repeat, fold), whose cells are train, val or test. `<name>.json`
holds spec, targets, and fingerprints of the labels and of the table's content. A table without
its JSON can be read too.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from bagscope import artifacts
from bagscope.artifacts import Json, fingerprint, require_same
from bagscope.cohort.cells import Cells, read_cells
from bagscope.errors import ArtifactError, FingerprintMismatch, SchemaError
from bagscope.mil.splits.plan import SIDES, Side, Split, SplitPlan, SplitSpec
from bagscope.mil.targets import TargetSpec
from bagscope.specs import parse_spec

SCHEMA_VERSION = 1
_SPLIT_COLUMN = re.compile(r"r(\d+)_f(\d+)")


def write_splits(plan: SplitPlan, path: Path, *, overwrite: bool = False) -> bool:
    """Write a plan to `path` (CSV) and its settings beside it; return whether anything changed.

    Raises:
        FingerprintMismatch: other splits are there already, and `overwrite` is not set.
    """
    description = _description(plan)
    if path.exists():
        if _is_same(path, description):
            return False
        if not overwrite:
            _refuse(path, description)
    # The table last: it is what says that the splits are there.
    artifacts.write_json(settings_path(path), description)
    artifacts.write_text(path, _as_csv(plan))
    return True


def read_splits(path: Path) -> SplitPlan:
    """Read a plan; whether it is sound is for `check_splits` to say.

    Raises:
        ArtifactError: no such file.
        SchemaError: it holds no splits, or a cell that is no side.
        CohortError: it is not readable as a table.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such splits; make them with bagscope splits make")
    cells = read_cells(path)
    lacking = [name for name in ("case_id", "patient_id") if name not in cells.columns]
    numbers = {name: match for name in cells.columns if (match := _SPLIT_COLUMN.fullmatch(name))}
    if lacking or not numbers:
        wanted = ", ".join(lacking) or "split such as r0_f0"
        raise SchemaError(f"{path}: has no column {wanted}; make it with bagscope splits make")
    settings = _read_settings(settings_path(path))
    sites = settings.get("sites", {})
    splits = tuple(
        Split(
            repeat=int(match[1]),
            fold=int(match[2]),
            site=sites.get(name, ""),
            **_sides(cells, name, path),
        )
        for name, match in numbers.items()
    )
    fields = settings.get("fields", {})
    where = str(settings_path(path))
    plan = SplitPlan(
        splits=tuple(sorted(splits, key=lambda split: (split.repeat, split.fold))),
        spec=parse_spec(SplitSpec, fields.get("spec", {"method": "fixed"}), where=where),
        patient_of={
            row.cells["case_id"].strip(): row.cells["patient_id"].strip() for row in cells.rows
        },
        per=fields.get("per"),
        targets=tuple(parse_spec(TargetSpec, t, where=where) for t in fields.get("targets", ())),
        labels=fields.get("labels", ""),
    )
    # What was said of other sides does not hold for these.
    is_as_made = settings.get("sides") == _sides_fingerprint(plan)
    return replace(plan, notes=tuple(settings.get("notes", ()))) if is_as_made else plan


def was_edited(plan: SplitPlan, path: Path) -> bool | None:
    """Return whether a plan is not what its settings were written for; None without settings."""
    settings = _read_settings(settings_path(path))
    return settings["sides"] != _sides_fingerprint(plan) if settings else None


def settings_path(path: Path) -> Path:
    """Return where the settings of splits lie."""
    return path.with_suffix(".json")


def _description(plan: SplitPlan) -> dict[str, Json]:
    fields = {
        "spec": plan.spec.as_json(),
        "per": plan.per,
        "targets": [target.model_dump(mode="json") for target in plan.targets],
        "labels": plan.labels,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "fields": fields,
        "fingerprint": fingerprint(fields),
        "sides": _sides_fingerprint(plan),
        "sites": {split.name: split.site for split in plan.splits if split.site},
        "notes": list(plan.notes),
    }


def _sides_fingerprint(plan: SplitPlan) -> str:
    sides = {split.name: {side: sorted(split.of(side)) for side in SIDES} for split in plan.splits}
    return fingerprint({"patients": dict(plan.patient_of), "sides": sides})


def _as_csv(plan: SplitPlan) -> str:
    columns: list[dict[str, Side]] = []
    for split in plan.splits:
        columns.append({case_id: side for side, ids in split.sides() for case_id in ids})
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case_id", "patient_id", *(split.name for split in plan.splits)])
    for case_id in plan.case_ids:
        sides = [column.get(case_id, "") for column in columns]
        writer.writerow([case_id, plan.patient_of[case_id], *sides])
    return text.getvalue()


def _is_same(path: Path, description: dict[str, Json]) -> bool:
    try:
        settings = _read_settings(settings_path(path))
        if not settings or settings["fingerprint"] != description["fingerprint"]:
            return False
        return bool(_sides_fingerprint(read_splits(path)) == description["sides"])
    except ArtifactError:
        return False


def _refuse(path: Path, description: dict[str, Json]) -> None:
    remedy = "replace it with --overwrite, or choose another --name"
    settings = _read_settings(settings_path(path))
    if settings:
        require_same(settings["fields"], description["fields"], what=str(path), remedy=remedy)
    raise FingerprintMismatch(
        f"{path}: holds other sides than these settings give (edited, or made of another file); "
        f"{remedy}"
    )


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    settings = artifacts.read_json(path)
    if not isinstance(settings, dict) or not {"fields", "fingerprint", "sides"} <= settings.keys():
        raise SchemaError(f"{path}: lacks fields, fingerprint or sides; make the splits again")
    if settings.get("schema_version") != SCHEMA_VERSION:
        raise SchemaError(
            f"{path}: has schema version {settings.get('schema_version')}, this package reads "
            f"{SCHEMA_VERSION}; make the splits again"
        )
    return settings


def _sides(cells: Cells, column: str, path: Path) -> dict[str, Any]:
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    for row in cells.rows:
        side = row.cells[column].strip()
        if not side:
            continue
        if side not in sides:
            raise SchemaError(
                f"{path}: row {row.number}, column {column}: {side!r} is none of "
                f"{', '.join(SIDES)}; correct it"
            )
        sides[side].append(row.cells["case_id"].strip())
    return {side: tuple(sorted(case_ids)) for side, case_ids in sides.items()}
