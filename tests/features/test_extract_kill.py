"""Kill an extraction at named steps, resume it, and find the files of one that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.features import drilled_extraction
from tests.features.drilled_extraction import COUNTS, sessions
from tests.features.engine_parts import SmallStudy, features_of, leftovers, make_study, run_engine

REPOSITORY = Path(__file__).parent.parent.parent
SEED = 20
# How often at most the step may have come by when the run is killed.
STEPS = {
    "mid-write": 9,
    "features-written": 9,
    "before-rename": 12,
    "after-rename": 12,
    "status": 5,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SmallStudy:
    return make_study(tmp_path_factory.mktemp("study"), COUNTS)


@pytest.fixture(scope="module")
def expected(study: SmallStudy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run_engine(study, sessions(), out, readers=2).report.exit_code == 0
    found = features_of(out)
    assert len(found) == 2 * len(COUNTS)
    return found


def kill(study: SmallStudy, out: Path, step: str) -> int:
    occurrence = random.Random(f"{SEED} {step}").randint(1, STEPS[step])
    done = subprocess.run(
        [
            sys.executable, str(Path(drilled_extraction.__file__)),
            str(study.folder), str(out), f"{step}:{occurrence}",
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    return occurrence


@pytest.mark.parametrize("step", STEPS)
def test_an_extraction_killed_at_a_step_is_resumed_to_the_same_bytes(
    study: SmallStudy, expected: dict[str, bytes], tmp_path: Path, step: str
) -> None:
    kill(study, tmp_path, step)
    assert leftovers(tmp_path), "it was killed with nothing in hand"
    for name, content in features_of(tmp_path).items():
        assert name.endswith(".tmp") or content == expected[name], (
            f"{name}: half a file looks whole"
        )
    ran = run_engine(study, sessions(), tmp_path)
    assert ran.report.exit_code == 0
    assert features_of(tmp_path) == expected
    assert leftovers(tmp_path) == []
    assert ran.statuses.keys() == COUNTS.keys()
    for slide_id, status in ran.statuses.items():
        assert status.outcome in ("done", "skipped")
        assert status.facts["tiles"] == COUNTS[slide_id]
