"""Work on a Dask cluster: claims, status and results stay with the process that runs the cohort.

A task on the cluster does not do the work in the Dask worker itself: it hands the slide to an
isolated process beside it, the same as on one machine. So a slide that hangs, crashes or swells
fails alone there too, and takes no Dask worker with it. A Dask worker that goes away loses
nothing: the scheduler gives its slides to another one.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import multiprocessing.util
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from typing import Any

from bagscope.cohort.executors.local import LocalExecutor
from bagscope.cohort.executors.protocol import Finished, failed
from bagscope.cohort.jobs import Job, RunOptions
from bagscope.errors import ConfigError, WorkerDied

_CONNECT_S = 10.0
_SIZE_REFRESH_S = 1.0
_DISMISS_S = 1.2


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteStage:
    """What a Dask worker needs to know of a run besides the job.

    Attributes:
        token: names the run.
        pickled_work: the stage's function.
        module: that defines it.
        timeout_s: as in `RunOptions`.
        memory_limit_mib: as in `RunOptions`.
        preload: as in `RunOptions`.
    """

    token: str
    pickled_work: bytes
    module: str
    timeout_s: float | None
    memory_limit_mib: float | None
    preload: tuple[str, ...]


class DaskExecutor:
    """Carries out jobs on the cluster behind a scheduler's address."""

    def __init__(
        self, pickled_work: bytes, *, module: str, address: str, options: RunOptions
    ) -> None:
        self._client = _connect(address)
        self._address = address
        self._limit = options.workers
        self._stage = RemoteStage(
            token=secrets.token_hex(8),
            pickled_work=pickled_work,
            module=module,
            timeout_s=options.timeout_s,
            memory_limit_mib=options.memory_limit_mib,
            preload=options.preload,
        )
        self._in_hand: dict[str, tuple[Job, Any]] = {}
        # Unlike Queue, this one may be put to from a signal handler and from the client's thread.
        self._ended: SimpleQueue[str] = SimpleQueue()
        self._size = 0
        self._size_read_at_s = -float("inf")

    def size(self) -> int:
        """Return how many jobs the cluster can run at a time."""
        if time.monotonic() - self._size_read_at_s > _SIZE_REFRESH_S:
            with contextlib.suppress(OSError):
                self._size = sum(self._client.nthreads().values())
            self._size_read_at_s = time.monotonic()
        return self._size if self._limit is None else min(self._size, self._limit)

    def slots(self) -> int:
        """Return how many more jobs can be started now."""
        return self.size() - len(self._in_hand)

    def start(self, job: Job) -> None:
        """Submit a job."""
        future = self._client.submit(
            run_isolated,
            self._stage,
            job,
            key=f"bagscope-{self._stage.token}-{job.slide_id}-{secrets.token_hex(4)}",
            pure=False,
        )
        self._in_hand[job.slide_id] = (job, future)
        future.add_done_callback(lambda _: self._ended.put(job.slide_id))

    def wait(self, timeout_s: float) -> list[Finished]:
        """Return jobs that ended, at the latest after `timeout_s`; empty when woken."""
        ended: list[Finished] = []
        try:
            names = [self._ended.get(timeout=timeout_s)]
            while not self._ended.empty():
                names.append(self._ended.get_nowait())
        except Empty:
            names = []
        for slide_id in names:
            if slide_id in self._in_hand:
                job, future = self._in_hand.pop(slide_id)
                ended.append(self._result(job, future))
        if not ended and self._client.status not in ("running", "connecting"):
            raise self._gone()
        return ended

    def wake(self) -> None:
        """Make a running `wait` return at once."""
        self._ended.put("")

    def close(self) -> None:
        """Cancel what still runs, and let the cluster's isolated processes go."""

        def dismiss() -> None:
            with contextlib.suppress(Exception):  # a cluster that is gone needs no farewell
                self._client.cancel([future for _, future in self._in_hand.values()], force=True)
                self._client.run(dismiss_isolated, self._stage.token, on_error="ignore")

        # A cluster that does not answer must not keep Ctrl-C waiting.
        farewell = threading.Thread(target=dismiss, name="bagscope-dismiss", daemon=True)
        farewell.start()
        farewell.join(_DISMISS_S)
        self._in_hand.clear()
        self._client.close(timeout=_DISMISS_S)

    def _result(self, job: Job, future: Any) -> Finished:
        if future.status == "finished":
            return Finished(**future.result())
        if future.status in ("cancelled", "lost"):
            if self._client.status != "running":
                raise self._gone()
            return Finished(slide_id=job.slide_id, record={}, seconds=0.0, host="", requeue=True)
        error = future.exception()
        if type(error).__name__ == "KilledWorker":
            message = f"{job.slide_id}: each Dask worker that took it went away; see their logs"
            record = failed(WorkerDied.__name__, message)
        else:
            message = f"{job.slide_id}: the Dask worker could not take it ({error})"
            record = failed(type(error).__name__, message)
        return Finished(slide_id=job.slide_id, record=record, seconds=0.0, host="")

    def _gone(self) -> WorkerDied:
        return WorkerDied(
            f"{self._address}: the Dask scheduler went away in the middle of the run; start it, "
            "and give the same command again to go on"
        )


