"""Kill a run at named steps, resume it, and find no difference from one that nobody disturbed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import drilled
import pytest

SEED = 20

# Steps seen in the process that runs the cohort happen once or more per slide; those of a worker
# count in that worker alone, which may get but a few of the slides.
STEPS = {
    "claimed": 5,
    "mid-write": 2,
    "before-rename": 2,
    "after-rename": 2,
    "status": 5,
}


def run(study: Path, environment: dict[str, str], kill_at: str = "") -> int:
    done = subprocess.run(
        [sys.executable, str(Path(drilled.__file__)), str(study)],
        env={**environment, "BAGSCOPE_DRILL": kill_at},
        start_new_session=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode


def made(study: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(study)): p.read_bytes()
        for p in sorted((study / "made").rglob("*"))
        if p.is_file()
    }


def outcomes(study: Path) -> dict[str, tuple[str, str, str]]:
    """What a status says that does not depend on time, host, or who made the artefact when."""
    found = {}
    for path in sorted((study / "status").rglob("[!.]*")):
        if path.is_file():
            record = json.loads(path.read_text())
            assert record["outcome"] in ("done", "skipped")
            found[str(path.relative_to(study))] = (
                record["fingerprint"],
                record["content_hash"],
                record["facts"],
            )
    return found


@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_at_a_step_resumes_to_the_same_bytes(tmp_path, script_environment, step):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    assert run(undisturbed, script_environment) == 0
    expected = made(undisturbed)
    assert len(expected) == drilled.SLIDES

    occurrence = random.Random(f"{SEED} {step}").randint(1, STEPS[step])
    code = run(disturbed, script_environment, f"{step}:{occurrence}")
    assert code == -signal.SIGKILL
    assert list(disturbed.rglob("*.claim")), "it was killed with nothing in hand"
    for path in (disturbed / "made").glob("[!.]*"):
        assert path.read_bytes() == expected[f"made/{path.name}"], "half a file looks whole"

    assert run(disturbed, script_environment) == 0
    assert made(disturbed) == expected
    assert outcomes(disturbed) == outcomes(undisturbed)
    everything = {p.name for p in disturbed.rglob("*")}
    assert everything == {p.name for p in undisturbed.rglob("*")}
    assert not [name for name in everything if name.endswith((".tmp", ".claim"))]


def test_killed_again_and_again_it_still_gets_there(tmp_path, script_environment):
    chance = random.Random(SEED)
    assert run(tmp_path / "undisturbed", script_environment) == 0
    study = tmp_path / "disturbed"
    for _ in range(4):
        step = chance.choice(list(STEPS))
        run(study, script_environment, f"{step}:{chance.randint(1, STEPS[step])}")
    assert run(study, script_environment) == 0
    assert made(study) == made(tmp_path / "undisturbed")
    assert {p.name for p in study.rglob("*")} == {
        p.name for p in (tmp_path / "undisturbed").rglob("*")
    }
