"""The feature file: one HDF5 per slide and encoder, the artefact between tiles and bags.

`features` lies contiguous and uncompressed, so that a bag is one memory-mapped read and a random
row costs what it weighs. A CRC per 256 rows locates damage, and a hash of the whole file finds any.
Datasets and attributes are listed in docs/formats.md.

HDF5 lays the file out in memory, with room for every row that takes none; rows are then written to
their place directly, so that memory stays bounded and a full disk is a plain error.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import SEAL_MARK, Json, atomic_file, fingerprint, seal_file, step
from bagscope.errors import ArtifactError, SchemaError
from bagscope.features.feature_layout import (
    CRC_ROWS,
    SCHEMA,
    SCHEMA_VERSION,
    TILE_ATTRIBUTES,
    Float16Overflow,
    as_stored,
    bytes_of,
    lay_out,
    runs,
    write_at,
    write_checksums,
)

__all__ = [
    "CRC_ROWS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "TILE_ATTRIBUTES",
    "UNKNOWN",
    "FeatureFile",
    "FeatureHeader",
    "FeatureWriter",
    "Float16Overflow",
    "StoredDtype",
    "read_feature_file",
    "read_rows",
    "write_feature_file",
]

UNKNOWN = "unknown"
"""What an imported file states for provenance that its source did not carry."""

StoredDtype = Literal["float16", "float32"]

_BLOCK_ROWS = 4096
_PROBED_ROWS = 16
_OWN_DATASETS = ("features", "coords", "grid", "crc32")
_REQUIRED_ATTRIBUTES = (
    "slide_id", "fingerprint", "fingerprint_fields", "encoder", "weights_sha256", "sha256",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureHeader:
    """Everything in a feature file but its vectors.

    Attributes:
        slide_id: as in the cohort table.
        fields: what the fingerprint is made of.
        encoder: the encoder's spec as JSON; at least `name`.
        weights_sha256: of the encoder's weights, or "unknown".
        coords_l0: (N, 2) int32, None for bags that never were a slide.
        grid: (N, 2) int32 (column, row) on the lattice, None where there is none.
        tile: attributes of the tile file (`TILE_ATTRIBUTES`), as far as they are known.
        recorded: what is noted and never compared: versions, device, batch size, ...
        extra: further datasets with one entry per row, such as `coords_source` of an imported file.
    """

    slide_id: str
    fields: Mapping[str, Json]
    encoder: Mapping[str, Json]
    weights_sha256: str
    coords_l0: NDArray[np.int32] | None
    grid: NDArray[np.int32] | None = None
    tile: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Json] = field(default_factory=dict)
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class FeatureWriter:
    """Writes one feature file, rows in any order, atomically; not for several threads at once.

    Once it failed, finished or was discarded, nothing more can be written.
    """

    def __init__(
        self,
        path: Path,
        header: FeatureHeader,
        *,
        rows: int,
        dimension: int,
        dtype: StoredDtype = "float16",
    ) -> None:
        self.path = path
        self._header = header
        self._shape = (rows, dimension)
        self._dtype = np.dtype(dtype)
        self._stack = contextlib.ExitStack()
        self._descriptor = -1
        self._temporary = self._stack.enter_context(atomic_file(path))
        try:
            self._places = lay_out(self._temporary, header, self._shape, self._dtype)
            self._descriptor = os.open(self._temporary, os.O_RDWR)
        except BaseException as error:
            self._give_up(error)
        self._stack.callback(os.close, self._descriptor)

    def write(self, start: int, vectors: NDArray[np.floating[Any]]) -> None:
        """Write rows `start` ... of (n, D) vectors.

        Raises:
            Float16Overflow: a value is beyond float16, and that is what is stored; the writer
                stays open.
            ArtifactError: the disk is full.
            ValueError: rows that the file has no place for.
        """
        rows, dimension = self._shape
        if vectors.ndim != 2 or vectors.shape[1] != dimension:
            raise ValueError(f"{self.path}: vectors are {vectors.shape}, expected (n, {dimension})")
        if start < 0 or start + len(vectors) > rows:
            raise ValueError(
                f"{self.path}: rows {start} to {start + len(vectors)} of a file of {rows}"
            )
        if self._descriptor < 0:
            raise ValueError(f"{self.path}: written to after it was finished or discarded")
        if not vectors.size:
            return
        content = as_stored(vectors, self._dtype)
        try:
            write_at(self._descriptor, bytes_of(content), self._row_offset(start))
        except OSError as error:
            self._give_up(error)

    def finish(self, readable: NDArray[np.bool_] | None = None) -> None:
        """Put the file in its place; rows that are not `readable` (rows,) are left out.

        Raises:
            ArtifactError: it can't be written.
        """
        if self._descriptor < 0:
            raise ValueError(f"{self.path}: finished after it was finished or discarded")
        try:
            if readable is not None and readable.shape != self._shape[:1]:
                raise ValueError(
                    f"{self.path}: readable is {readable.shape}, expected {self._shape[:1]}"
                )
            if readable is not None and not readable.all():
                self._leave_out(readable)
            write_checksums(self._descriptor, self._places, self._shape, self._dtype)
            seal_file(self._temporary)
            step("features-written")
        except BaseException as error:
            self._give_up(error)
        stack, self._stack = self._stack, contextlib.ExitStack()
        self._descriptor = -1
        stack.close()

    def discard(self) -> None:
        """Remove what was written so far."""
        with contextlib.suppress(_Discarded):
            self._give_up(_Discarded())

    def _give_up(self, error: BaseException) -> None:
        """Leave the atomic file by an error, which removes it and is raised in plain words."""
        stack, self._stack = self._stack, contextlib.ExitStack()
        # A closed descriptor's number soon stands for another file.
        self._descriptor = -1
        if not stack.__exit__(type(error), error, error.__traceback__):
            raise error

    def _row_offset(self, row: int) -> int:
        return self._places.features + row * self._shape[1] * self._dtype.itemsize

    def _leave_out(self, readable: NDArray[np.bool_]) -> None:
        """Lay the file out anew for fewer rows; those that stay move forward."""
        header = self._header
        compact = replace(
            header,
            coords_l0=None if header.coords_l0 is None else header.coords_l0[readable],
            grid=None if header.grid is None else header.grid[readable],
            extra={name: array[readable] for name, array in header.extra.items()},
        )
        # The open descriptor keeps the old file readable after the new one took its name.
        old, old_offset = self._descriptor, self._places.features
        self._temporary.unlink()
        self._shape = (int(np.count_nonzero(readable)), self._shape[1])
        self._places = lay_out(self._temporary, compact, self._shape, self._dtype)
        self._descriptor = os.open(self._temporary, os.O_RDWR)
        self._stack.callback(os.close, self._descriptor)
        row_bytes = self._shape[1] * self._dtype.itemsize
        written = 0
        for start, stop in runs(readable, _BLOCK_ROWS):
            content = os.pread(old, (stop - start) * row_bytes, old_offset + start * row_bytes)
            write_at(self._descriptor, memoryview(content), self._row_offset(written))
            written += stop - start


class _Discarded(Exception):
    pass


def write_feature_file(
    path: Path,
    header: FeatureHeader,
    vectors: NDArray[np.floating[Any]],
    *,
    dtype: StoredDtype = "float16",
) -> None:
    """Write vectors (N, D) that are at hand; float32 is kept where float16 would overflow."""
    rows, dimension = vectors.shape
    writer = FeatureWriter(path, header, rows=rows, dimension=dimension, dtype=dtype)
    try:
        for start in range(0, rows, _BLOCK_ROWS):
            writer.write(start, vectors[start : start + _BLOCK_ROWS])
    except Float16Overflow:
        writer.discard()
        write_feature_file(path, header, vectors, dtype="float32")
    except BaseException:
        writer.discard()
        raise
    else:
        writer.finish()


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFile:
    """An opened feature file; vectors are memory-mapped, so nothing is read until it is used.

    Attributes:
        features: (N, D) float16 or float32, read-only.
        offset: where in the file the vectors begin.
        crc32: (ceil(N / 256),) uint32, of the bytes of each 256 rows.
        sha256: hash of the whole file, as stated in it.
        extra_names: of the datasets that only this file has (see `read_extra`).
        attributes: scalar attributes of the file, those of the tile file among them.

    The others are those of `FeatureHeader`.
    """

    path: Path
    slide_id: str
    features: NDArray[Any]
    offset: int
    coords_l0: NDArray[np.int32] | None
    grid: NDArray[np.int32] | None
    encoder: Mapping[str, Json]
    weights_sha256: str
    fields: Mapping[str, Json]
    fingerprint: str
    crc32: NDArray[np.uint32]
    sha256: str
    recorded: Mapping[str, Json]
    extra_names: tuple[str, ...]
    attributes: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.features)


def read_feature_file(path: Path) -> FeatureFile:
    """Open a feature file and check that its parts fit together.

    Raises:
        ArtifactError: missing.
        SchemaError: not a feature file, of a newer version, damaged, or contradicting itself.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such feature file; run bagscope extract first")
    with _readable(path), h5py.File(path, "r") as file:
        attributes = _checked_attributes(path, file)
        arrays = {
            name: np.asarray(file[name][:], np.int32) if name in file else None
            for name in ("coords", "grid")
        }
        crc32 = np.asarray(file["crc32"][:], np.uint32)
        offset, features = _mapped(path, file)
        extra = tuple(sorted(set(file) - set(_OWN_DATASETS)))
        fields = json.loads(attributes["fingerprint_fields"])
        encoder = json.loads(attributes["encoder"])
        recorded = json.loads(attributes.get("recorded", "{}"))
    for name, array in arrays.items():
        if array is not None and array.shape != (len(features), 2):
            raise SchemaError(
                f"{path}: {name} is {array.shape} beside {len(features)} features; extract again"
            )
    if len(crc32) != -(-len(features) // CRC_ROWS):
        raise SchemaError(f"{path}: {len(crc32)} checksums for {len(features)} rows; extract again")
    if fingerprint(fields) != attributes["fingerprint"]:
        raise SchemaError(f"{path}: its fingerprint is not that of its fields; extract again")
    return FeatureFile(
        path=path,
        slide_id=str(attributes["slide_id"]),
        features=features,
        offset=offset,
        coords_l0=arrays["coords"],
        grid=arrays["grid"],
        encoder=encoder,
        weights_sha256=str(attributes["weights_sha256"]),
        fields=fields,
        fingerprint=str(attributes["fingerprint"]),
        crc32=crc32,
        sha256=str(attributes["sha256"]),
        recorded=recorded,
        extra_names=extra,
        attributes=attributes,
    )


def read_rows(file: FeatureFile, rows: NDArray[np.integer[Any]] | None) -> NDArray[Any]:
    """Read rows (n,) of a feature file, all where None, into a new array (n, D).

    Raises:
        IndexError: a row that the file does not have.
        ArtifactError: the file was cut short meanwhile, or is gone.
    """
    if rows is None:
        out = np.empty(file.features.shape, file.features.dtype)
        with _reopened(file) as descriptor:
            _read_into(file, descriptor, 0, bytes_of(out))
        return out
    wanted = np.asarray(rows)
    if wanted.size and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(file):
        raise IndexError(f"{file.path}: rows {wanted.min()} to {wanted.max()} of {len(file)}")
    with _reopened(file) as descriptor:
        row_bytes = file.features.shape[1] * file.features.itemsize
        if not wanted.size or _in_memory(file, descriptor, wanted, row_bytes):
            taken: NDArray[Any] = file.features[wanted]
            return taken
        # Told of all places beforehand, a disk works on them at once: nine times faster than one
        # by one. Reading, unlike touching mapped memory, leaves other threads running meanwhile.
        if hasattr(os, "posix_fadvise"):
            for row in np.unique(wanted).tolist():
                at = file.offset + row * row_bytes
                os.posix_fadvise(descriptor, at, row_bytes, os.POSIX_FADV_WILLNEED)
        out = np.empty((len(wanted), file.features.shape[1]), file.features.dtype)
        target = bytes_of(out)
        for place in np.argsort(wanted, kind="stable").tolist():
            piece = target[place * row_bytes : (place + 1) * row_bytes]
            _read_into(file, descriptor, int(wanted[place]) * row_bytes, piece)
    return out


@contextlib.contextmanager
def _reopened(file: FeatureFile) -> Iterator[int]:
    try:
        descriptor = os.open(file.path, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(f"{file.path}: can't be read any more ({error.strerror})") from error
    try:
        # Touching mapped memory beyond a file's end would kill the process.
        if os.fstat(descriptor).st_size < file.offset + file.features.nbytes:
            raise ArtifactError(f"{file.path}: cut short; extract again")
        yield descriptor
    finally:
        os.close(descriptor)


def _in_memory(
    file: FeatureFile, descriptor: int, rows: NDArray[np.integer[Any]], row_bytes: int
) -> bool:
    """Return whether the system has the file in memory, as far as a few of the rows tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        for row in rows[:: -(-len(rows) // _PROBED_ROWS)].tolist():
            os.preadv(descriptor, [bytearray(1)], file.offset + row * row_bytes, os.RWF_NOWAIT)
    except OSError:  # not in memory, or a file system that can't tell
        return False
    return True


def _read_into(file: FeatureFile, descriptor: int, at: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        got = os.preadv(descriptor, [target[done:]], file.offset + at + done)
        if not got:
            raise ArtifactError(f"{file.path}: cut short; extract again")
        done += got


# --- checks ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in one sentence what HDF5 says of a damaged file."""
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError, UnicodeDecodeError) as error:
        raise SchemaError(
            f"{path}: damaged ({' '.join(str(error).split())[:200]}); extract again"
        ) from error


def _checked_attributes(path: Path, file: h5py.File) -> dict[str, Any]:
    attributes = dict(file.attrs)
    schema, version = attributes.get("schema"), attributes.get("schema_version", 0)
    if schema != SCHEMA:
        raise SchemaError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"{path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest that "
            "this bagscope reads; update bagscope"
        )
    missing = [name for name in _REQUIRED_ATTRIBUTES if name not in attributes]
    missing += [name for name in ("features", "crc32") if name not in file]
    if missing:
        raise SchemaError(f"{path}: lacks {', '.join(missing)}; extract again")
    attributes["sha256"] = bytes(attributes["sha256"]).decode().removeprefix(SEAL_MARK)
    return attributes


def _mapped(path: Path, file: h5py.File) -> tuple[int, NDArray[Any]]:
    """Return where the vectors begin, and they as a read-only view of the file."""
    dataset = file["features"]
    if dataset.ndim != 2 or dataset.dtype not in (np.float16, np.float32):
        raise SchemaError(
            f"{path}: features are {dataset.dtype} with {dataset.ndim} dimensions, expected "
            "float16 or float32 with 2"
        )
    offset = dataset.id.get_offset()
    if offset is None:
        if dataset.size:
            raise SchemaError(f"{path}: features are not contiguous; import the file again")
        empty: NDArray[Any] = np.zeros(dataset.shape, dataset.dtype)
        empty.flags.writeable = False
        return 0, empty
    if offset + dataset.size * dataset.dtype.itemsize > path.stat().st_size:
        raise SchemaError(f"{path}: cut short; extract again")
    with path.open("rb") as handle:
        view = _map_file(handle.fileno())
    vectors = np.frombuffer(view, dataset.dtype, dataset.size, offset).reshape(dataset.shape)
    return int(offset), vectors


def _map_file(descriptor: int) -> mmap.mmap:
    if sys.version_info >= (3, 13):
        # Views that a training run holds by the thousand then use up no file descriptors.
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
