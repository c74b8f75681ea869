"""Atomic, fingerprinted files and folders: the only place that knows how an artefact is written.

A file is written under a temporary name in its own folder, flushed to disk and renamed; a folder
likewise, with `complete.json` (files, hashes, fingerprint) written last. A killed writer leaves
only a temporary name that carries its host and process id, so that `sweep_temporaries` removes
what dead processes of this host left behind and nothing else.

A fingerprint is the SHA-256 of canonical JSON. The fields that went into it are stored beside it,
so that a refusal can name what differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bagscope.errors import ArtifactError, FingerprintMismatch, SchemaError

COMPLETE_NAME = "complete.json"
_TEMPORARY = re.compile(r"^\..+\.(?P<host>[^.~]+)~(?P<pid>\d+)~[0-9a-f]{8}\.tmp$")
_HASH_CHUNK_BYTES = 1 << 20
_HEX_DIGITS = re.compile(rb"[0-9a-f]{64}")

Json = Any
"""What `json` reads and writes: dict, list, str, int, float, bool or None."""

observe_step: Callable[[str], None] | None = None
"""Called with the name of each step of a write; the kill drill dies in here, at a chosen one."""


def step(name: str) -> None:
    """Report that a named step of a write has been reached (see `observe_step`)."""
    if observe_step is not None:
        observe_step(name)


# --- fingerprints ---------------------------------------------------------------------------


def canonical_json(value: Json) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def fingerprint(fields: Mapping[str, Json]) -> str:
    """Return the SHA-256 of the canonical JSON of `fields` as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def differing_fields(
    stored: Json, requested: Json, prefix: str = ""
) -> list[tuple[str, Json, Json]]:
    """List (dotted field, stored value, requested value) wherever two nested values differ.

    A field that one side lacks is shown there as "absent".
    """
    if isinstance(stored, Mapping) and isinstance(requested, Mapping):
        found = []
        for key in sorted({*stored, *requested}):
            name = f"{prefix}.{key}" if prefix else key
            if key not in stored or key not in requested:
                found.append((name, stored.get(key, "absent"), requested.get(key, "absent")))
            else:
                found += differing_fields(stored[key], requested[key], name)
        return found
    # Through JSON, so that a tuple equals the list that it was stored as.
    same = canonical_json(stored) == canonical_json(requested)
    return [] if same else [(prefix, stored, requested)]


def require_same(
    stored: Mapping[str, Json], requested: Mapping[str, Json], *, what: str, remedy: str
) -> None:
    """Refuse an artefact whose fingerprint fields are not the requested ones.

    Raises:
        FingerprintMismatch: names each differing field with both values.
    """
    differences = differing_fields(stored, requested)
    if differences:
        listed = "; ".join(
            f"{field} is {_brief(old)}, asked for {_brief(new)}"
            for field, old, new in differences[:6]
        )
        if len(differences) > 6:
            listed += f"; and {len(differences) - 6} more"
        raise FingerprintMismatch(f"{what} was made differently ({listed}); {remedy}")


def _brief(value: Json) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# --- seals ----------------------------------------------------------------------------------

SEAL_MARK = "bagscope-sha256:"
"""What stands before the hash that a file states of itself."""
SEAL_BLANK = SEAL_MARK + "0" * 64
"""What a file states as its own hash until it is sealed."""


def seal_file(path: Path) -> str:
    """Replace the one `SEAL_BLANK` in a file by the hash of the file as it is; return the hash.

    So a file can carry a hash of all its bytes: those of the hash itself count as zeros.

    Raises:
        ArtifactError: the file holds no blank seal, or several.
    """
    with _viewed(path) as view:
        place = view.find(SEAL_BLANK.encode())
        if place < 0 or view.find(SEAL_BLANK.encode(), place + 1) >= 0:
            count = "no" if place < 0 else "more than one"
            raise ArtifactError(f"{path}: holds {count} blank seal, expected one; write it again")
    digest = sha256_of_file(path)
    with path.open("r+b") as handle:
        handle.seek(place + len(SEAL_MARK))
        handle.write(digest.encode())
    return digest


