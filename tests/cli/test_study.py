"""What is wrong with studies and tables; `doctor`, `demo`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

Command = Callable[..., Ran]


def test_an_option_on_the_command_line_wins_over_the_study(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    bagscope("init", study, "--slides", slides)
    (study / "study.yaml").write_text("tiling: {mpp: 2.0, tile_px: 64}\n")
    ran = bagscope("tile", study, "--mpp", 1.0, "--dry-run", "--json")
    spec = json.loads(ran.out)
    assert spec["mpp"] == 1.0
    assert spec["tile_px"] == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tilling: {}\n", "did you mean 'tiling'?"),
        ("tiling: {mp: 0.5}\n", "did you mean 'mpp'?"),
        ("tiling: {mpp: fast}\n", "tiling.mpp is 'fast'"),
        ("tiling: [\n", "not readable as YAML"),
        ("- a\n", "holds list"),
    ],
)
def test_a_study_file_that_does_not_fit_is_refused(
    bagscope: Command, slides: Path, tmp_path: Path, text: str, message: str
) -> None:
    study = tmp_path / "study"
    bagscope("init", study, "--slides", slides)
    (study / "study.yaml").write_text(text)
    ran = bagscope("tile", study)
    assert ran.code == 2
    assert message in ran.err
    assert "study.yaml" in ran.err


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"slide,path\na,a.svs\n", "slide_id"),
        (b"slide_id,path\na,a.svs\na,b.svs\n", "'a'"),
        (b"slide_id,path\nCase1,a.svs\ncase1,b.svs\n", "case1"),
        (b"slide_id,path\na,\xff\xfe.svs\n", "UTF-8"),
        (b"slide_id,path,mpp\na,a.svs,0\n", "mpp"),
        (b"slide_id,path,mpp\na,a.svs,-1\n", "mpp"),
        (b"slide_id,path,mpp\na,a.svs,250\n", "mpp"),
        (b"", "cohort.csv"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    bagscope: Command, tmp_path: Path, table: bytes, message: str
) -> None:
    path = tmp_path / "cohort.csv"
    path.write_bytes(table)
    ran = bagscope("init", tmp_path / "study", "--slides", path)
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "study").exists()


def test_doctor_speaks_json_and_stays_offline(bagscope: Command) -> None:
    ran = bagscope("doctor", "--json")
    checks = json.loads(ran.out)["checks"]
    assert checks["packages"]["numpy"]
    assert checks["slides"]["OpenSlide"].startswith(("4", "5"))
    assert "network" not in checks
    assert checks["compute"]["kernels, cpu"] == "cpu"
    text = bagscope("doctor")
    assert "OpenSlide" in text.out


def test_the_module_runs_and_names_its_version() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "bagscope", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("bagscope 0.")
    wrong = subprocess.run(
        [sys.executable, "-m", "bagscope", "tile", "/nowhere/at/all"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("bagscope: ")
    assert "Traceback" not in wrong.stderr
