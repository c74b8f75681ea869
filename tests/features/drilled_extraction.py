"""An extraction that kills its whole process group at a named step.

`python drilled_extraction.py STUDY OUT STEP:OCCURRENCE`
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from bagscope import artifacts
from tests.features.engine_parts import SmallStudy, Tiny, encoder_of, run_engine, session_of

COUNTS = {"a": 11, "empty": 0, "b": 1, "c": 23, "d": 8, "e": 5, "f": 2}


def sessions() -> list:
    """Return the two encoders that are drilled together."""
    return [session_of(Tiny()), session_of(encoder_of(Tiny(seed=1), "second"), batch_size=5)]


def arm(kill_at: str) -> None:
    """Die at a step's n-th occurrence."""
    name, _, occurrence = kill_at.partition(":")
    left = [int(occurrence)]

    def observe(step: str) -> None:
        if step == name:
            left[0] -= 1
            if left[0] == 0:
                os.killpg(0, signal.SIGKILL)
                time.sleep(60)

    artifacts.observe_step = observe


if __name__ == "__main__":
    study, out, kill_at = sys.argv[1:]
    chosen = sessions()
    arm(kill_at)
    run_engine(SmallStudy(Path(study), COUNTS), chosen, Path(out), readers=2)
