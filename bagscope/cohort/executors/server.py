"""The server that workers are forked from: started once, as early as possible, and light to import.

It has imported what every worker needs, holds no thread and no open slide, so that a worker starts
in milliseconds. While it imports, the command line does its own part on another core.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

WORKER_PROCESS = "bagscope.cohort.executors.worker"


def start(preload: Sequence[str]) -> BaseContext:
    """Return the context for workers: the fork server where there is one, else spawn.

    A server that runs already keeps the modules that it was started with. Never plain fork: it
    would carry threads and open handles over.

    Args:
        preload: modules to import before the first worker.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WORKER_PROCESS, *preload])
    # Signals to the process group must not end the fork server, and with it the workers, before
    # this process has heard of them. What is blocked here stays so until a worker is ready.
    resource_tracker.ensure_running()  # would unblock them again when it starts
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context
