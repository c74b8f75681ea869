from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import planted
import pytest

from bagscope.cohort.progress import RunStarted, SilentReporter, SlideStarted
from bagscope.cohort.runner import Job, RunOptions, RunReport, run_cohort
from bagscope.cohort.status import read_statuses
from bagscope.errors import ConfigError, WorkerDied

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes and a scheduler on this machine."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as running:
        running.wait_for_workers(2, timeout=60)
        yield running


def pids(cluster: Any) -> set[int]:
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        return set(client.run(os.getpid).values())


def run(cluster: Any, study: Path, payloads: dict[str, Any], **given: Any) -> RunReport:
    report = given.pop("report", SilentReporter())
    work = given.pop("work", planted.behave)
    return run_cohort(
        [Job(slide_id=slide_id, payload=payload) for slide_id, payload in payloads.items()],
        work,
        stage="plant",
        status_dir=study / "status",
        options=RunOptions(executor=cluster.scheduler_address, **given),
        report=report,
    )


def test_a_killed_dask_worker_costs_no_slide(cluster, tmp_path):
    victim = min(pids(cluster))

    class Killer:
        started = 0

        def emit(self, event: object) -> None:
            self.started += isinstance(event, SlideStarted)
            if self.started == 5:
                self.started += 1
                os.kill(victim, signal.SIGKILL)

    work = partial(planted.make_file_slowly, folder=tmp_path)
    slides = {f"s{i:02}": None for i in range(16)}
    report = run(cluster, tmp_path, slides, work=work, report=Killer())
    assert report.exit_code == 0
    assert report.counts["done"] + report.counts["skipped"] == 16
    assert {p.stem for p in tmp_path.glob("*.bin")} == slides.keys()
    assert not list((tmp_path / "status").rglob("*.claim"))
    cluster.wait_for_workers(2, timeout=60)
    assert victim not in pids(cluster)


def test_bad_ends_fail_alone_and_take_no_dask_worker_with_them(cluster, tmp_path):
    cluster.wait_for_workers(2, timeout=60)
    before = pids(cluster)
    payloads = {"aborts": "abort", "hangs": "hang", "swells": ("swell", 800), "raises": "raise"}
    payloads |= {f"good{i}": "ok" for i in range(6)}
    report = run(cluster, tmp_path, payloads, timeout_s=10, memory_limit_mib=250)
    assert {f.slide_id: f.error_class for f in report.failures} == {
        "aborts": "WorkerDied",
        "hangs": "WorkerTimeout",
        "swells": "WorkerOutOfMemory",
        "raises": "SpacingError",
    }
    assert report.counts["done"] == 6
    assert pids(cluster) == before
    statuses = read_statuses(tmp_path / "status", "plant")
    assert not before & {s.facts["pid"] for s in statuses.values() if s.outcome == "done"}


def test_a_cluster_run_and_a_local_run_give_the_same_files(cluster, tmp_path):
    slides = {f"s{i}": None for i in range(4)}
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    run(
        cluster,
        tmp_path / "there",
        slides,
        work=partial(planted.make_file, folder=tmp_path / "there"),
    )
    run_cohort(
        [Job(slide_id=slide_id) for slide_id in slides],
        partial(planted.make_file, folder=tmp_path / "here"),
        stage="plant",
        status_dir=tmp_path / "here" / "status",
        options=RunOptions(),
        report=SilentReporter(),
    )
    for slide_id in slides:
        there, here = (tmp_path / n / f"{slide_id}.bin" for n in ("there", "here"))
        assert there.read_bytes() == here.read_bytes()
    again = run(
        cluster,
        tmp_path / "there",
        slides,
        work=partial(planted.make_file, folder=tmp_path / "there"),
    )
    assert again.counts["skipped"] == 4


def test_ctrl_c_stops_within_two_seconds_on_the_cluster_too(cluster, tmp_path):
    class PressLater:
        pressed_s = 0.0

        def emit(self, event: object) -> None:
            if isinstance(event, SlideStarted) and not self.pressed_s:
                self.pressed_s = time.monotonic() + 1
                threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()

    reporter = PressLater()
    payloads = {f"s{i}": ("write-forever", str(tmp_path)) for i in range(4)}
    report = run(cluster, tmp_path, payloads, report=reporter)
    assert time.monotonic() - reporter.pressed_s < 2
    assert report.exit_code == 130
    assert not list((tmp_path / "status").rglob("*.claim"))


def test_workers_at_most(cluster, tmp_path):
    class Size:
        workers = 0

        def emit(self, event: object) -> None:
            if isinstance(event, RunStarted):
                self.workers = event.workers

    cluster.wait_for_workers(2, timeout=60)
    for asked, expected in ((1, 1), (None, 2), (9, 2)):
        size = Size()
        report = run(cluster, tmp_path, {"a": "ok", "b": "ok"}, workers=asked, report=size)
        assert (size.workers, report.exit_code) == (expected, 0)


def test_a_cluster_that_goes_away_ends_the_run_in_one_sentence(tmp_path):
    doomed = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0"
    )

    class Closer:
        def emit(self, event: object) -> None:
            if isinstance(event, SlideStarted):
                threading.Timer(0.5, doomed.close).start()

    slides = {"a": ("write-forever", str(tmp_path)), "b": "ok"}
    with pytest.raises(WorkerDied, match="the Dask scheduler went away"):
        run(doomed, tmp_path, slides, report=Closer())
    assert not list((tmp_path / "status").rglob("*.claim"))


def test_an_address_without_scheduler_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("bagscope.cohort.executors.dask._CONNECT_S", 0.5)
    for address in ("tcp://127.0.0.1:9", "nowhere"):
        options = RunOptions(executor=address)
        with pytest.raises(ConfigError, match="no scheduler answers there"):
            run_cohort(
                [Job(slide_id="a")],
                planted.behave,
                stage="p",
                status_dir=tmp_path,
                options=options,
                report=SilentReporter(),
            )
    assert not list(tmp_path.rglob("*.claim"))


def test_without_the_package_the_install_line_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'bagscope\[cluster\]'"):
        run_cohort(
            [Job(slide_id="a")],
            planted.behave,
            stage="p",
            status_dir=tmp_path,
            options=RunOptions(executor="tcp://127.0.0.1:9"),
            report=SilentReporter(),
        )
