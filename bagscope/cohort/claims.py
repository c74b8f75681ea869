"""Exclusive claims, by which any number of processes on any number of machines share one study.

A claim is a small file that says who holds it. It is written under a temporary name and hard-linked
into place, so that it appears whole, and to one process only. A thread renews its modification time
while it is held.

A claim is abandoned when its holder is a process of this host that no longer runs, or, on any other
host, when it has not been renewed for `stale_s` seconds by the clock of the file system itself
(clocks of different machines are never compared).

Taking over, with P and Q both looking at the same abandoned claim: each claim carries a random
token T, and whoever wants to replace or remove claim T must first make the claim `.T.claim`
("the right to touch T"), of which there is one. With it in hand the claim is read again. If it is
still T, it is renamed over; if not, somebody was quicker. A slow Q that comes back late either
fails to make `.T.claim` or finds that the claim is no longer T: it can't remove P's new claim.
Should P die between those two steps, `.T.claim` is an abandoned claim and taken over likewise.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from bagscope import artifacts
from bagscope.cohort.process import ProcessIdentity, is_running, is_visible, this_process
from bagscope.errors import ArtifactError

CLAIM_SUFFIX = ".claim"
DEFAULT_STALE_S = 300.0
"""Well above the minute for which an NFS client may show an old modification time."""

_BEATS_PER_STALE_PERIOD = 10
_MAX_DEPTH = 16
_TOKEN_BYTES = 8
_CLOCK_REFRESH_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Claim:
    """One held claim."""

    path: Path
    token: str
    renewed_s: float = field(default_factory=time.monotonic)
    lost: bool = False


class ClaimBook:
    """The claims that this process holds in one folder, and the thread that renews them."""

    def __init__(self, folder: Path, *, stage: str, stale_s: float = DEFAULT_STALE_S) -> None:
        self.folder = folder
        self.stage = stage
        self.stale_s = stale_s
        self._held: dict[str, Claim] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._clock_offset_s = 0.0
        self._clock_read_at_s = -float("inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release_all()

    def acquire(self, name: str) -> bool:
        """Try to claim `name`; return whether it is ours now.

        Raises:
            ArtifactError: the folder can't be written.
        """
        with self._lock:
            if name in self._held:
                return False
        path = self.folder / f"{name}{CLAIM_SUFFIX}"
        with _as_artifact_error(path):
            token = self._lock_file(path, depth=0)
        if token is None:
            return False
        with self._lock:
            self._held[name] = Claim(path=path, token=token)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._beat, name="bagscope-claims", daemon=True
                )
                self._thread.start()
        artifacts.step("claimed")
        return True

    def release(self, name: str) -> None:
        """Give a claim back; one that somebody else took over meanwhile is left alone."""
        with self._lock:
            claim = self._held.pop(name, None)
        if claim is not None:
            with _as_artifact_error(claim.path):
                self._unlock_file(claim)

    def release_all(self) -> None:
        """Give every claim back and stop renewing; a folder that went away is no error here."""
        self._stop.set()
        for name in self.held():
            with contextlib.suppress(ArtifactError):
                self.release(name)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._stop.clear()

    def held(self) -> list[str]:
        """Return the names that this process holds."""
        with self._lock:
            return list(self._held)

    def sweep(self) -> None:
        """Remove rights to touch claims that are gone, left by processes that were killed.

        A token never comes back, so the right to touch a claim that is no longer there, or is
        another one by now, is of no use to anybody, dead or alive.
        """
        for right in sorted(self.folder.glob(f".*{CLAIM_SUFFIX}")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                name = str(json.loads(right.read_bytes())["touches"])
                if _right_to(self.folder / name, _token_of(self.folder / name)) != right:
                    right.unlink(missing_ok=True)

    # --- one file ---------------------------------------------------------------------------

    def _lock_file(self, path: Path, depth: int, touches: str = "") -> str | None:
        """Make the claim `path`, or take over an abandoned one; return its token, else None."""
        token = secrets.token_hex(_TOKEN_BYTES)
        with self._written_claim(token, touches) as mine:
            if _link_exclusively(mine, path):
                return token
            found = _read_claim(path)
            if found is None:  # released between the two calls
                return token if _link_exclusively(mine, path) else None
            if depth >= _MAX_DEPTH or not self._is_abandoned(path, found[1]):
                return None
            artifacts.step("abandoned")
            right = _right_to(path, found[0])
            right_token = self._lock_file(right, depth + 1, path.name)
            if right_token is None:
                return None
            try:
                now = _read_claim(path)
                if now is None:
                    return token if _link_exclusively(mine, path) else None
                if now[0] != found[0]:
                    return None
                artifacts.step("takeover")
                mine.replace(path)
                _log.warning("took over the abandoned claim %s", path.name)
                return token
            finally:
                if _token_of(right) == right_token:
                    right.unlink(missing_ok=True)

    def _unlock_file(self, claim: Claim) -> None:
        if time.monotonic() - claim.renewed_s < self.stale_s / 2 and not claim.lost:
            # Renewed so lately that nobody can have found it abandoned.
            claim.path.unlink(missing_ok=True)
            return
        right = _right_to(claim.path, claim.token)
        right_token = self._lock_file(right, 1, claim.path.name)
        if right_token is None:
            return
        try:
            if _token_of(claim.path) == claim.token:
                claim.path.unlink(missing_ok=True)
        finally:
            if _token_of(right) == right_token:
                right.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _written_claim(self, token: str, touches: str) -> Iterator[Path]:
        temporary = artifacts.temporary_path(self.folder / "claim")
        record = {**this_process().as_json(), "stage": self.stage, "token": token}
        if touches:
            record["touches"] = touches
        try:
            temporary.write_bytes(artifacts.canonical_json(record))
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _is_abandoned(self, path: Path, holder: ProcessIdentity | None) -> bool:
        if holder is not None and is_visible(holder):
            return not is_running(holder)
        try:
            renewed_s = path.stat().st_mtime
        except FileNotFoundError:
            return False
        return self._folder_time_s() - renewed_s > self.stale_s

    def _folder_time_s(self) -> float:
        """Return the time by the clock of the machine that stores the folder."""
        now_s = time.monotonic()
        if now_s - self._clock_read_at_s > _CLOCK_REFRESH_S:
            probe = artifacts.temporary_path(self.folder / "clock")
            try:
                probe.write_bytes(b"")
                self._clock_offset_s = probe.stat().st_mtime - now_s
            finally:
                probe.unlink(missing_ok=True)
            self._clock_read_at_s = now_s
        return time.monotonic() + self._clock_offset_s

    # --- heartbeat --------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._stop.wait(self.stale_s / _BEATS_PER_STALE_PERIOD):
            with self._lock:
                claims = list(self._held.values())
            for claim in claims:
                self._renew(claim)

    def _renew(self, claim: Claim) -> None:
        try:
            if _token_of(claim.path) != claim.token:
                if not claim.lost and not self._stop.is_set():
                    _log.warning("another process took over the claim %s", claim.path.name)
                claim.lost = True
                return
            os.utime(claim.path)
        except OSError as error:
            # The next beat tries again; the file system may be away for a moment.
            _log.warning("could not renew the claim %s (%s)", claim.path.name, error)
            return
        claim.renewed_s = time.monotonic()


def _right_to(path: Path, token: str | None) -> Path:
    """Return the claim that gives the right to touch the claim `path` while it is `token`."""
    return path.with_name(f".{token}{CLAIM_SUFFIX}")


def _link_exclusively(source: Path, target: Path) -> bool:
    """Make `target` with the content of `source` unless it exists; return whether it was made."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        unsupported = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
        if error.errno not in unsupported:
            raise
    else:
        return True
    # A file system without hard links: exclusive too, but it appears empty for a moment, in which
    # others see a claim of nobody and wait for it to become stale.
    try:
        descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(source.read_bytes())
    return True


def _read_claim(path: Path) -> tuple[str, ProcessIdentity | None] | None:
    """Return a claim's (token, holder), or None where there is no such file.

    A claim without readable content has no holder, and a token made of its modification time.
    """
    try:
        content = path.read_bytes()
        record = json.loads(content)
        token = str(record["token"])
        if not token.isalnum():  # it becomes part of a file name
            raise ValueError(token)
        return token, ProcessIdentity.from_json(record)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        try:
            return f"{path.stat().st_mtime_ns:0{_TOKEN_BYTES * 2}x}", None
        except FileNotFoundError:
            return None


def _token_of(path: Path) -> str | None:
    found = _read_claim(path)
    return None if found is None else found[0]


@contextlib.contextmanager
def _as_artifact_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{path}: the claim could not be written ({error.strerror or error}); "
            "free some space, or check the folder's permissions, and run again"
        ) from error
