"""Features as one Zarr v3 store, for object stores: any folder or URL that fsspec knows.

Three arrays a slide: `features/<slide_id>` (N, D), `coords/<slide_id>` and `grid/<slide_id>`
(N, 2), where they are known. Vectors lie uncompressed in chunks of 256 rows, 64 chunks to an
object, so that a bag is a few large reads and some rows are as many small ones. `complete.json`
is written last and names every object with its hash; a store without it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import (
    COMPLETE_NAME,
    Json,
    atomic_folder,
    canonical_json,
    fingerprint,
)
from bagscope.errors import ArtifactError, SchemaError

if TYPE_CHECKING:
    import zarr
    from zarr.storage import StorePath

    from bagscope.features.store import FeatureStore, SlideRecord

SCHEMA = "bagscope.features.zarr"
SCHEMA_VERSION = 1
CHUNK_ROWS = 256
SHARD_ROWS = 64 * CHUNK_ROWS
_RECORDED = (
    "slide_id",
    "encoder",
    "weights_sha256",
    "fields",
    "fingerprint",
    "attributes",
    "recorded",
)


def is_zarr_location(location: str) -> bool:
    """Return whether a location names a Zarr store and not a folder of feature files."""
    if "://" in location or location.rstrip("/").endswith(".zarr"):
        return True
    return (Path(location) / "zarr.json").is_file()


def write_zarr_store(store: FeatureStore, location: Path | str, *, replace: bool = False) -> None:
    """Write a store's slides as one Zarr store in a folder or at a URL.

    In a folder it appears whole or not at all; at a URL it is refused until the last object,
    `complete.json`, is there.

    Raises:
        ArtifactError: there is one already and `replace` is false, or it can't be written.
        SchemaError: a slide is damaged, or encoders are mixed.
    """
    fields = _fields_of(store)
    if "://" not in str(location):
        from zarr.storage import LocalStore

        with atomic_folder(Path(location), fields, replace=replace) as temporary:
            _write_arrays(store, LocalStore(temporary))
        return
    from zarr.storage import FsspecStore

    url = str(location).rstrip("/")
    files, folder = _file_system(url)
    marker = f"{folder}/{COMPLETE_NAME}"
    if files.exists(folder):
        if files.exists(marker) and not replace:
            raise ArtifactError(f"{url}: exists already; pass --overwrite to replace it")
        # The marker goes first: what is being removed must not look complete.
        if files.exists(marker):
            files.rm_file(marker)
        files.rm(folder, recursive=True)
    try:
        _write_arrays(store, FsspecStore.from_url(url))
        # Read back, so that the marker vouches for what the store holds, not for what was sent.
        record = {
            "fields": fields,
            "fingerprint": fingerprint(fields),
            "files": _hashes(files, folder),
        }
        files.pipe_file(marker, canonical_json(record))
    except OSError as error:
        raise ArtifactError(f"{url}: could not be written ({error}); run again") from error


def remote_faults(url: str) -> list[str]:
    """Return one sentence per missing, changed or unexpected object of a store at a URL.

    Raises:
        SchemaError: the store was never completed, or its record is damaged.
    """
    files, folder = _file_system(url.rstrip("/"))
    stated: Mapping[str, str] = _read_marker(url)["files"]
    found = _hashes(files, folder)
    faults = [f"{name}: missing" for name in sorted(stated.keys() - found.keys())]
    faults += [f"{name}: not in {COMPLETE_NAME}" for name in sorted(found.keys() - stated.keys())]
    faults += [
        f"{name}: content changed since it was written"
        for name in sorted(found.keys() & stated.keys())
        if found[name] != stated[name]
    ]
    return faults


class ZarrBackend:
    """A Zarr store, opened; arrays are opened when they are asked for."""

    def __init__(self, location: str, only: Sequence[str] | None = None) -> None:
        from bagscope.features.store import chosen_slides

        self._location = location.rstrip("/")
        fields = _read_marker(self._location)["fields"]
        if fields.get("schema") != SCHEMA:
            raise SchemaError(
                f"{location}: schema is {fields.get('schema')!r}, expected {SCHEMA!r}"
            )
        if fields["schema_version"] > SCHEMA_VERSION:
            raise SchemaError(
                f"{location}: schema version {fields['schema_version']} is newer than "
                f"{SCHEMA_VERSION}, the newest that this bagscope reads; update bagscope"
            )
        self._fingerprints: Mapping[str, str] = chosen_slides(fields["slides"], only, location)
        self._slide_ids = tuple(sorted(self._fingerprints))
        self._group = _open_group(self._location)
        self._records: dict[str, SlideRecord] = {}

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Return the slides, in order of name."""
        return self._slide_ids

    def record(self, slide_id: str) -> SlideRecord:
        """Return what the store says of a slide; kept, as each costs several requests."""
        if slide_id not in self._records:
            self._records[slide_id] = self._read_record(slide_id)
        return self._records[slide_id]

    def features(
        self, slide_id: str, rows: NDArray[np.int64] | None, *, copy: bool = False
    ) -> NDArray[Any]:
        """Read all vectors of a slide, or some; a copy in any case."""
        array = self._array(f"features/{slide_id}")
        if rows is not None and not rows.size:
            return np.empty((0, array.shape[1]), array.dtype)
        return np.asarray(array[:] if rows is None else array.oindex[rows])

    def _read_record(self, slide_id: str) -> SlideRecord:
        from bagscope.features.store import SlideRecord

        array = self._array(f"features/{slide_id}")
        known: dict[str, Any] = {**array.attrs}
        source = f"{self._location}/features/{slide_id}"
        if missing := [name for name in _RECORDED if name not in known]:
            raise SchemaError(f"{source}: lacks {', '.join(missing)}; write the store again")
        if not known["fingerprint"] == fingerprint(known["fields"]) == self._fingerprints[slide_id]:
            raise SchemaError(f"{source}: its fingerprint is not that of its fields")
        rows, dimension = array.shape
        return SlideRecord(
            **{name: known[name] for name in _RECORDED},
            shape=(rows, dimension),
            dtype=array.dtype.name,
            coords_l0=self._positions("coords", slide_id, known, rows),
            grid=self._positions("grid", slide_id, known, rows),
            source=source,
        )

    def _positions(
        self, name: str, slide_id: str, known: Mapping[str, Any], rows: int
    ) -> NDArray[np.int32] | None:
        if not known.get(f"has_{name}"):
            return None
        positions = np.asarray(self._array(f"{name}/{slide_id}")[:], np.int32)
        if positions.shape != (rows, 2):
            raise SchemaError(
                f"{self._location}: {name} of {slide_id} is {positions.shape} beside {rows} rows; "
                "write the store again"
            )
        return positions

    def _array(self, path: str) -> zarr.Array[Any]:
        import zarr

        try:
            found = self._group[path]
        except KeyError as error:
            raise SchemaError(f"{self._location}: lacks {path}; write the store again") from error
        if not isinstance(found, zarr.Array):
            raise SchemaError(f"{self._location}: {path} is no array; write the store again")
        return found


