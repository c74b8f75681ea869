"""Stages that behave as their job tells them to; workers import them by name."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from bagscope import artifacts
from bagscope.cohort.runner import Job, StageResult
from bagscope.errors import SpacingError


def behave(job: Job, folder: Path | None = None) -> StageResult:
    """Do what the job's payload says."""
    action, *arguments = job.payload if isinstance(job.payload, tuple) else (job.payload,)
    facts: dict[str, object] = {"tiles": 10, "pid": os.getpid()}
    if action == "raise":
        raise SpacingError(f"{job.slide_id}: no pixel size; pass --mpp")
    if action == "surprise":
        raise ZeroDivisionError("division by zero")
    if action == "hang":
        time.sleep(3600)
    if action == "sleep":
        time.sleep(arguments[0])
    if action == "abort":
        os.abort()
    if action == "segfault":
        ctypes.string_at(0)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "exit":
        sys.exit(3)
    if action == "hard-exit":
        os._exit(0)
    if action == "swell":
        swell(arguments[0])
    if action == "swell-child":
        code = f"import time; x = bytearray({arguments[0]} << 20); time.sleep(60)"
        subprocess.run([sys.executable, "-c", code], check=True)
    if action == "memory-error":
        raise MemoryError
    if action == "not-json":
        facts["lock"] = object()
    if action == "not-a-result":
        return 7  # type: ignore[return-value]
    if action == "die-once":
        marker = Path(arguments[0])
        if not marker.exists():
            marker.touch()
            os.abort()
    if action == "write-forever":
        with artifacts.atomic_file(Path(arguments[0]) / f"{job.slide_id}.bin") as temporary:
            temporary.write_bytes(b"half")
            time.sleep(3600)
    if action == "spin":
        end = time.process_time() + arguments[0]
        while time.process_time() < end:
            pass
    warnings = ("pale",) if action == "warn" else ()
    if folder is None:
        return StageResult(outcome="done", fingerprint="f", facts=facts, warnings=warnings)
    return make_file(job, folder)


def make_file(job: Job, folder: Path) -> StageResult:
    """Write a file artefact, unless it is there."""
    path = folder / f"{job.slide_id}.bin"
    fields = {"slide_id": job.slide_id}
    if path.exists():
        return StageResult(outcome="skipped", fingerprint=artifacts.fingerprint(fields))
    content = job.slide_id.encode() * 5000
    artifacts.write_bytes(path, content)
    with (folder / "made.log").open("a") as log:
        log.write(f"{job.slide_id}\n")
    return StageResult(
        outcome="done",
        fingerprint=artifacts.fingerprint(fields),
        content_hash=artifacts.sha256_of_file(path),
        facts={"tiles": 10},
    )


def swell(mib: int) -> None:
    """Take memory in steps, and hold it."""
    held = []
    for _ in range(mib // 8):
        held.append(bytearray(os.urandom(1024) * 8192))
        time.sleep(0.005)
    time.sleep(30)


def make_file_slowly(job: Job, folder: Path) -> StageResult:
    """Write a file artefact, so slowly that other processes get their share."""
    result = make_file(job, folder)
    if result.outcome == "done":
        time.sleep(0.05)
    return result


def tell_memory(job: Job) -> StageResult:
    """State the worker's own resident memory."""
    import psutil

    rss_mib = psutil.Process().memory_info().rss / 2**20
    return StageResult(outcome="done", fingerprint="f", facts={"rss_mib": rss_mib})


def write_limited(job: Job, folder: Path) -> StageResult:
    """Write as many bytes as the payload says, where no file may pass 20,000."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        artifacts.write_bytes(folder / f"{job.slide_id}.bin", b"x" * job.payload)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return StageResult(outcome="done", fingerprint="f")
