"""What became of each slide in each stage: `status/<stage>/<slide_id>.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.errors import SchemaError

Outcome = Literal["done", "skipped", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("done", "skipped", "failed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What became of one slide in one stage.

    Attributes:
        slide_id: as in the cohort table.
        stage: name of the stage.
        outcome: made now, found made already, or not made.
        seconds: wall-clock time that the slide took.
        host: the machine that worked on it.
        fingerprint: of the artefact's inputs and settings; empty where it failed.
        content_hash: of the artefact's content; empty where the stage gives none.
        facts: what the stage counted or measured.
        warnings: sentences for the user.
        error_class: name of the exception; empty unless it failed.
        message: one sentence; empty unless it failed.
        traceback: for errors that nobody foresaw; empty otherwise.
    """

    slide_id: str
    stage: str
    outcome: Outcome
    seconds: float
    host: str
    fingerprint: str = ""
    content_hash: str = ""
    facts: Mapping[str, Json] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error_class: str = ""
    message: str = ""
    traceback: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusSummary:
    """Counts over many slides; `errors` counts the failed ones by error class."""

    counts: Mapping[Outcome, int]
    errors: Mapping[str, int]
    seconds: float
    tiles: int


def stage_folder(status_dir: Path, stage: str) -> Path:
    """Return the folder in which a stage's status and claims stand.

    Raises:
        ValueError: a part of the stage's name can't be a folder name everywhere.
    """
    parts = stage.split("/")
    for part in parts:
        if problem := artifacts.portable_name_problem(part):
            raise ValueError(f"stage {stage!r}: {part!r} {problem}")
    return status_dir.joinpath(*parts)


def status_path(status_dir: Path, stage: str, slide_id: str) -> Path:
    """Return where a slide's status stands."""
    return stage_folder(status_dir, stage) / f"{slide_id}.json"


def write_status(status_dir: Path, status: Status) -> None:
    """Write a slide's status atomically.

    Raises:
        ArtifactError: it can't be written.
    """
    artifacts.write_json(status_path(status_dir, status.stage, status.slide_id), asdict(status))


def read_status(status_dir: Path, stage: str, slide_id: str) -> Status | None:
    """Return a slide's status, or None where the stage never came to it.

    Raises:
        SchemaError: the file is there but damaged.
    """
    path = status_path(status_dir, stage, slide_id)
    return _parse(path) if path.exists() else None


def read_statuses(status_dir: Path, stage: str) -> dict[str, Status]:
    """Return the status of every slide that a stage came to, by slide id, in order of name.

    Raises:
        SchemaError: a file is damaged.
    """
    found = [_parse(path) for path in sorted(stage_folder(status_dir, stage).glob("[!.]*.json"))]
    return {status.slide_id: status for status in found}


def summarise(statuses: Iterable[Status]) -> StatusSummary:
    """Count outcomes, error classes, seconds and tiles."""
    counts: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
    errors: Counter[str] = Counter()
    seconds, tiles = 0.0, 0
    for status in statuses:
        counts[status.outcome] += 1
        seconds += status.seconds
        tiles += tiles_of(status.facts)
        if status.outcome == "failed":
            errors[status.error_class] += 1
    return StatusSummary(
        counts=counts, errors=dict(errors.most_common()), seconds=seconds, tiles=tiles
    )


def tiles_of(facts: Mapping[str, Json]) -> int:
    """Return the fact "tiles" where a stage states it as a whole number, else 0."""
    tiles = facts.get("tiles", 0)
    return tiles if isinstance(tiles, int) else 0


def _parse(path: Path) -> Status:
    record = artifacts.read_json(path)
    known = {f.name for f in fields(Status)}
    needed = {"slide_id", "stage", "outcome", "seconds", "host"}
    if not isinstance(record, dict) or not needed <= record.keys():
        raise SchemaError(f"{path}: not a status file; delete it and run the stage again")
    if record["outcome"] not in OUTCOMES:
        raise SchemaError(
            f"{path}: outcome is {record['outcome']!r}, not one of {', '.join(OUTCOMES)}; "
            "delete it and run the stage again"
        )
    # Fields that a later version added are left out, so that older versions still read it.
    values = {name: value for name, value in record.items() if name in known}
    return Status(**{**values, "warnings": tuple(record.get("warnings", ()))})
