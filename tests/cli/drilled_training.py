"""`bagscope train` whose workers kill the whole process group at a named step.

`BAGSCOPE_DRILL=STEP:OCCURRENCE python drilled_training.py train STUDY ...`; occurrences are counted
in each worker on its own.
"""

from __future__ import annotations

import os
import signal
import time

from bagscope import artifacts
from bagscope.cohort.jobs import Job, StageResult
from bagscope.pipeline import train

undrilled = train.train_one


def train_one(job: Job) -> StageResult:
    """Train a member, and die at the step that the environment names."""
    name, _, occurrence = os.environ["BAGSCOPE_DRILL"].partition(":")
    left = [int(occurrence)]

    def observe(step: str) -> None:
        if step == name:
            left[0] -= 1
            if left[0] == 0:
                os.killpg(0, signal.SIGKILL)
                time.sleep(60)

    artifacts.observe_step = observe
    return undrilled(job)


if __name__ == "__main__":
    from bagscope.cli.entry import main

    # Workers find the stage under its module's name, not as __main__.
    from tests.cli import drilled_training

    train.train_one = drilled_training.train_one
    main()
