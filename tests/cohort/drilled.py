"""A stage whose run kills its whole process group at a named step: `python drilled.py STUDY`.

BAGSCOPE_DRILL holds "step:occurrence"; occurrences are counted in each process on its own.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from bagscope import artifacts
from bagscope.cohort.progress import SilentReporter
from bagscope.cohort.runner import Job, RunOptions, StageResult, run_cohort

SLIDES = 6


def arm() -> None:
    """Die at the step that the environment names."""
    name, _, occurrence = os.environ.get("BAGSCOPE_DRILL", "").partition(":")
    if not name or artifacts.observe_step is not None:
        return
    left = [int(occurrence)]

    def observe(step: str) -> None:
        if step == name:
            left[0] -= 1
            if left[0] == 0:
                os.killpg(0, signal.SIGKILL)
                time.sleep(60)

    artifacts.observe_step = observe


def make(job: Job, folder: Path) -> StageResult:
    """Write a file whose bytes follow from the slide's id, unless it is there."""
    arm()
    path = folder / f"{job.slide_id}.bin"
    fingerprint = artifacts.fingerprint({"slide_id": job.slide_id})
    if path.exists():
        return StageResult(
            outcome="skipped",
            fingerprint=fingerprint,
            content_hash=artifacts.sha256_of_file(path),
            facts={"tiles": 1},
        )
    content = hashlib.sha256(job.slide_id.encode()).digest() * 2000
    artifacts.write_bytes(path, content)
    return StageResult(
        outcome="done",
        fingerprint=fingerprint,
        content_hash=artifacts.sha256_of_file(path),
        facts={"tiles": 1},
    )


def main(study: Path) -> int:
    """Run the stage over the study."""
    arm()
    report = run_cohort(
        [Job(slide_id=f"s{i}") for i in range(SLIDES)],
        partial(make, folder=study / "made"),
        stage="make",
        status_dir=study / "status",
        options=RunOptions(workers=2, sweep=(study / "made",)),
        report=SilentReporter(),
    )
    return report.exit_code


if __name__ == "__main__":
    # Workers find the stage under its module's name, not as __main__.
    import drilled

    sys.exit(drilled.main(Path(sys.argv[1])))
