"""Whether the demo works and is not trivial, for several seeds of its slides.

    python benchmarks/demo_quality.py [--seeds 0 1 2] [--work FOLDER] [--record]

Runs `bagscope demo` for each seed (a finished demo is found and not made again), and holds its
out-of-fold answers and scores against what was planted. Demanded of every seed: the models tell
slides apart and find the tumour's tiles; a logistic regression on the slides' mean features, or on
their mean colours, by the same folds, does not. How long a demo takes counts only where it is made
from nothing, on a quiet machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import recording

from bagscope.pipeline.demo import DemoRequest, demo_findings

WORK = Path(tempfile.gettempdir()) / "bagscope-benchmarks" / "demo"
MOST_SECONDS = 360


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of `DemoFindings`, and what is demanded of it."""

    field: str
    name: str
    at_least: float | None = None
    at_most: float | None = None


MEASURES = (
    Measure("auroc", "slides, cross-validated", at_least=0.9),
    Measure("tile_auroc", "tiles against planted tumour, all slides on one scale", at_least=0.85),
    Measure("tile_auroc_within", "tiles within slides with tumour, mean"),
    Measure("linear_auroc", "slides by mean features, logistic regression", at_most=0.8),
    Measure("colour_auroc", "slides by mean colour, logistic regression", at_most=0.8),
)


def main() -> None:
    """Make the demos, measure them, show and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=WORK, help="where the demos lie")
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    rows = [row for seed in arguments.seeds for row in measured(arguments.work / str(seed), seed)]
    recording.show(rows)
    if arguments.record:
        recording.record("demo", rows, packages=["torch", "scikit-learn"], script="demo_quality.py")


def measured(folder: Path, seed: int) -> list[recording.Row]:
    """Make a demo and return its numbers; seconds only where nothing of it was there."""
    is_new = not folder.exists()
    started = time.perf_counter()
    command = [sys.executable, "-m", "bagscope", "demo", str(folder), "--seed", str(seed)]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    found = demo_findings(DemoRequest(folder=folder))
    rows = [
        recording.Row(
            f"seed {seed}: {measure.name}",
            getattr(found, measure.field),
            "AUROC",
            at_least=measure.at_least,
            at_most=measure.at_most,
        )
        for measure in MEASURES
    ]
    rows.append(
        recording.Row(f"seed {seed}: heatmaps of tumour that warn", found.warned_tumor, "slides")
    )
    if is_new:
        rows.append(recording.Row(f"seed {seed}: from nothing", seconds, "s", at_most=MOST_SECONDS))
    return [*rows, *bundle_rows(folder, seed)]


def bundle_rows(folder: Path, seed: int) -> list[recording.Row]:
    """Make the demo's review page once more, elsewhere; return its size and how long it took."""
    run = DemoRequest(folder=folder).run
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "review"
        started = time.perf_counter()
        command = [sys.executable, "-m", "bagscope", "review", str(run), "--out", str(out)]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return [
        recording.Row(f"seed {seed}: review page", size / 2**20, "MiB"),
        recording.Row(f"seed {seed}: review page, made in", seconds, "s"),
    ]


if __name__ == "__main__":
    main()