def stated_seal(path: Path) -> str | None:
    """Return the hash that a file states of itself, None where it states none.

    It is found by its mark, not by a library for the file's format: those trust what they read.
    """
    seal = _find_seal(path)
    return None if seal is None else seal[1]


def seal_holds(path: Path) -> bool:
    """Return whether a file still is what it was when it was sealed."""
    seal = _find_seal(path)
    if seal is None:
        return False
    begin, stated = seal
    digest = hashlib.sha256()
    end = begin + len(stated)
    with path.open("rb") as handle:
        position = 0
        while chunk := handle.read(_HASH_CHUNK_BYTES):
            low, high = max(begin - position, 0), min(end - position, len(chunk))
            if low < high:
                chunk = chunk[:low] + b"0" * (high - low) + chunk[high:]
            digest.update(chunk)
            position += len(chunk)
    return digest.hexdigest() == stated


def _find_seal(path: Path) -> tuple[int, str] | None:
    """Return where in a file the 64 digits of its first seal begin, and the digits."""
    mark = SEAL_MARK.encode()
    with _viewed(path) as view:
        place = view.find(mark)
        while place >= 0:
            begin = place + len(mark)
            digits = bytes(view[begin : begin + 64])
            if _HEX_DIGITS.fullmatch(digits):
                return begin, digits.decode()
            place = view.find(mark, begin)
    return None


@contextlib.contextmanager
def _viewed(path: Path) -> Iterator[mmap.mmap | bytes]:
    if not path.stat().st_size:  # nothing can be mapped
        yield b""
        return
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
        yield view


# --- atomic files ---------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it becomes `path`, else it is gone.

    The folder is made where it is missing. A reader sees the old file or the new one, whole.

    Raises:
        ArtifactError: the disk is full or the folder can't be written; nothing is left behind.
    """
    with _as_artifact_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with _as_artifact_error(path):
            yield temporary
            step("before-sync")
            _sync(temporary)
            step("before-rename")
            temporary.replace(path)
            step("after-rename")
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically (see `atomic_file`)."""
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        half = len(content) // 2
        handle.write(content[:half])
        step("mid-write")
        handle.write(content[half:])


def write_text(path: Path, content: str) -> None:
    """Write a text file atomically, as UTF-8 with unchanged line ends."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Json) -> None:
    """Write readable, key-sorted JSON atomically."""
    write_text(path, _readable_json(value))


def _readable_json(value: Json) -> str:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def read_json(path: Path) -> Json:
    """Read a JSON file.

    Raises:
        ArtifactError: missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: does not exist") from error
    except (OSError, ValueError) as error:
        raise SchemaError(f"{path}: not readable as JSON ({error})") from error


# --- atomic folders -------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(
    path: Path, fields: Mapping[str, Json], *, replace: bool = False
) -> Iterator[Path]:
    """Yield a temporary folder; on a clean exit it becomes `path` with its `complete.json`.

    Args:
        path: the artefact's final place.
        fields: what its fingerprint is made of.
        replace: swap out an artefact that is already there.

    Raises:
        ArtifactError: `path` exists and `replace` is false, or it can't be written.
    """
    if path.exists() and not replace and is_complete(path):
        raise ArtifactError(f"{path}: exists already; pass --overwrite to replace it")
    temporary = temporary_path(path)
    try:
        with _as_artifact_error(path):
            temporary.mkdir(parents=True)
            yield temporary
            step("before-complete")
            complete_folder(temporary, fields)
            step("before-rename")
            if path.exists():
                doomed = temporary_path(path)
                path.replace(doomed)
                temporary.replace(path)
                shutil.rmtree(doomed)
            else:
                temporary.replace(path)
            step("after-rename")
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def complete_folder(path: Path, fields: Mapping[str, Json]) -> None:
    """Write the `complete.json` of a folder whose files are all there.

    For folders that are made part by part, each of them atomic; others are an `atomic_folder`.
    """
    with _as_artifact_error(path):
        names = [name for name in _members(path) if name != COMPLETE_NAME]
        record = {
            "fields": dict(fields),
            "fingerprint": fingerprint(fields),
            "files": {name: sha256_of_file(path / name) for name in names},
        }
        for name in names:
            _sync(path / name)
    write_json(path / COMPLETE_NAME, record)


