"""Where everything stands in a feature file, and how its bytes get there (see `feature_file`)."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from bagscope import __version__
from bagscope.artifacts import SEAL_BLANK, canonical_json, fingerprint
from bagscope.wsi.hdf5_image import SparseImage

if TYPE_CHECKING:
    from bagscope.features.feature_file import FeatureHeader

SCHEMA = "bagscope.features"
SCHEMA_VERSION = 1
CRC_ROWS = 256

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


class Float16Overflow(Exception):
    """A value does not fit into float16: the slide is to be stored as float32."""


class Places(NamedTuple):
    """Where in a file the vectors and their checksums begin."""

    features: int
    crc32: int


def lay_out(
    path: Path, header: FeatureHeader, shape: tuple[int, int], dtype: np.dtype[Any]
) -> Places:
    """Write a new file with room for the vectors; return where they belong.

    Raises:
        OSError: the disk is full.
    """
    image = SparseImage()
    with h5py.File(
        image, "w", libver=("earliest", "v110"), alignment_threshold=65536, alignment_interval=4096
    ) as file:
        for name, value in _attributes(header, dtype).items():
            file.attrs[name] = value
        if header.coords_l0 is not None:
            file.create_dataset("coords", data=header.coords_l0, dtype=np.int32)
        if header.grid is not None:
            file.create_dataset("grid", data=header.grid, dtype=np.int32)
        for name, array in header.extra.items():
            file.create_dataset(name, data=array)
        _allocate(file, "crc32", (-(-shape[0] // CRC_ROWS),), np.dtype(np.uint32))
        _allocate(file, "features", shape, dtype)
        # Nothing of no rows, or no columns, has a place.
        offsets = [file[name].id.get_offset() or 0 for name in ("features", "crc32")]
    image.write_to(path)
    return Places(*offsets)


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


def as_stored(vectors: NDArray[np.floating[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return (n, D) vectors in the stored dtype.

    Raises:
        Float16Overflow: a finite value became infinite.
    """
    with np.errstate(over="ignore"):
        content = np.ascontiguousarray(vectors, dtype)
    # What was infinite before stays so: the encoder's fault, and no matter of dtypes.
    if dtype == np.float16 and vectors.dtype != np.float16:
        infinite = (content.view(np.uint16) & 0x7FFF) == 0x7C00
        if infinite.any() and np.isfinite(vectors[infinite]).any():
            raise Float16Overflow
    return content


def bytes_of(content: NDArray[Any]) -> memoryview:
    """Return the bytes of a C-contiguous array, without a copy."""
    return content.reshape(-1).view(np.uint8).data


def runs(wanted: NDArray[np.bool_], longest: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each run of wanted rows, in pieces of at most `longest`."""
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).tolist()
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        for begin in range(start, stop, longest):
            yield begin, min(begin + longest, stop)


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of the bytes at a place in an open file."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def write_checksums(
    descriptor: int, places: Places, shape: tuple[int, int], dtype: np.dtype[Any]
) -> None:
    """Fill in the CRC of every 256 rows."""
    if not shape[0]:
        return
    row_bytes = shape[1] * dtype.itemsize
    values = []
    for start in range(0, shape[0], CRC_ROWS):
        count = min(CRC_ROWS, shape[0] - start)
        at = places.features + start * row_bytes
        values.append(zlib.crc32(os.pread(descriptor, count * row_bytes, at)))
    write_at(descriptor, bytes_of(np.array(values, "<u4")), places.crc32)
