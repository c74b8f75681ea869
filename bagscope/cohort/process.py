"""Who a process is, so that another one can tell whether it still lives.

A process id alone is not an identity: it is used again after a while, means nothing on another
host, and another thing in another container of the same host. So its start time, the boot and the
process-id namespace belong to it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bagscope import artifacts

_START_TOLERANCE_S = 2.0
_HAS_PROC = sys.platform == "linux"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessIdentity:
    """A process, told apart from all others.

    Attributes:
        host: host name.
        boot: id of the host's boot, empty where the system has none.
        namespace: process-id namespace (containers), empty where the system has none.
        pid: process id in that namespace.
        started: start time, in clock ticks since boot on Linux, in epoch seconds elsewhere.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> ProcessIdentity | None:
        """Return the identity that JSON fields hold, or None where they hold none."""
        try:
            return cls(
                host=str(fields["host"]),
                boot=str(fields["boot"]),
                namespace=str(fields["namespace"]),
                pid=int(fields["pid"]),
                started=float(fields["started"]),
            )
        except (TypeError, KeyError, ValueError):
            return None


def this_process() -> ProcessIdentity:
    """Return the identity of the running process."""
    pid = os.getpid()
    started = _start_time(pid)
    return ProcessIdentity(
        host=artifacts.host_name(),
        boot=_boot_id(),
        namespace=_namespace(),
        pid=pid,
        started=0.0 if started is None else started,
    )


def is_visible(process: ProcessIdentity) -> bool:
    """Return whether the process belongs to this boot of this host, where its id can be looked up.

    A host that restarted, or a namesake of this one, is not visible: only a heartbeat tells then.
    """
    return (process.host, process.boot, process.namespace) == (
        artifacts.host_name(),
        _boot_id(),
        _namespace(),
    )


def is_running(process: ProcessIdentity) -> bool:
    """Return whether a visible process still runs; one that waits to be reaped does not."""
    started = _start_time(process.pid)
    return started is not None and abs(started - process.started) <= _START_TOLERANCE_S


def _start_time(pid: int) -> float | None:
    if _HAS_PROC:
        try:
            line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        # The program's name stands in parentheses and may itself hold spaces and parentheses.
        fields = line[line.rindex(")") + 2 :].split()
        return None if fields[0] in "ZX" else float(fields[19])
    import psutil

    try:
        found = psutil.Process(pid)
        return None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    except psutil.Error:
        return None


@lru_cache(maxsize=1)
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@lru_cache(maxsize=1)
def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
