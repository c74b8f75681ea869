"""The console script: starts the worker server first, so that it imports while we parse."""

from __future__ import annotations

import sys

from bagscope.pipeline.preload import VERBS, WORKER_MODULES


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    if words and words[0] in VERBS and not {"-h", "--help", "--dry-run", "--dask"} & set(words):
        from bagscope.cohort.executors import server

        server.start(WORKER_MODULES)
    from bagscope.cli.app import main as run

    run()