def _connect(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError(
            "--dask needs the packages dask and distributed; pip install 'bagscope[cluster]'"
        ) from error
    try:
        return Client(  # type: ignore[no-untyped-call]
            address, timeout=_CONNECT_S, set_as_default=False
        )
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--dask {address!r}: no scheduler answers there ({error}); give its address, for "
            "instance tcp://head-node:8786"
        ) from error


# --- on the cluster -------------------------------------------------------------------------

_lock = threading.Lock()
_idle: dict[str, list[LocalExecutor]] = {}
_busy: dict[str, list[LocalExecutor]] = {}


def run_isolated(stage: RemoteStage, job: Job) -> dict[str, Any]:
    """Run a job in an isolated process beside this Dask worker; return a `Finished` as a dict."""
    executor = _take(stage)
    while True:
        executor.start(job)
        ended: list[Finished] = []
        while not ended:
            ended = executor.wait(60.0)
        if not ended[0].requeue:
            break
    with _lock:
        if executor in _busy.get(stage.token, ()):
            _busy[stage.token].remove(executor)
            _idle.setdefault(stage.token, []).append(executor)
    return asdict(ended[0])


def dismiss_isolated(token: str) -> None:
    """End the isolated processes of a run on this Dask worker."""
    with _lock:
        idle, busy = _idle.pop(token, []), _busy.pop(token, [])
    for executor in idle:
        executor.close()
    for executor in busy:
        executor.kill_workers()


def _take(stage: RemoteStage) -> LocalExecutor:
    with _lock:
        kept = _idle.get(stage.token)
        if kept:
            executor = kept.pop()
        else:
            executor = LocalExecutor(
                stage.pickled_work,
                module=stage.module,
                workers=1,
                timeout_s=stage.timeout_s,
                memory_limit_mib=stage.memory_limit_mib,
                preload=stage.preload,
                allow_start=_allowed_children,
            )
        _busy.setdefault(stage.token, []).append(executor)
    return executor


@contextlib.contextmanager
def _allowed_children() -> Iterator[None]:
    """Let a daemonic process start processes.

    Dask's nanny makes its worker daemonic, so that it ends with the nanny. Ours end by themselves
    when the Dask worker does, so what the prohibition guards against can't happen.
    """
    config: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    daemon = config.pop("daemon", None)
    try:
        yield
    finally:
        if daemon is not None:
            config["daemon"] = daemon


def _dismiss_all() -> None:
    for token in {*_idle, *_busy}:
        dismiss_isolated(token)


# multiprocessing waits for every child at exit; this runs before, or a worker would never end.
multiprocessing.util.Finalize(None, _dismiss_all, exitpriority=10)
