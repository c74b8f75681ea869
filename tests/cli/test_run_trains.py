"""`run`, from slides to a report, where study.yaml names targets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

Command = Callable[..., Ran]
STUDY = """
tiling: {mpp: 1.0, tile_px: 128}
features: {encoders: [color-texture]}
targets: [{column: label}]
splits: {folds: 2}
train:
  options: {aggregator: {options: {hidden: 8, attention: 4}}, training: {epochs: 2}}
run: {workers: 2}
"""


@pytest.fixture
def study(slides: Path, tmp_path: Path) -> Path:
    """Return a study of nine slides, which are links to three."""
    names = [f"{name}{copy}" for copy in range(3) for name in "abc"]
    for name in names:
        os.link(slides / f"{name[0]}.svs", slides / f"{name}.svs")
    rows = "".join(f"{name},slides/{name}.svs,{place % 2}\n" for place, name in enumerate(names))
    (tmp_path / "table.csv").write_text(f"slide_id,path,label\n{rows}")
    return tmp_path / "study"


@pytest.mark.slow
def test_run_goes_on_to_train_and_evaluate(bagscope: Command, study: Path) -> None:
    assert bagscope("init", study, "--slides", study.parent / "table.csv").code == 0
    (study / "study.yaml").write_text(STUDY)
    shard = bagscope("run", study, "--shard", "1/2")
    assert shard.code == 0, shard.err
    assert "when all parts are done, go on with: bagscope train" in shard.err
    assert not (study / "runs").exists()
    ran = bagscope("run", study)
    assert ran.code == 0, ran.err
    assert "report: " in ran.out
    run = study / "runs" / "abmil"
    assert {"predictions.csv", "metrics.json", "report.html"} <= {p.name for p in run.iterdir()}


@pytest.mark.slow
def test_run_does_not_train_without_all_features(bagscope: Command, study: Path) -> None:
    assert bagscope("init", study, "--slides", study.parent / "table.csv").code == 0
    (study / "study.yaml").write_text(STUDY)
    (study.parent / "slides" / "b2.svs").unlink()
    (study.parent / "slides" / "b2.svs").write_bytes(b"no slide")
    ran = bagscope("run", study)
    assert ran.code == 1
    assert "not trained: some slides have no features" in ran.err
    assert "--skip-missing" in ran.err
    assert not (study / "runs").exists()
