from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Ran, files_of
from tests.mil.made_bags import made_study

Command = Callable[..., Ran]
pytest.importorskip("optuna")


@pytest.mark.slow
def test_tuning_chooses_per_fold_and_trains_with_it(bagscope: Command, tmp_path: Path) -> None:
    study, features = made_study(tmp_path, 16)
    (study / "study.yaml").write_text("splits: {method: kfold, folds: 2}\nrun: {workers: 2}\n")
    (tmp_path / "small.yaml").write_text(
        "aggregator: {name: abmil, options: {hidden: 8, attention: 4}}\n"
        "bags: {bags_per_step: 8}\n"
        "training: {epochs: 1, patience: null, min_epochs: 0}\n"
    )
    (tmp_path / "space.yaml").write_text("optimiser.lr: {low: 1.0e-4, high: 0.1, log: true}\n")
    command = [
        "tune", study, "--recipe", tmp_path / "small.yaml", "--space", tmp_path / "space.yaml",
        "--target", "label", "--features", features, "--trials", 2, "--inner-folds", 2,
    ]  # fmt: skip
    before = files_of(tmp_path)
    planned = bagscope(*command, "--dry-run")
    assert planned.code == 0
    assert "2 trials on 2 inner folds for each of 2 folds, over optimiser.lr" in planned.out
    assert files_of(tmp_path) == before

    ran = bagscope(*command)
    assert ran.code == 0, ran.err
    run = study / "runs" / "small_tuned"
    config = yaml.safe_load((run / "config.yaml").read_text())
    for fold in ("r0_f0", "r0_f1"):
        chosen = json.loads((run / "tuning" / f"{fold}.json").read_text())
        assert len(chosen["trials"]) == 2
        facts = json.loads((run / f"fold_{fold}_s0" / "member.json").read_text())
        lr = chosen["options"]["optimiser.lr"]
        assert facts["recipe"]["optimiser"]["lr"] == lr
        assert config["tuned"][fold] == {"optimiser": {"lr": lr}}
    with (run / "predictions.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 16

    refused = bagscope(*command, "--set", "training.epochs=2")
    assert refused.code == 2
    assert "training.epochs is 1, asked for 2" in refused.err
