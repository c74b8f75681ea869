"""Several devices, and a cluster, make the files that one process makes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest
import torch

from bagscope.cohort.jobs import RunReport
from bagscope.cohort.progress import Event, Progress, RunFinished, SlideFinished
from bagscope.cohort.status import Outcome
from bagscope.errors import WorkerDied
from bagscope.features.feature_file import read_feature_file
from bagscope.pipeline.extract import ExtractOptions, ExtractResult, extract_cohort
from bagscope.pipeline.extract_devices import _Ended, _Merged
from bagscope.pipeline.study import Study, init_study, open_study
from tests.cli.conftest import slides_once

__all__ = ["slides_once"]

OPTIONS = {
    "tiling": {"mpp": 1.0, "tile_px": 64},
    "features": {"encoders": ["color-texture"], "device": "cpu", "batch_size": 16},
    "run": {"workers": 2},
}


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def alone(slides_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that one process extracted."""
    folder = tmp_path_factory.mktemp("alone") / "study"
    init_study(folder, str(slides_once))
    study = open_study(folder, OPTIONS)
    assert extract_cohort(study, Listener()).report.counts["done"] == 3
    return study


@pytest.fixture
def study(alone: Study, tmp_path: Path) -> Study:
    """The same study, tiled and not extracted."""
    folder = tmp_path / "study"
    shutil.copytree(alone.folder, folder, ignore=shutil.ignore_patterns("features", "extract"))
    table = (alone.folder / "cohort.csv").read_text(encoding="utf-8")
    slides = alone.cohort().rows[0].path.parent
    lines = [table.splitlines()[0]]
    lines += [line.replace(line.split(",")[1], str(slides / Path(line.split(",")[1]).name))
              for line in table.splitlines()[1:]]  # fmt: skip
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_study(folder, OPTIONS)


def with_device(study: Study, device: str) -> Study:
    features = {**OPTIONS["features"], "device": device}
    return open_study(study.folder, {**OPTIONS, "features": features})


def feature_bytes(study: Study) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (study.folder / "features").rglob("*.h5")}


def extract(study: Study, listener: Listener, **options: Any) -> ExtractResult:
    return extract_cohort(study, listener, ExtractOptions(**options))


@pytest.mark.slow
def test_two_devices_make_the_same_bytes_and_tell_one_story(
    alone: Study, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The number of threads is recorded in the files. A Dask cluster started earlier in this
    # process leaves another one in the environment, which device processes must not heed.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads() + 1))
    listener = Listener()
    result = extract(with_device(study, "cpu,cpu"), listener)
    assert result.report.counts == {"done": 3, "skipped": 0, "failed": 0}
    assert feature_bytes(study) == feature_bytes(alone)
    told = [event for event in listener.events if isinstance(event, SlideFinished)]
    assert sorted(event.slide_id for event in told if event.outcome == "done") == ["a", "b", "c"]
    assert told[-1].progress.finished == told[-1].progress.total == 3
    assert isinstance(listener.events[-1], RunFinished)
    assert not list(study.folder.rglob("*.claim"))


def test_a_device_that_gives_up_leaves_its_slides_to_the_others() -> None:
    listener = Listener()
    merged = _Merged(listener)
    report = RunReport(stage="extract/x", total=2, counts={"done": 2, "skipped": 0, "failed": 0})
    progress = Progress(
        finished=1, total=2, failed=0, tiles=4, seconds=1.0, tiles_per_s=4.0, left_s=None
    )
    for outcome in ("skipped", "done", "skipped"):
        for slide_id in ("a", "b"):
            merged.hear(
                SlideFinished(
                    stage="extract/x",
                    slide_id=slide_id,
                    outcome=outcome,  # type: ignore[arg-type]
                    seconds=1.0,
                    progress=progress,
                    facts={"tiles": 4},
                )
            )
    merged.end(_Ended("cuda:0/0", None, "out of memory"))
    merged.end(_Ended("cuda:1/1", report))
    found = merged.close()
    assert found.counts == {"done": 2, "skipped": 0, "failed": 0}
    assert found.tiles == 8
    assert found.warnings == (("cuda:0", "gave up: out of memory"),)


def test_devices_that_all_give_up_end_the_run_in_one_sentence() -> None:
    merged = _Merged(Listener())
    merged.end(_Ended("cuda:0/0", None, "out of memory"))
    merged.end(_Ended("cuda:1/1", None, "its process ended with exit code -9"))
    with pytest.raises(WorkerDied, match=r"cuda:0: out of memory; cuda:1: its process ended"):
        merged.close()


def test_a_device_that_dies_of_being_stopped_has_not_given_up() -> None:
    killed = _Ended("cuda:0/0", None, "its process ended with exit code -15")
    counts: dict[Outcome, int] = {"done": 1, "skipped": 0, "failed": 0}
    merged = _Merged(Listener())
    merged.stop()
    merged.end(killed)
    merged.end(_Ended("cuda:1/1", RunReport(stage="extract/x", total=2, counts=counts)))
    found = merged.close()
    assert found.exit_code == 130 and not found.warnings
    # Nor have all of them, where none had begun.
    merged = _Merged(Listener())
    merged.stop()
    merged.end(killed)
    with pytest.raises(KeyboardInterrupt):
        merged.close()


@pytest.mark.slow
def test_sigterm_ends_all_devices_and_leaves_nothing_half_written(study: Study) -> None:
    script = (
        "import sys; from bagscope.cli.entry import main; "
        f"sys.argv = ['bagscope', 'extract', {str(study.folder)!r}, '-e', 'efficientnet-lite0', "
        "'--mpp', '1', '--tile-px', '64', '--device', 'cpu,cpu', '--workers', '2']\n"
        "if __name__ == '__main__': main()"
    )
    path = study.folder.parent / "command.py"
    path.write_text(script, encoding="utf-8")
    ran = subprocess.Popen([sys.executable, path], stderr=subprocess.PIPE, text=True)
    claims = study.folder / "status" / "extract"
    deadline_s = time.monotonic() + 120
    while not list(claims.rglob("*.claim")) and time.monotonic() < deadline_s:
        assert ran.poll() is None, ran.communicate()[1]
        time.sleep(0.05)
    assert list(claims.rglob("*.claim")), "no slide was begun in two minutes"
    os.kill(ran.pid, signal.SIGTERM)
    ran.communicate(timeout=60)
    assert ran.returncode == 130
    assert not list(study.folder.rglob("*.claim"))
    assert not list(study.folder.rglob(".*.tmp"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as running:
        running.wait_for_workers(1, timeout=60)
        yield running


@pytest.mark.slow
def test_a_cluster_makes_the_same_vectors(alone: Study, study: Study, cluster: Any) -> None:
    (study.tiling_folder("1.00mpp_64px") / "b.h5").unlink()
    result = extract(study, Listener(), executor=cluster.scheduler_address)
    assert result.report.counts["done"] == 3
    ours, theirs = (sorted((s.folder / "features").rglob("*.h5")) for s in (study, alone))
    for mine, reference in zip(ours, theirs, strict=True):
        one, other = read_feature_file(mine), read_feature_file(reference)
        assert one.fingerprint == other.fingerprint
        # The cluster's process has another number of threads, and so may round differently.
        np.testing.assert_allclose(
            np.asarray(one.features, np.float32), np.asarray(other.features, np.float32), atol=2e-3
        )
    again = extract(study, Listener(), executor=cluster.scheduler_address)
    assert again.report.counts["skipped"] == 3
