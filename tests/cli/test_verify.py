from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from bagscope.cli.verify import verify
from tests.features.stored import store_three


@pytest.fixture
def study(tmp_path: Path) -> Path:
    study = tmp_path / "study"
    store_three(study / "features" / "0.50mpp_256px" / "demo")
    (study / "cohort.csv").write_text("slide_id,path\na,a.svs\n")
    return study


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(verify)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_sound_study_exits_0(study: Path) -> None:
    ran = run(study)
    assert ran.exit_code == 0
    assert ran.stdout == "verify: 4 artefacts, 0 faults\n"


def test_faults_are_listed_and_exit_1(study: Path) -> None:
    path = study / "features/0.50mpp_256px/demo/a.h5"
    os.truncate(path, path.stat().st_size - 1)
    ran = run(study, "--workers", 1)
    assert ran.exit_code == 1
    assert f"{path}: content changed since it was written" in ran.stdout
    assert ran.stdout.endswith("faults\n")


def test_faults_for_programs(study: Path) -> None:
    (study / "cohort.csv").write_text("nonsense\n")
    ran = run(study, "--json")
    assert ran.exit_code == 1
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert lines[0]["event"] == "fault"
    assert lines[0]["path"] == str(study / "cohort.csv")
    assert lines[-1] == {"event": "totals", "artefacts": 4, "faults": len(lines) - 1}


def test_a_long_run_tells_how_far_it_is(study: Path) -> None:
    for index in range(100):
        folder = study / "status" / "tile"
        folder.mkdir(parents=True, exist_ok=True)
        record = {"slide_id": "a", "stage": "s", "outcome": "done", "seconds": 1, "host": "h"}
        (folder / f"{index}.json").write_text(json.dumps(record))
    ran = run(study)
    assert ran.exit_code == 0
    assert len(ran.stderr.splitlines()) == 10
