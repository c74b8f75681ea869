"""The worker process: takes a job, does the work, sends a record back, until told to stop.

Records travel as JSON, so that the process that runs the cohort unpickles nothing and imports
nothing that a stage needs.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from multiprocessing import connection, parent_process
from types import FrameType
from typing import TYPE_CHECKING

from bagscope import artifacts
from bagscope.cohort.executors.protocol import Record, Work, failed
from bagscope.cohort.jobs import Job, StageResult
from bagscope.errors import BagscopeError, WorkerDied, WorkerOutOfMemory, in_one_line

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

TAKEN = b"taken"
STOP = b"stop"
TOLD = b"!"
ASKED = b"?"
_PR_SET_PDEATHSIG = 1
_MAX_FRAMES = 30
_LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM)


_channel: Connection | None = None


def tell(message: bytes) -> None:
    """Send the process that runs the cohort word of the job in hand; it counts as progress."""
    assert _channel is not None, "only a worker's job has somebody to tell"
    _channel.send_bytes(TOLD + message)


def ask(message: bytes) -> bytes:
    """Ask the process that runs the cohort, and wait for its answer; the wait is not timed."""
    assert _channel is not None, "only a worker's job has somebody to ask"
    _channel.send_bytes(ASKED + message)
    return _channel.recv_bytes()


def serve(channel: Connection, pickled_work: bytes) -> None:
    """Work on jobs from `channel` until `STOP` or its end: the body of a worker process."""
    global _channel
    _channel = channel
    die_with_parent()
    _leave_signals_to_parent()
    while True:
        try:
            message = channel.recv_bytes()
        except EOFError:
            return
        if message == STOP:
            return
        channel.send_bytes(TAKEN)
        channel.send_bytes(artifacts.canonical_json(run_pickled(pickled_work, message)))


def run_pickled(pickled_work: bytes, pickled_job: bytes) -> Record:
    """Unpickle work and job, do the one on the other, and add how many seconds it took."""
    started_s = time.monotonic()
    record = _run_pickled(pickled_work, pickled_job)
    return {**record, "seconds": time.monotonic() - started_s}


def _run_pickled(pickled_work: bytes, pickled_job: bytes) -> Record:
    try:
        work: Work = pickle.loads(pickled_work)
        job: Job = pickle.loads(pickled_job)
    except Exception as error:
        return failed(
            type(error).__name__,
            f"the worker could not load the stage or its job ({in_one_line(error)}); stages and "
            "what they are given must live in importable modules",
            _formatted(error),
        )
    return run_job(work, job)


def run_job(work: Work, job: Job) -> Record:
    """Do the work on one job; whatever it raises becomes a record that says so."""
    try:
        result = work(job)
    except MemoryError as error:
        return failed(
            WorkerOutOfMemory.__name__,
            f"{job.slide_id}: memory ran out ({in_one_line(error)}); use fewer workers",
            _formatted(error),
        )
    except BagscopeError as error:
        return failed(type(error).__name__, in_one_line(error))
    except Exception as error:
        return failed(type(error).__name__, in_one_line(error), _formatted(error))
    except (SystemExit, KeyboardInterrupt) as error:
        return failed(
            WorkerDied.__name__,
            f"{job.slide_id}: the stage tried to end its process ({type(error).__name__} "
            f"{error}); this is a fault of the stage",
            _formatted(error),
        )
    return _checked(job, result)


def _checked(job: Job, result: object) -> Record:
    if not isinstance(result, StageResult):
        return failed(
            "TypeError",
            f"{job.slide_id}: the stage returned {type(result).__name__}, not a StageResult",
        )
    record = asdict(result)
    for name, value in [*record["facts"].items(), ("warnings", record["warnings"])]:
        try:
            artifacts.canonical_json(value)
        except (TypeError, ValueError) as error:
            return failed(
                type(error).__name__,
                f"{job.slide_id}: the stage's result can't be stored, {name} is not JSON ({error})",
            )
    return record


def _formatted(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-_MAX_FRAMES))


def _leave_signals_to_parent() -> None:
    """Take no notice of Ctrl-C and SIGTERM, which reach the whole process group.

    Processes that a stage starts (data loaders, tools) do take notice: a handler, unlike SIG_IGN,
    is not inherited by a program, and is taken off again in a fork.
    """

    def unmoved(number: int, frame: FrameType | None) -> None:
        return None

    def default() -> None:
        for number in _LEFT_TO_PARENT:
            signal.signal(number, signal.SIG_DFL)

    for number in _LEFT_TO_PARENT:
        signal.signal(number, unmoved)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=default)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT_TO_PARENT)


def die_with_parent() -> None:
    """End this process as soon as the one that started it is gone, so that nothing writes on.

    The thread sees the parent's end at once, but needs the interpreter lock, which a native
    library may hold; the kernel's signal needs nothing, but waits for the fork server to end.
    """
    parent = parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="bagscope-parent", daemon=True).start()
