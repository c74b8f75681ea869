"""A stage that talks as its job tells it to; workers import it by name."""

from __future__ import annotations

import os
import time

from bagscope.cohort.executors import worker
from bagscope.cohort.jobs import Job, StageResult


def talk(job: Job) -> StageResult:
    """Do what the job's payload says."""
    action, *arguments = job.payload
    facts = {}
    if action == "tell":
        for index in range(arguments[0]):
            worker.tell(b"%d" % index)
    if action == "echo":
        facts["answer"] = worker.ask(arguments[0]).hex()
    if action == "tell-slowly":
        for _ in range(arguments[0]):
            worker.tell(b"still here")
            time.sleep(arguments[1])
    if action == "tell-and-hang":
        worker.tell(b"last words")
        time.sleep(600)
    if action == "tell-and-die":
        for index in range(arguments[0]):
            worker.tell(b"%d" % index)
        os.abort()
    if action == "ask-and-hang":
        worker.ask(b"question")
        time.sleep(600)
    if action == "ask-with-pid":
        worker.ask(b"%d" % os.getpid())
    if action == "swell-and-ask":
        held = [bytearray(os.urandom(1024) * 1024) for _ in range(arguments[0])]
        worker.ask(b"?")
        del held
    return StageResult(outcome="done", fingerprint="f", facts=facts)