def _fields_of(store: FeatureStore) -> dict[str, Json]:
    records = [store.record(slide_id) for slide_id in store.slide_ids]
    return {
        "stage": "zarr",
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "encoder": dict(records[0].encoder),
        "weights_sha256": records[0].weights_sha256,
        "slides": {record.slide_id: record.fingerprint for record in records},
    }


def _write_arrays(store: FeatureStore, target: Any) -> None:
    import zarr

    group = zarr.create_group(target, zarr_format=3)
    for name in ("features", "coords", "grid"):
        group.create_group(name)
    for slide_id in store.slide_ids:
        record = store.record(slide_id)
        rows, dimension = record.shape
        known = {name: getattr(record, name) for name in _RECORDED}
        shard_rows = min(SHARD_ROWS, max(1, -(-rows // CHUNK_ROWS)) * CHUNK_ROWS)
        array = group.create_array(
            f"features/{slide_id}",
            shape=record.shape,
            dtype=np.dtype(record.dtype),
            chunks=(CHUNK_ROWS, max(1, dimension)),
            shards=(shard_rows, max(1, dimension)),
            compressors=None,
            attributes={
                **known,
                "has_coords": record.coords_l0 is not None,
                "has_grid": record.grid is not None,
            },
        )
        features = store.bag(slide_id).features
        # A shard at a time: an object is written once, and memory stays bounded.
        for start in range(0, rows, shard_rows):
            array[start : start + shard_rows] = features[start : start + shard_rows]
        for name, positions in (("coords", record.coords_l0), ("grid", record.grid)):
            if positions is not None:
                group.create_array(
                    f"{name}/{slide_id}",
                    data=positions,
                    chunks=(max(1, rows), 2),
                    compressors=None,
                )


def _open_group(location: str) -> zarr.Group:
    import zarr
    from zarr.storage import FsspecStore, LocalStore

    target: StorePath | FsspecStore | LocalStore
    if "://" in location:
        target = FsspecStore.from_url(location, read_only=True)
    else:
        target = LocalStore(location, read_only=True)
    try:
        return zarr.open_group(target, mode="r", zarr_format=3)
    except (OSError, ValueError) as error:
        raise SchemaError(f"{location}: not a readable Zarr store ({error})") from error


def _read_marker(location: str) -> dict[str, Any]:
    if "://" not in location:
        from bagscope.artifacts import read_complete

        if not Path(location).is_dir():
            raise ArtifactError(f"{location}: no such store; write it first")
        return read_complete(Path(location))
    url = location.rstrip("/")
    files, folder = _file_system(url)
    try:
        record = json.loads(files.cat_file(f"{folder}/{COMPLETE_NAME}"))
    except FileNotFoundError as error:
        raise SchemaError(f"{url}: incomplete (no {COMPLETE_NAME}); make it again") from error
    except ValueError as error:
        raise SchemaError(f"{url}/{COMPLETE_NAME}: not readable as JSON ({error})") from error
    if not isinstance(record, dict) or not {"fields", "fingerprint", "files"} <= record.keys():
        raise SchemaError(f"{url}/{COMPLETE_NAME}: lacks fields, fingerprint or files")
    if fingerprint(record["fields"]) != record["fingerprint"]:
        raise SchemaError(f"{url}/{COMPLETE_NAME}: its fingerprint is not that of its fields")
    return record


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path within it."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ArtifactError(f"{url}: {error}; pip install 'bagscope[remote]'") from error
    return files, str(path).rstrip("/")


def _hashes(files: Any, folder: str) -> dict[str, str]:
    """Return the SHA-256 of every object of a store but its marker, by path within it."""
    found = {}
    for path in sorted(files.find(folder)):
        name = path[len(folder) :].lstrip("/")
        if name != COMPLETE_NAME:
            found[name] = hashlib.sha256(files.cat_file(path)).hexdigest()
    return found
