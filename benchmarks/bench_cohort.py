"""What the cohort runner costs per slide, and what a second worker brings.

    python benchmarks/bench_cohort.py [--record]

Overhead is the wall-clock time of a run over slides on which there is nothing to do, divided by
their number: claim, sending, status, reporting, and the start of the workers. Speed-up is that of
two workers over one on slides that each take the same number of steps of pure computation. A
second processor that is only half there (a shared machine) would show as the runner's fault, so
two bare processes without any runner are timed in the same breath.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import recording
from recording import Row

from bagscope.cohort.progress import SilentReporter
from bagscope.cohort.runner import Job, RunOptions, RunReport, StageResult, run_cohort

TRIVIAL_SLIDES = 300
BUSY_SLIDES = 24
BUSY_STEPS = 4_000_000
ROUNDS = 5


def nothing(job: Job) -> StageResult:
    return StageResult(outcome="done", fingerprint="f", facts={"tiles": 1})


def compute(job: Job) -> StageResult:
    return StageResult(outcome="done", fingerprint="f", facts={"sum": spin(BUSY_STEPS)})


def crash(job: Job) -> StageResult:
    import os

    os.abort()


def spin(steps: int) -> int:
    total = 0
    for i in range(steps):
        total += i & 7
    return total


def timed(work, slides: int, workers: int) -> tuple[float, RunReport]:
    with tempfile.TemporaryDirectory() as folder:
        began_s = time.perf_counter()
        report = run_cohort(
            [Job(slide_id=f"s{i:04}") for i in range(slides)],
            work,
            stage="bench",
            status_dir=Path(folder),
            options=RunOptions(workers=workers),
            report=SilentReporter(),
        )
        seconds = time.perf_counter() - began_s
        statuses = len(list(Path(folder, "bench").glob("*.json")))
    assert statuses == slides, f"{statuses} statuses for {slides} slides"
    return seconds, report


def bare_processes(count: int) -> float:
    """Return the seconds in which bare processes do all busy slides between them."""
    steps = BUSY_SLIDES * BUSY_STEPS // count
    code = f"import bench_cohort; bench_cohort.spin({steps})"
    began_s = time.perf_counter()
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
        for _ in range(count)
    ]
    assert all(process.wait() == 0 for process in running)
    return time.perf_counter() - began_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the results down")
    arguments = parser.parse_args()
    here = sys.modules["bench_cohort"]

    overhead_ms, crash_ms, gain, bare_gain = [], [], [], []
    for _ in range(ROUNDS):
        seconds, report = timed(here.nothing, TRIVIAL_SLIDES, 1)
        assert report.counts["done"] == TRIVIAL_SLIDES
        overhead_ms.append(1000 * seconds / TRIVIAL_SLIDES)
        seconds, report = timed(here.crash, 20, 1)
        assert report.counts["failed"] == 20
        crash_ms.append(1000 * seconds / 20)
        # One and two workers in turn, so that a slow spell of the machine meets both.
        gain.append(timed(here.compute, BUSY_SLIDES, 1)[0] / timed(here.compute, BUSY_SLIDES, 2)[0])
        bare_gain.append(bare_processes(1) / bare_processes(2))
    rows = [
        Row("overhead per slide, 1 worker", statistics.median(overhead_ms), "ms", at_most=30),
        Row("a slide that crashes its worker", statistics.median(crash_ms), "ms"),
        Row("2 workers / 1 worker", statistics.median(gain), "x", at_least=1.8),
        Row("2 bare processes / 1", statistics.median(bare_gain), "x"),
    ]
    recording.show(rows)
    if arguments.record:
        recording.record("cohort", rows, packages=["psutil"])
    return int(any(row.verdict == "missed" for row in rows))


if __name__ == "__main__":
    import bench_cohort  # workers find the stages under this name, not as __main__

    sys.exit(bench_cohort.main())
