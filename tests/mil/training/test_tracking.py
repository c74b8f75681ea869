from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest

from bagscope.errors import ConfigError
from bagscope.mil.training.history import Epoch
from bagscope.mil.training.tracking import (
    MLFLOW_NAME,
    TENSORBOARD_FOLDER,
    Tracking,
    numbers_of,
    require_tracker,
)

COLUMNS = {
    "loss_total", "loss_bag", "validation_loss", "lr", "tiles", "seconds", "waited_s",
}  # fmt: skip


def epoch(number: int) -> Epoch:
    return Epoch(
        number=number,
        losses={"total": 1.0 / number, "bag": 0.5 / number},
        validation_loss=2.0 / number,
        metric=math.nan,
        lr=1e-4,
        tiles=12,
        seconds=0.5,
        waited_s=0.25,
    )


EPOCHS = [epoch(number) for number in (1, 2, 3)]


def told(tracking: Tracking) -> None:
    """Tell one member all at once; of another a part, then all when it is taken up again."""
    tracking.add("one", EPOCHS)
    tracking.add("other", EPOCHS[:1])
    tracking.add("other", EPOCHS[1:2])
    tracking.add("other", EPOCHS)
    tracking.close()


def test_they_are_the_columns_of_the_csv_that_are_numbers() -> None:
    assert set(numbers_of(EPOCHS[0])) == COLUMNS
    known = dataclasses.replace(EPOCHS[0], metric=0.75)
    assert set(numbers_of(known)) == {*COLUMNS, "metric"}
    assert numbers_of(known)["metric"] == 0.75


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_every_epoch_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told(Tracking("tensorboard", tmp_path))
    for member in ("one", "other"):
        events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER / member))
        events.Reload()
        assert set(events.Tags()["scalars"]) == COLUMNS
        found = [(event.step, event.value) for event in events.Scalars("validation_loss")]
        assert found == [(e.number, pytest.approx(e.validation_loss)) for e in EPOCHS]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_holds_every_epoch_once(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    told(Tracking("mlflow", tmp_path))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / MLFLOW_NAME}")
    experiment = client.get_experiment_by_name(tmp_path.name)
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["one", "other"]
    for run in runs:
        found = client.get_metric_history(run.info.run_id, "loss_total")
        assert [(m.step, m.value) for m in found] == [(e.number, e.losses["total"]) for e in EPOCHS]


def test_a_missing_package_is_said_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bagscope.mil.training import tracking

    require_tracker(None)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install mlflow.*bagscope\[track\]"):
        require_tracker("mlflow")
    assert importlib.util.find_spec("bagscope") is not None
