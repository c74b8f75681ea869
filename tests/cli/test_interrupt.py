"""Ctrl-C and SIGKILL in the middle of a real command, and going on afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import files_of, leftovers

COPIES = 30


@pytest.fixture
def cohort(slides: Path) -> Path:
    """Thirty slides, so that there is a middle to be interrupted in."""
    (slides / "b.svs").unlink()
    (slides / "c.svs").unlink()
    for index in range(COPIES - 1):
        os.link(slides / "a.svs", slides / f"s{index:02d}.svs")
    return slides


def command(study: Path, cohort: Path) -> list[str]:
    options = ["--slides", str(cohort), "--mpp", "1", "--tile-px", "128", "--workers", "2"]
    return [sys.executable, "-m", "bagscope", "tile", str(study), *options]


def start_and_wait_for_the_middle(study: Path, cohort: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command(study, cohort),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[3/"):
            return process
    raise AssertionError("the run ended before its middle")


def test_ctrl_c_stops_within_two_seconds_and_says_how_to_go_on(
    cohort: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    process = start_and_wait_for_the_middle(study, cohort)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert time.monotonic() - started < 2
    assert process.returncode == 130
    assert f"go on with: bagscope tile {study} --slides" in out
    assert leftovers(study) == []
    made = list((study / "tilings").rglob("*.h5"))
    assert 3 <= len(made) < COPIES
    finished = subprocess.run(command(study, cohort), capture_output=True, text=True)
    assert finished.returncode == 0
    assert len(list((study / "tilings").rglob("*.h5"))) == COPIES


def test_a_killed_run_is_resumed_to_the_same_bytes(cohort: Path, tmp_path: Path) -> None:
    undisturbed, study = tmp_path / "undisturbed", tmp_path / "study"
    assert subprocess.run(command(undisturbed, cohort), capture_output=True).returncode == 0
    process = start_and_wait_for_the_middle(study, cohort)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    finished = subprocess.run(command(study, cohort), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert leftovers(study) == []
    assert files_of(study / "tilings") == files_of(undisturbed / "tilings")
