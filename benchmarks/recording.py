"""What every benchmark does with its numbers: a table to look at, rows to keep.

`results.csv` grows by one line per number; `<benchmark>.md` holds the latest table. The machine
is described by its processor and nothing that names it.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
COLUMNS = (
    "benchmark", "case", "value", "unit", "target", "device", "versions", "commit", "date",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One number; a target where the project set one."""

    case: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """Return the target in words, empty where none was set."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return f"≤ {self.at_most:g}" if self.at_most is not None else ""

    @property
    def verdict(self) -> str:
        """Return whether the target is met."""
        if self.at_least is not None:
            return "met" if self.value >= self.at_least else "missed"
        if self.at_most is not None:
            return "met" if self.value <= self.at_most else "missed"
        return ""

    @property
    def shown(self) -> str:
        """Return the value as people read it."""
        return f"{self.value:,.0f}" if abs(self.value) >= 100 else f"{self.value:.3g}"


class Watch:
    """Times a piece of work, and how much of the processor other programs used meanwhile."""

    def __init__(self) -> None:
        self._begin = (time.perf_counter(), *_processor_seconds())

    def stop(self) -> tuple[float, float]:
        """Return the seconds, and the others' share of all cores (0 where it is not known)."""
        seconds = time.perf_counter() - self._begin[0]
        whole, own = _processor_seconds()
        others = (whole - self._begin[1]) - (own - self._begin[2])
        return seconds, max(0.0, others) / (seconds * (os.cpu_count() or 1))


def _processor_seconds() -> tuple[float, float]:
    """Return the seconds that all programs, and this one, kept the processor busy so far."""
    times = os.times()
    own = times.user + times.system
    stat = Path("/proc/stat")
    if not stat.exists():
        return own, own
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    )
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK"), own


def show(rows: Sequence[Row]) -> None:
    width = max(len(row.case) for row in rows)
    for row in rows:
        target = f"  ({row.target}: {row.verdict})" if row.target else ""
        print(f"{row.case:<{width}}  {row.shown:>8} {row.unit}{target}")


def record(
    benchmark: str,
    rows: Sequence[Row],
    *,
    packages: Sequence[str],
    script: str | None = None,
    on: str | None = None,
) -> None:
    """Append the rows to results.csv and renew them in the table of the benchmark's page.

    Args:
        benchmark: names the page.
        rows: what was measured.
        packages: whose versions count.
        script: `bench_<benchmark>.py` if None.
        on: the device; this processor if None.
    """
    script = script or f"bench_{benchmark}.py"
    versions = "; ".join(
        [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    known = (on or device(), versions, commit(), date)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        if is_new:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow((benchmark, row.case, f"{row.value:.6g}", row.unit, row.target, *known))
    page = HERE / f"{benchmark}.md"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    measured = f"{date}, {known[2]}"
    table = {case: line for case, line in _table_of(old) if case != "case"}
    table |= {
        r.case: f"| {r.case} | {r.shown} | {r.unit} | {r.target} | {r.verdict} | {measured} |"
        for r in rows
    }
    lines = [
        f"# {benchmark}",
        "",
        f"`python benchmarks/{script} --record`. {known[0]}; {versions}.",
        "",
        "| case | value | unit | target | | measured |",
        "|---|---:|---|---|---|---|",
        *table.values(),
    ]
    # What people wrote under the table outlives the table.
    remarks = old.rsplit("|\n", 1)[-1] if "|\n" in old else "\n"
    page.write_text("\n".join(lines) + "\n" + remarks, encoding="utf-8")


def _table_of(page: str) -> Iterator[tuple[str, str]]:
    """Return the case and the line of each row of a page's table.

    A piece of a benchmark may be measured alone: what else the table says stays, with its date and
    commit. A case that was renamed is taken out by hand.
    """
    for line in page.splitlines():
        if line.startswith("| "):
            yield line.split("|")[1].strip(), line


def device() -> str:
    """Return the processor's model and the number of cores this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"
