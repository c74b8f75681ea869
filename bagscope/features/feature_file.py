"""The feature file: one HDF5 per slide and encoder, the artefact between tiles and bags.

`features` lies contiguous and uncompressed, so that a bag is one memory-mapped read and a random
row costs what it weighs. A CRC per 256 rows locates damage, and a hash of the whole file finds any.
Datasets and attributes are listed in docs/formats.md.

HDF5 lays the file out with room for every row; rows are then written to their place directly, so
that memory stays bounded and a full disk is a plain error.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from bagscope import __version__
from bagscope.artifacts import (
    SEAL_BLANK,
    Json,
    atomic_file,
    canonical_json,
    fingerprint,
    seal_file,
    step,
)
from bagscope.errors import ArtifactError, SchemaError

SCHEMA = "bagscope.features"
SCHEMA_VERSION = 1
CRC_ROWS = 256
UNKNOWN = "unknown"
"""What an imported file states for provenance that its source did not carry."""

FLOAT16_MAX = 65504.0
StoredDtype = Literal["float16", "float32"]

TILE_ATTRIBUTES = (
    "width_l0",
    "height_l0",
    "bounds_l0",
    "mpp_x_l0",
    "mpp_y_l0",
    "mpp_source",
    "mpp_estimated",
    "mpp",
    "mpp_effective",
    "tile_px",
    "tile_px_l0",
    "extent_l0",
    "origin_l0",
    "step_l0",
    "overlap_px",
    "read_level",
    "backend",
    "tissue_method",
)
"""Attributes of the tile file that a feature file repeats, so that it can be read alone."""

_BLOCK_ROWS = 4096
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
        extra: further datasets, such as `coords_source` of an imported file.
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


class Float16Overflow(Exception):
    """A value does not fit into float16: the slide is to be stored as float32."""


class FeatureWriter:
    """Writes one feature file, rows in any order, atomically; not for several threads at once."""

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
        self._temporary = self._stack.enter_context(atomic_file(path))
        try:
            self._offset = _lay_out(self._temporary, header, self._shape, self._dtype)
            self._descriptor = os.open(self._temporary, os.O_RDWR)
        except BaseException as error:
            self._give_up(error)
        self._stack.callback(os.close, self._descriptor)

    def write(self, start: int, vectors: NDArray[np.floating[Any]]) -> None:
        """Write rows `start` ... of (n, D) vectors.

        Raises:
            Float16Overflow: a value is beyond float16, and that is what is stored.
            ArtifactError: the disk is full.
        """
        if self._dtype == np.float16 and vectors.size and np.abs(vectors).max() > FLOAT16_MAX:
            raise Float16Overflow
        content = np.ascontiguousarray(vectors, self._dtype)
        try:
            _write_at(self._descriptor, memoryview(content).cast("B"), self._row_offset(start))
        except OSError as error:
            self._give_up(error)

    def finish(self, readable: NDArray[np.bool_] | None = None) -> None:
        """Put the file in its place; rows that are not `readable` (rows,) are left out.

        Raises:
            ArtifactError: it can't be written.
        """
        try:
            if readable is not None and not readable.all():
                self._leave_out(readable)
            _write_checksums(
                self._temporary, self._descriptor, self._offset, self._shape, self._dtype
            )
            seal_file(self._temporary)
        except BaseException as error:
            self._give_up(error)
        step("features-written")
        self._stack.close()

    def discard(self) -> None:
        """Remove what was written so far."""
        with contextlib.suppress(_Discarded):
            self._give_up(_Discarded())

    def _give_up(self, error: BaseException) -> None:
        """Leave the atomic file by an error, which removes it and is raised in plain words."""
        stack, self._stack = self._stack, contextlib.ExitStack()
        if not stack.__exit__(type(error), error, error.__traceback__):
            raise error

    def _row_offset(self, row: int) -> int:
        return self._offset + row * self._shape[1] * self._dtype.itemsize

    def _leave_out(self, readable: NDArray[np.bool_]) -> None:
        """Lay the file out anew for fewer rows; those that stay move forward."""
        header, kept = self._header, np.flatnonzero(readable)
        compact = FeatureHeader(
            slide_id=header.slide_id,
            fields=header.fields,
            encoder=header.encoder,
            weights_sha256=header.weights_sha256,
            coords_l0=None if header.coords_l0 is None else header.coords_l0[kept],
            grid=None if header.grid is None else header.grid[kept],
            tile=header.tile,
            recorded=header.recorded,
            extra=header.extra,
        )
        old = self._stack.enter_context(os.fdopen(os.dup(self._descriptor), "rb"))
        # The open descriptor keeps the old file readable after the new one took its name.
        self._temporary.unlink()
        old_offset, row_bytes = self._offset, self._shape[1] * self._dtype.itemsize
        self._shape = (len(kept), self._shape[1])
        self._offset = _lay_out(self._temporary, compact, self._shape, self._dtype)
        self._descriptor = os.open(self._temporary, os.O_RDWR)
        self._stack.callback(os.close, self._descriptor)
        for row, source in enumerate(kept.tolist()):
            content = os.pread(old.fileno(), row_bytes, old_offset + source * row_bytes)
            _write_at(self._descriptor, memoryview(content), self._row_offset(row))


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
    overflows = bool(vectors.size) and float(np.abs(vectors).max()) > FLOAT16_MAX
    writer = FeatureWriter(
        path,
        header,
        rows=len(vectors),
        dimension=vectors.shape[1],
        dtype="float32" if overflows else dtype,
    )
    for start in range(0, len(vectors), _BLOCK_ROWS):
        writer.write(start, vectors[start : start + _BLOCK_ROWS])
    writer.finish()


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFile:
    """An opened feature file; vectors are memory-mapped, so nothing is read until it is used.

    Attributes:
        features: (N, D) float16 or float32, read-only.
        crc32: (ceil(N / 256),) uint32, of the bytes of each 256 rows.
        sha256: hash of the whole file, as stated in it.
        attributes: scalar attributes of the file, those of the tile file among them.

    The others are those of `FeatureHeader`.
    """

    path: Path
    slide_id: str
    features: NDArray[Any]
    coords_l0: NDArray[np.int32] | None
    grid: NDArray[np.int32] | None
    encoder: Mapping[str, Json]
    weights_sha256: str
    fields: Mapping[str, Json]
    fingerprint: str
    crc32: NDArray[np.uint32]
    sha256: str
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
        features = _mapped(path, file)
        fields = json.loads(attributes["fingerprint_fields"])
        encoder = json.loads(attributes["encoder"])
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
        coords_l0=arrays["coords"],
        grid=arrays["grid"],
        encoder=encoder,
        weights_sha256=str(attributes["weights_sha256"]),
        fields=fields,
        fingerprint=str(attributes["fingerprint"]),
        crc32=crc32,
        sha256=str(attributes["sha256"]),
        attributes=attributes,
    )


# --- layout ---------------------------------------------------------------------------------


def _lay_out(
    path: Path, header: FeatureHeader, shape: tuple[int, int], dtype: np.dtype[Any]
) -> int:
    """Write the file with room for the vectors; return where in the file they begin."""
    with h5py.File(
        path, "w", libver=("earliest", "v110"), alignment_threshold=65536, alignment_interval=4096
    ) as file:
        for name, value in _attributes(header, dtype).items():
            file.attrs[name] = value
        if header.coords_l0 is not None:
            file.create_dataset("coords", data=header.coords_l0, dtype=np.int32)
        if header.grid is not None:
            file.create_dataset("grid", data=header.grid, dtype=np.int32)
        for name, array in header.extra.items():
            file.create_dataset(name, data=array)
        step("mid-write")
        _allocate(file, "crc32", (-(-shape[0] // CRC_ROWS),), np.dtype(np.uint32))
        _allocate(file, "features", shape, dtype)
        offset = file["features"].id.get_offset()
    return 0 if offset is None else int(offset)


def _attributes(header: FeatureHeader, dtype: np.dtype[Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "bagscope_version": __version__,
        # Fixed in length: the hash takes the blank's place when all else is written.
        "sha256": np.bytes_(SEAL_BLANK),
        "fingerprint": fingerprint(header.fields),
        "fingerprint_fields": canonical_json(header.fields).decode(),
        "slide_id": header.slide_id,
        "encoder": canonical_json(header.encoder).decode(),
        "weights_sha256": header.weights_sha256,
        "stored_dtype": dtype.name,
        "recorded": canonical_json(header.recorded).decode(),
        **{name: header.tile[name] for name in TILE_ATTRIBUTES if name in header.tile},
    }


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Make a contiguous dataset that has its place in the file and holds nothing yet."""
    if 0 in shape:
        file.create_dataset(name, shape, dtype)
        return
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)
    h5py.h5d.create(
        file.id,
        name.encode(),
        h5py.h5t.py_create(dtype, logical=True),
        h5py.h5s.create_simple(shape),
        dcpl=settings,
    )


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _write_checksums(
    path: Path, descriptor: int, offset: int, shape: tuple[int, int], dtype: np.dtype[Any]
) -> None:
    """Fill in the CRC of every 256 rows."""
    if 0 in shape:
        return
    with h5py.File(path, "r") as file:
        place = file["crc32"].id.get_offset()
    row_bytes = shape[1] * dtype.itemsize
    values = []
    for start in range(0, shape[0], CRC_ROWS):
        count = min(CRC_ROWS, shape[0] - start)
        values.append(
            zlib.crc32(os.pread(descriptor, count * row_bytes, offset + start * row_bytes))
        )
    _write_at(descriptor, memoryview(np.array(values, "<u4")).cast("B"), place)


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
    attributes["sha256"] = bytes(attributes["sha256"]).decode()
    return attributes


def _mapped(path: Path, file: h5py.File) -> NDArray[Any]:
    """Return the vectors as a read-only view of the file."""
    dataset = file["features"]
    if dataset.ndim != 2 or dataset.dtype not in (np.float16, np.float32):
        raise SchemaError(
            f"{path}: features are {dataset.dtype} with {dataset.ndim} dimensions, expected "
            "float16 or float32 with 2"
        )
    offset = dataset.id.get_offset()
    if offset is None:
        empty: NDArray[Any] = dataset[:]
        return empty
    if offset + dataset.size * dataset.dtype.itemsize > path.stat().st_size:
        raise SchemaError(f"{path}: cut short; extract again")
    return np.memmap(path, dataset.dtype, "r", offset, dataset.shape)
