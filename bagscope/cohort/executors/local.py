"""Worker processes on this machine: one slide in each, so that a crash costs that slide alone.

Every worker has a channel of its own. A worker that ends without an answer is therefore blamed for
exactly the job that it had taken, and no lock or queue is shared that its death could leave locked.
That, and the memory ceiling, which needs to know the worker of a job, is why the pool is our own.

Workers come from a fork server, a process that has imported the stage's modules and nothing else
(no threads, no open slides), so a new worker is there within milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import psutil

from bagscope import artifacts
from bagscope.cohort.executors import server
from bagscope.cohort.executors import worker as worker_process
from bagscope.cohort.executors.protocol import Finished, Record, failed
from bagscope.cohort.jobs import Job
from bagscope.errors import WorkerDied, WorkerOutOfMemory, WorkerTimeout

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_MIB = 1 << 20
_MEMORY_POLL_S = 0.05
_CHILDREN_POLL_S = 0.5
_STOP_PATIENCE_S = 0.5
_KILL_PATIENCE_S = 5.0
_RETIRE_ABOVE = 0.5
"""A worker that holds this part of its ceiling between two slides is replaced by a fresh one."""

# Not every verb has the options; the study's file holds for all of them.
_TIMEOUT_OPTION = "--timeout-minutes (run.timeout_minutes in study.yaml)"
_MEMORY_OPTION = "--memory-limit-gib (run.memory_limit_gib in study.yaml)"

_start_lock = threading.Lock()
"""Starting a worker changes the process for a moment (see `_hidden_main`)."""


class _Worker:
    """One worker process and the job that it has in hand."""

    def __init__(self, context: BaseContext, pickled_work: bytes, *, import_main: bool) -> None:
        self.channel, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=worker_process.serve, args=(theirs, pickled_work), daemon=False
        )
        with contextlib.nullcontext() if import_main else _hidden_main():
            self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.sent_s = 0.0
        self.taken_s: float | None = None
        self.is_waiting = False
        self.children: list[psutil.Process] = []
        self.children_seen_s = 0.0

    def give(self, job: Job, pickled_job: bytes) -> None:
        self.job, self.sent_s, self.taken_s = job, time.monotonic(), None
        self.is_waiting = False
        # A worker that is gone by now shows as such in the next wait.
        with contextlib.suppress(OSError):
            self.channel.send_bytes(pickled_job)

    def resident_mib(self, *, look_for_children: bool = False) -> float:
        """Return the resident memory of the worker and its children in MiB; 0 when gone."""
        try:
            process = psutil.Process(self.process.pid)
            # Finding children means reading the whole process table, hence seldom.
            if look_for_children and time.monotonic() - self.children_seen_s > _CHILDREN_POLL_S:
                self.children = process.children(recursive=True)
                self.children_seen_s = time.monotonic()
            total = process.memory_info().rss
        except psutil.Error:
            return 0.0
        for child in self.children:
            with contextlib.suppress(psutil.Error):
                total += child.memory_info().rss
        return float(total / _MIB)

    def kill(self) -> None:
        """Kill the worker and what it started, and wait until it is gone."""
        try:
            started = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            started = []
        self.process.kill()
        for child in started:
            with contextlib.suppress(psutil.Error):
                child.kill()
        self.process.join(_KILL_PATIENCE_S)
        self.channel.close()

    def stop(self) -> None:
        """Ask an idle worker to end; `kill` follows where it does not."""
        with contextlib.suppress(OSError):
            self.channel.send_bytes(worker_process.STOP)


class LocalExecutor:
    """A pool of isolated worker processes (see the module's text).

    A job may talk while it runs (`worker.tell`, `worker.ask`): `on_message` is called in `wait`
    with the slide's id and the message, and `reply` answers a question. `timeout_s` then is the
    longest that a job may be silent while it does not wait for an answer.
    """

    def __init__(
        self,
        pickled_work: bytes,
        *,
        module: str,
        workers: int,
        timeout_s: float | None = None,
        memory_limit_mib: float | None = None,
        preload: Sequence[str] = (),
        allow_start: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        on_message: Callable[[str, bytes], None] | None = None,
    ) -> None:
        self._pickled_work = pickled_work
        self._workers = workers
        self._timeout_s = timeout_s
        self._memory_limit_mib = memory_limit_mib
        self._import_main = module == "__main__"
        self._allow_start = allow_start
        self._on_message = on_message
        self._context = server.start([name for name in (module, *preload) if name != "__main__"])
        self._busy: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._early: list[Finished] = []
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)

    def slots(self) -> int:
        """Return how many more jobs can be started now."""
        return self._workers - len(self._busy)

    def size(self) -> int:
        """Return how many jobs can run at a time."""
        return self._workers

    def start(self, job: Job) -> None:
        """Give a job to an idle worker, or to a new one."""
        try:
            pickled_job = pickle.dumps(job)
        except Exception as error:
            message = f"{job.slide_id}: its job can't be sent to a worker ({error})"
            self._early.append(_finished(job, failed(type(error).__name__, message), 0.0))
            return
        while self._idle:
            candidate = self._idle.pop()
            if candidate.process.is_alive():
                break
            candidate.kill()
        else:
            candidate = self._new_worker()
        candidate.give(job, pickled_job)
        self._busy.append(candidate)

    def wait(self, timeout_s: float) -> list[Finished]:
        """Return jobs that ended, at the latest after `timeout_s`; empty when woken."""
        if self._early:
            early, self._early = self._early, []
            return early
        deadline_s = time.monotonic() + timeout_s
        while True:
            ready = connection.wait(self._sources(), max(0.0, self._patience_s(deadline_s)))
            woken = self._wake_out in ready
            if woken:
                os.read(self._wake_out, 4096)
            ended = [finished for w in list(self._busy) if (finished := self._look_at(w))]
            if ended or woken or time.monotonic() >= deadline_s:
                return ended

    def reply(self, slide_id: str, answer: bytes) -> None:
        """Answer the question of a job; one that has ended meanwhile does not mind."""
        for candidate in self._busy:
            if candidate.job is not None and candidate.job.slide_id == slide_id:
                candidate.is_waiting, candidate.taken_s = False, time.monotonic()
                with contextlib.suppress(OSError):
                    candidate.channel.send_bytes(answer)

    def wake(self) -> None:
        """Make a running `wait` return at once."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_in, b"\0")

    def close(self) -> None:
        """Stop idle workers, kill busy ones, and come back when all are gone."""
        for candidate in self._idle:
            candidate.stop()
        for candidate in self._busy:
            candidate.kill()
        deadline_s = time.monotonic() + _STOP_PATIENCE_S
        for candidate in self._idle:
            candidate.process.join(max(0.0, deadline_s - time.monotonic()))
            candidate.kill()
        self._idle.clear()
        self._busy.clear()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def kill_workers(self) -> None:
        """Kill the workers without waiting; may be called from another thread than `wait`."""
        for candidate in list(self._busy):
            candidate.process.kill()

    def _new_worker(self) -> _Worker:
        with _start_lock, self._allow_start():
            return _Worker(self._context, self._pickled_work, import_main=self._import_main)

    # --- one look at the workers ------------------------------------------------------------

    def _sources(self) -> list[Connection | int]:
        channels = [w.channel for w in self._busy]
        sentinels = [w.process.sentinel for w in self._busy]
        return [self._wake_out, *channels, *sentinels]

    def _patience_s(self, deadline_s: float) -> float:
        if self._memory_limit_mib is not None and self._busy:
            deadline_s = min(deadline_s, time.monotonic() + _MEMORY_POLL_S)
        if self._timeout_s is not None:
            limits = [
                w.taken_s + self._timeout_s
                for w in self._busy
                if w.taken_s is not None and not w.is_waiting
            ]
            deadline_s = min([deadline_s, *limits])
        return deadline_s - time.monotonic()

    def _look_at(self, candidate: _Worker) -> Finished | None:
        """Return how the worker's job ended, or None while it goes on."""
        assert candidate.job is not None
        alive = candidate.process.is_alive()
        record = self._answer(candidate)
        if record is not None:
            self._busy.remove(candidate)
            finished = _finished(candidate.job, record, record["seconds"])
            self._retire_or_keep(candidate)
            return finished
        if not alive:
            return self._bury(candidate)
        return self._over_limit(candidate)

    def _answer(self, candidate: _Worker) -> Record | None:
        try:
            while candidate.channel.poll():
                message = candidate.channel.recv_bytes()
                kind = message[:1]
                if kind == worker_process.TOLD or kind == worker_process.ASKED:
                    candidate.is_waiting = kind == worker_process.ASKED
                    candidate.taken_s = time.monotonic()
                    self._hear(candidate, message[1:])
                elif message == worker_process.TAKEN:
                    candidate.taken_s = time.monotonic()
                else:
                    record: Record = json.loads(message)
                    return record
        except (EOFError, OSError):
            # Its end of the channel is closed: the process is ending, if it has not ended yet.
            candidate.process.join(_KILL_PATIENCE_S)
        return None

    def _hear(self, candidate: _Worker, message: bytes) -> None:
        assert candidate.job is not None
        assert self._on_message is not None, "the stage talks, and nobody listens"
        self._on_message(candidate.job.slide_id, message)

    def _retire_or_keep(self, candidate: _Worker) -> None:
        candidate.job = None
        limit_mib = self._memory_limit_mib
        if limit_mib is not None and candidate.resident_mib() > _RETIRE_ABOVE * limit_mib:
            candidate.kill()
        else:
            self._idle.append(candidate)

    def _bury(self, candidate: _Worker) -> Finished:
        """Return what the death of a worker means for its job."""
        assert candidate.job is not None
        self._busy.remove(candidate)
        exit_code = candidate.process.exitcode
        candidate.kill()
        seconds = time.monotonic() - _begin_s(candidate)
        if candidate.taken_s is None:
            return _finished(candidate.job, {}, seconds, requeue=True)
        message = f"{candidate.job.slide_id}: {_how_it_died(exit_code)}"
        return _finished(candidate.job, failed(WorkerDied.__name__, message), seconds)

    def _over_limit(self, candidate: _Worker) -> Finished | None:
        """Kill a worker that took too long or too much; return its job's end, else None."""
        job, now_s = candidate.job, time.monotonic()
        assert job is not None
        if candidate.taken_s is None:
            return None
        seconds = now_s - candidate.taken_s
        limit_s = None if candidate.is_waiting else self._timeout_s
        if limit_s is not None and seconds >= limit_s:
            record = failed(
                WorkerTimeout.__name__,
                f"{job.slide_id}: took longer than the {limit_s:g} s allowed; raise "
                f"{_TIMEOUT_OPTION}, or look at what it reads",
            )
        elif (limit_mib := self._memory_limit_mib) is not None and (
            held_mib := candidate.resident_mib(look_for_children=True)
        ) > limit_mib:
            record = failed(
                WorkerOutOfMemory.__name__,
                f"{job.slide_id}: its worker held {held_mib:.0f} MiB, more than the "
                f"{limit_mib:.0f} MiB allowed; raise {_MEMORY_OPTION}, or use fewer workers",
            )
        else:
            return None
        self._busy.remove(candidate)
        candidate.kill()
        return _finished(job, record, seconds)


def _finished(job: Job, record: Record, seconds: float, *, requeue: bool = False) -> Finished:
    return Finished(
        slide_id=job.slide_id,
        record=record,
        seconds=seconds,
        host=artifacts.host_name(),
        requeue=requeue,
    )


def _begin_s(candidate: _Worker) -> float:
    return candidate.sent_s if candidate.taken_s is None else candidate.taken_s


def _how_it_died(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"its worker ended with exit code {exit_code} before it had an answer"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    if name == "SIGKILL":
        return (
            "its worker was killed (SIGKILL), most likely by the system for want of memory; use "
            f"fewer workers, or lower {_MEMORY_OPTION}"
        )
    return f"its worker crashed ({name}) in a native library; the file may be damaged"


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep a starting worker from running the parent's main script again.

    multiprocessing does so for the sake of functions defined there. Ours are in modules, and the
    script is the whole command line, whose imports would cost each worker more than its start.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