def is_complete(path: Path) -> bool:
    """Return whether a folder artefact was written to its end."""
    return (path / COMPLETE_NAME).is_file()


def read_complete(path: Path) -> dict[str, Json]:
    """Return the record of a folder artefact: fields, fingerprint and the hash of each file.

    Raises:
        SchemaError: the folder was never completed, or its record is damaged.
    """
    if not is_complete(path):
        raise SchemaError(f"{path}: incomplete (no {COMPLETE_NAME}); make it again")
    record = read_json(path / COMPLETE_NAME)
    if not isinstance(record, dict) or not {"fields", "fingerprint", "files"} <= record.keys():
        raise SchemaError(f"{path / COMPLETE_NAME}: lacks fields, fingerprint or files")
    if fingerprint(record["fields"]) != record["fingerprint"]:
        raise SchemaError(f"{path / COMPLETE_NAME}: its fingerprint is not that of its fields")
    return record


def folder_faults(path: Path) -> list[str]:
    """Return one sentence per missing, changed or unexpected file of a folder artefact."""
    record = read_complete(path)
    files: Mapping[str, str] = record["files"]
    present = set(_members(path)) - {COMPLETE_NAME}
    faults = []
    # What reads as the same record may still be other bytes: a lost line end, a changed space.
    if (path / COMPLETE_NAME).read_bytes() != _readable_json(record).encode():
        faults.append(f"{path / COMPLETE_NAME}: content changed since it was written")
    faults += [f"{path / name}: missing" for name in sorted(files.keys() - present)]
    faults += [f"{path / name}: not in {COMPLETE_NAME}" for name in sorted(present - files.keys())]
    faults += [
        f"{path / name}: content changed since it was written"
        for name in sorted(files.keys() & present)
        if sha256_of_file(path / name) != files[name]
    ]
    return faults


def _members(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- temporary names ------------------------------------------------------------------------


def temporary_path(path: Path) -> Path:
    """Return a fresh hidden name beside `path` that says which process owns it."""
    owner = f"{host_name()}~{os.getpid()}~{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{owner}.tmp")


def sweep_temporaries(folder: Path, *, recursive: bool = True) -> list[Path]:
    """Remove temporary files and folders of this host's dead processes; return their paths."""
    swept = []
    found = folder.rglob(".*.tmp") if recursive else folder.glob(".*.tmp")
    for path in sorted(found):
        match = _TEMPORARY.match(path.name)
        if match and match["host"] == host_name() and not is_alive(int(match["pid"])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            swept.append(path)
    return swept


def host_name() -> str:
    """Return this host's name, as it may stand in a file name."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"


def is_alive(pid: int) -> bool:
    """Return whether a process of this host exists and has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A killed process keeps its id until its parent has taken notice, in containers often for long.
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        return state not in "ZX"
    return True


def portable_name_problem(name: str) -> str | None:
    """Return why `name` can't be a file name on every system, or None where it can."""
    if not name or name != name.strip() or name.endswith(".") or name.startswith("."):
        return "is empty, or starts or ends with a space or a dot"
    forbidden = sorted({c for c in name if c in '<>:"/\\|?*' or ord(c) < 32})
    if forbidden:
        return f"contains {' '.join(map(repr, forbidden))}"
    reserved: Sequence[str] = ("con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)))
    if name.split(".")[0].lower() in (*reserved, *(f"lpt{i}" for i in range(1, 10))):
        return "is a reserved device name on Windows"
    if len(name.encode()) > 180:
        return "is longer than 180 bytes"
    return None


def _sync(path: Path) -> None:
    """Flush a file or a folder's directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems refuse to sync a directory; a file must be
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_artifact_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{path}: could not be written ({error.strerror or error}); "
            "free some space, or check the folder's permissions, and run again"
        ) from error
