"""What metrics.csv holds, for TensorBoard and MLflow too (extra `track`).

A member's tracker is begun anew when its training begins or is taken up again, and is told all
epochs that there are, so that it holds each once.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol

from bagscope.errors import ConfigError
from bagscope.mil.training.history import Epoch

TrackerName = Literal["tensorboard", "mlflow"]
TENSORBOARD_FOLDER = "tensorboard"
MLFLOW_NAME = "mlflow.db"


class Tracker(Protocol):
    """Takes the numbers of epochs."""

    def add(self, epoch: Epoch) -> None:
        """Write an epoch's numbers."""
        ...

    def close(self) -> None:
        """Write whatever is not written yet."""
        ...


def require_tracker(name: TrackerName | None) -> None:
    """Refuse a tracker whose package is missing, before anything is trained.

    Raises:
        ConfigError: it is.
    """
    if name is not None and find_spec(name) is None:
        raise ConfigError(
            f"--track {name}: the package is missing; install it with pip install {name}, or all "
            "trackers with pip install 'bagscope[track]'"
        )


class Tracking:
    """A tracker for each member of a run; in the one process that hears of all of them."""

    def __init__(self, name: TrackerName, run: Path) -> None:
        self._kind: type[_TensorBoard | _MLflow] = (
            _TensorBoard if name == "tensorboard" else _MLflow
        )
        self._run = run
        self._open: dict[str, Tracker] = {}

    def add(self, member: str, epochs: Sequence[Epoch]) -> None:
        """Take a member's epochs, from the first one on where it was just begun or taken up."""
        if epochs[0].number == 1:
            self._run.mkdir(parents=True, exist_ok=True)
            self._open[member] = self._kind(self._run, member)
        for epoch in epochs:
            self._open[member].add(epoch)

    def close(self) -> None:
        """Write whatever is not written yet."""
        for tracker in self._open.values():
            tracker.close()


def numbers_of(epoch: Epoch) -> Mapping[str, float]:
    """Return the columns of metrics.csv by name, without those that are no number."""
    values = {f"loss_{name}": value for name, value in epoch.losses.items()}
    plain = epoch.plain()
    values |= {name: float(plain[name]) for name in plain if name not in ("number", "losses")}
    return {name: value for name, value in values.items() if math.isfinite(value)}


class _TensorBoard:
    def __init__(self, run: Path, member: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / TENSORBOARD_FOLDER / member
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))

    def add(self, epoch: Epoch) -> None:
        for name, value in numbers_of(epoch).items():
            self._writer.add_scalar(name, value, epoch.number)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, run: Path, member: str) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=f"sqlite:///{run / MLFLOW_NAME}")
        found = self._client.get_experiment_by_name(run.name)
        experiment = found.experiment_id if found else self._client.create_experiment(run.name)
        for old in self._client.search_runs([experiment]):
            if old.info.run_name == member:
                self._client.delete_run(old.info.run_id)
        self._run_id = self._client.create_run(experiment, run_name=member).info.run_id

    def add(self, epoch: Epoch) -> None:
        for name, value in numbers_of(epoch).items():
            self._client.log_metric(self._run_id, name, value, step=epoch.number)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
