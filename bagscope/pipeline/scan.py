"""What is in this cohort, what is wrong with it, and what will it cost. Light to import."""

from __future__ import annotations

import csv
import io
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.cohort.jobs import Job, RunReport, StageResult
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.cohort.status import read_statuses
from bagscope.cohort.table import Cohort
from bagscope.pipeline.preload import WORKER_MODULES
from bagscope.pipeline.study import RunSpec
from bagscope.pipeline.tile import run_options, size_weight
from bagscope.wsi.opening import require_backend
from bagscope.wsi.tiling import TilingSpec

STAGE = "scan"
FEATURE_BYTES = 2
"""Bytes per number of a feature file, which holds float16."""

COLUMNS = (
    "slide_id",
    "problem",
    "format",
    "backend",
    "width_px",
    "height_px",
    "levels",
    "mpp",
    "mpp_source",
    "objective",
    "tissue_fraction",
    "tissue_mm2",
    "tiles",
    "features_mib",
    "read_minutes",
    "file_mib",
    "warnings",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanTask:
    """All that a worker needs to scan one slide."""

    slide_id: str
    path: Path
    mpp: float | None
    spec: TilingSpec
    backend: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CohortScan:
    """A row of facts for each slide, in the cohort's order, and what concerns them all.

    `rows` are keyed by `COLUMNS`; "problem" is empty where the slide can be tiled.
    """

    rows: tuple[Mapping[str, Json], ...]
    notes: tuple[str, ...]
    run: RunReport

    @property
    def problems(self) -> int:
        """Return how many slides have a problem."""
        return sum(bool(row["problem"]) for row in self.rows)

    @property
    def exit_code(self) -> int:
        """Return 130 when interrupted, 1 when a slide has a problem, else 0."""
        return self.run.exit_code or int(self.problems > 0)

    def totals(self) -> dict[str, Json]:
        """Return sums over the slides without a problem."""
        sound = [row for row in self.rows if not row["problem"]]
        return {
            "slides": len(self.rows),
            "problems": self.problems,
            "tiles": sum(int(row["tiles"]) for row in sound),
            "features_gib": round(sum(float(row["features_mib"]) for row in sound) / 1024, 3),
            "read_hours": round(sum(float(row["read_minutes"]) for row in sound) / 60, 3),
            "slide_files_gib": round(sum(float(row["file_mib"]) for row in sound) / 1024, 3),
            "mpp": dict(Counter(f"{float(row['mpp']):.3f}" for row in sound)),
            "formats": dict(Counter(str(row["format"]) for row in sound)),
        }


def scan_cohort(
    cohort: Cohort,
    spec: TilingSpec,
    run: RunSpec,
    report: Reporter,
    *,
    feature_dim: int = 1024,
    backend: str | None = None,
) -> CohortScan:
    """Open every slide of a cohort, tile it in memory and time a few reads; write nothing.

    Args:
        cohort: the table.
        spec: how it would be tiled.
        run: workers, timeout, memory ceiling.
        report: is told of progress.
        feature_dim: numbers per tile that an encoder will give, for the disk estimate.
        backend: read with this one and not the one chosen automatically.
    """
    require_backend(backend)
    jobs = [
        Job(
            slide_id=row.slide_id,
            payload=ScanTask(
                slide_id=row.slide_id, path=row.path, mpp=row.mpp, spec=spec, backend=backend
            ),
            weight=size_weight(row.path),
        )
        for row in cohort.rows
    ]
    with tempfile.TemporaryDirectory(prefix="bagscope-scan-") as scratch:
        result = run_cohort(
            jobs,
            scan_one,
            stage=STAGE,
            status_dir=Path(scratch),
            options=run_options(run, None, "local", preload=WORKER_MODULES),
            report=report,
        )
        statuses = read_statuses(Path(scratch), STAGE)
    rows = []
    for row in cohort.rows:
        status = statuses.get(row.slide_id)
        if status is None:
            continue
        facts = dict(status.facts)
        problem = status.message if status.outcome == "failed" else facts.pop("problem", "")
        rows.append(_row(row.slide_id, problem, facts, status.warnings, feature_dim))
    twins = _same_files({row: statuses[row].fingerprint for row in statuses})
    return CohortScan(
        rows=tuple(_with_twins(row, twins) for row in rows), notes=cohort.notes, run=result
    )


def scan_one(job: Job) -> StageResult:
    """Scan one slide, in a worker."""
    from bagscope.pipeline.scan_worker import scan_task

    return scan_task(job.payload)


def _row(
    slide_id: str,
    problem: str,
    facts: Mapping[str, Json],
    warnings: Sequence[str],
    feature_dim: int,
) -> dict[str, Json]:
    tiles = int(facts.get("tiles") or 0)
    rate = float(facts.get("read_tiles_per_s") or 0)
    row: dict[str, Json] = {name: facts.get(name, "") for name in COLUMNS}
    row |= {
        "slide_id": slide_id,
        "problem": problem,
        "tiles": tiles,
        "features_mib": round(tiles * feature_dim * FEATURE_BYTES / 2**20, 3),
        "read_minutes": round(tiles / rate / 60, 3) if rate else 0.0,
        "file_mib": facts.get("file_mib", 0.0),
        "warnings": " | ".join(warnings),
    }
    return row


def _same_files(identities: Mapping[str, str]) -> dict[str, str]:
    """Map each slide whose content another slide of the cohort shares to that other one."""
    holders: dict[str, list[str]] = defaultdict(list)
    for slide_id, identity in identities.items():
        if identity:
            holders[identity].append(slide_id)
    return {
        slide_id: next(other for other in sorted(group) if other != slide_id)
        for group in holders.values()
        if len(group) > 1
        for slide_id in group
    }


def _with_twins(row: dict[str, Json], twins: Mapping[str, str]) -> dict[str, Json]:
    twin = twins.get(str(row["slide_id"]))
    if twin is None or row["problem"]:
        return row
    return {**row, "problem": f"same file content as slide {twin}; keep one of them"}


def write_scan_csv(scan: CohortScan, path: Path) -> None:
    """Write the rows as CSV, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(scan.rows)
    artifacts.write_text(path, text.getvalue())
