"""The feature store: the bags of many slides behind one door, opened when they are asked for.

A store is a folder of feature files (`features/<tiling>/<encoder>/`), or a Zarr store in a folder
or at any URL that fsspec knows (see `zarr_store`). A bag of a folder is a read-only view of its
file; chosen rows are read by themselves.
"""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import Json, canonical_json
from bagscope.errors import ArtifactError, SchemaError
from bagscope.features.feature_file import (
    TILE_ATTRIBUTES,
    FeatureFile,
    read_feature_file,
    read_rows,
)

if TYPE_CHECKING:
    from bagscope.features.side_by_side import SideBySide

OPEN_FILES = 64
"""How many feature files a store keeps open; a bag in use stays open beyond that."""

_DESCRIBED = ("mpp", "mpp_effective", "tile_px", "overlap_px", "tissue_method")

Rows = NDArray[np.integer[Any]] | Sequence[int]
FoundT = TypeVar("FoundT")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideRecord:
    """All that a store says of a slide but its vectors.

    Attributes:
        shape: (N, D) of its vectors.
        dtype: they are stored as, "float16" or "float32".
        coords_l0: (N, 2) int32, None for bags that never were a slide.
        grid: (N, 2) int32 (column, row), None where there is none.
        encoder: the encoder's spec; at least `name`.
        fields: what the fingerprint is made of.
        attributes: of the tiles (`TILE_ATTRIBUTES`), as far as they are known, as plain values.
        recorded: versions, device, batch size, ...; never compared.
        source: file or URL, for messages.
        parent: (N,) int64, the coarser tile that holds each one, of features of two resolutions.
    """

    slide_id: str
    shape: tuple[int, int]
    dtype: str
    coords_l0: NDArray[np.int32] | None
    grid: NDArray[np.int32] | None
    encoder: Mapping[str, Json]
    weights_sha256: str
    fields: Mapping[str, Json]
    fingerprint: str
    attributes: Mapping[str, Any]
    recorded: Mapping[str, Json]
    source: str
    parent: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideBag:
    """The tiles of one slide, or some of them; arrays are read-only, but for a copy's features.

    Attributes:
        features: (n, D) float16 or float32.
        coords_l0: (n, 2) int32, None for bags that never were a slide.
        grid: (n, 2) int32 (column, row), None where there is none.
        rows: (n,) int64, which of the slide's rows these are; None for all of them.
        attributes: of the tiles, as in `SlideRecord`.
    """

    slide_id: str
    features: NDArray[Any]
    coords_l0: NDArray[np.int32] | None
    grid: NDArray[np.int32] | None
    rows: NDArray[np.int64] | None
    attributes: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatientBag:
    """The tiles of a patient's slides, end to end; arrays are read-only.

    Attributes:
        slide_ids: in the order in which their tiles follow.
        features: (T, D), float32 where any slide has it.
        coords_l0: (T, 2) int32, None where any slide lacks them.
        grid: (T, 2) int32, None where any slide lacks it.
        tile_slide: (T,) int32, index into `slide_ids`.
        tile_row: (T,) int32, the row in that slide's file.
        attributes: of the tiles of each slide.
    """

    slide_ids: tuple[str, ...]
    features: NDArray[Any]
    coords_l0: NDArray[np.int32] | None
    grid: NDArray[np.int32] | None
    tile_slide: NDArray[np.int32]
    tile_row: NDArray[np.int32]
    attributes: tuple[Mapping[str, Any], ...]

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreDescription:
    """What a store holds.

    Attributes:
        encoder: the spec that all slides share.
        dtypes: number of slides by stored dtype.
        tiling: each value that occurs of mpp, tile_px, ..., in order.
    """

    encoder: Mapping[str, Json]
    weights_sha256: str
    dimension: int
    dtypes: Mapping[str, int]
    slides: int
    tiles: int
    tiling: Mapping[str, tuple[Any, ...]]

    @property
    def encoder_name(self) -> str:
        """Return the encoder's name."""
        return str(self.encoder.get("name", "unknown"))


class Backend(Protocol):
    """Where a store's slides lie. Methods may be called by several threads."""

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Return the slides, in order."""
        ...

    def record(self, slide_id: str) -> SlideRecord:
        """Return what is known of a slide."""
        ...

    def features(
        self, slide_id: str, rows: NDArray[np.int64] | None, *, copy: bool = False
    ) -> NDArray[Any]:
        """Return the vectors of a slide (N, D), or of some of its rows (n, D)."""
        ...


class FeatureStore:
    """The bags of many slides, all of one encoder; opening it opens none of them."""

    def __init__(
        self, location: str, backend: Backend, only: tuple[str, ...] | None = None
    ) -> None:
        self.location = location
        self.slide_ids = backend.slide_ids
        """The slides, in order of name."""
        self._backend = backend
        self._known = frozenset(backend.slide_ids)
        self._only = only
        self._first: SlideRecord | None = None

    @classmethod
    def open(cls, location: Path | str, only: Collection[str] | None = None) -> FeatureStore:
        """Open a folder of feature files, or a Zarr store in a folder or at a URL.

        Args:
            location: of the store; FINE::COARSE are two of aligned tilings (`aligned_store`).
            only: slides that it is to know; it then knows of no other, nor where one would lie.

        Raises:
            ArtifactError: nothing there, no features in it, or none of a slide of `only`.
            SchemaError: a Zarr store that was never completed.
        """
        from bagscope.features import aligned_store, zarr_store

        text = str(location)
        kept = None if only is None else tuple(sorted(only))
        if places := aligned_store.two_of(text):
            return cls(
                text, aligned_store.AlignedBackend(*(cls.open(p, only) for p in places)), kept
            )
        if zarr_store.is_zarr_location(text):
            return cls(text, zarr_store.ZarrBackend(text, kept), kept)
        return cls(text, FolderBackend(Path(text), kept), kept)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker opens the store anew: open files and locks are no use in another process.
        return FeatureStore.open, (self.location, self._only)

    def beside(self, *others: FeatureStore) -> SideBySide:
        """Return this store with other encoders' stores of the same tiles."""
        from bagscope.features.side_by_side import SideBySide

        return SideBySide((self, *others))

    def __len__(self) -> int:
        return len(self.slide_ids)

    def __contains__(self, slide_id: object) -> bool:
        return slide_id in self._known

    def __iter__(self) -> Iterator[SlideBag]:
        return (self.bag(slide_id) for slide_id in self.slide_ids)

    def record(self, slide_id: str) -> SlideRecord:
        """Return all that is known of a slide but its vectors.

        Raises:
            ArtifactError: no such slide.
            SchemaError: damaged, or made by another encoder than the slides seen before.
        """
        self._require(slide_id)
        record = self._backend.record(slide_id)
        if self._first is None:
            self._first = record
        elif difference := _difference(self._first, record):
            raise SchemaError(
                f"{self.location}: mixes encoders ({difference}: {self._first.source} and "
                f"{record.source}); keep one folder per encoder"
            )
        return record

    def bag(self, slide_id: str, rows: Rows | None = None, *, copy: bool = False) -> SlideBag:
        """Return a slide's bag, or the given rows of it in the given order.

        Whole bags of a folder are views of their files and copy nothing; before Python 3.13 each
        keeps its file open. With `copy` the features are read into memory of their own, which may
        be written to.

        Raises:
            ArtifactError: no such slide.
            SchemaError: damaged, or made by another encoder than the slides seen before.
            IndexError: a row that the slide does not have.
        """
        record = self.record(slide_id)
        if rows is None:
            features = self._backend.features(slide_id, None, copy=copy)
            coords_l0, grid, chosen = record.coords_l0, record.grid, None
        else:
            chosen = _row_numbers(rows, record)
            features = self._backend.features(slide_id, chosen)
            coords_l0 = None if record.coords_l0 is None else record.coords_l0[chosen]
            grid = None if record.grid is None else record.grid[chosen]
        return SlideBag(
            slide_id=slide_id,
            features=features if copy else read_only(features),
            coords_l0=read_only(coords_l0),
            grid=read_only(grid),
            rows=read_only(chosen),
            attributes=record.attributes,
        )

    def patient_bag(self, slide_ids: Sequence[str]) -> PatientBag:
        """Return the bags of several slides as one, in the given order.

        Raises:
            ValueError: no slides, or one of them twice.
            ArtifactError, SchemaError: as of `bag`.
        """
        if not slide_ids or len(set(slide_ids)) < len(slide_ids):
            raise ValueError(f"slides of a patient are {list(slide_ids)}; give each one once")
        records = [self.record(slide_id) for slide_id in slide_ids]
        counts = [record.shape[0] for record in records]
        dtype = np.result_type(*(record.dtype for record in records))
        features = np.empty((sum(counts), records[0].shape[1]), dtype)
        end = 0
        for record, count in zip(records, counts, strict=True):
            features[end : end + count] = self._backend.features(record.slide_id, None)
            end += count
        return PatientBag(
            slide_ids=tuple(slide_ids),
            features=read_only(features),
            coords_l0=_joined([record.coords_l0 for record in records]),
            grid=_joined([record.grid for record in records]),
            tile_slide=read_only(np.repeat(np.arange(len(counts), dtype=np.int32), counts)),
            tile_row=read_only(np.concatenate([np.arange(n, dtype=np.int32) for n in counts])),
            attributes=tuple(record.attributes for record in records),
        )

    def describe(self) -> StoreDescription:
        """Open every slide's record and say what the store holds.

        Raises:
            SchemaError: a slide is damaged, or encoders or weights are mixed.
        """
        dtypes: dict[str, int] = {}
        values: dict[str, set[Any]] = {name: set() for name in _DESCRIBED}
        tiles = 0
        for slide_id in self.slide_ids:
            record = self.record(slide_id)
            first = record
            tiles += record.shape[0]
            dtypes[record.dtype] = dtypes.get(record.dtype, 0) + 1
            for name in _DESCRIBED:
                if name in record.attributes:
                    values[name].add(record.attributes[name])
        return StoreDescription(
            encoder=first.encoder,
            weights_sha256=first.weights_sha256,
            dimension=first.shape[1],
            dtypes=dtypes,
            slides=len(self.slide_ids),
            tiles=tiles,
            tiling={name: tuple(sorted(found)) for name, found in values.items() if found},
        )

    def _require(self, slide_id: str) -> None:
        if slide_id not in self._known:
            near = difflib.get_close_matches(slide_id, self.slide_ids, 1)
            hint = f"did you mean {near[0]!r}?" if near else "run bagscope extract first"
            raise ArtifactError(f"{self.location}: no features of slide {slide_id!r}; {hint}")


class FolderBackend:
    """A folder of `<slide_id>.h5`; the files used last stay open."""

    def __init__(self, folder: Path, only: Sequence[str] | None = None) -> None:
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: no such feature folder; run bagscope extract first")
        self._paths = {path.stem: path for path in sorted(folder.glob("[!.]*.h5"))}
        if not self._paths:
            raise ArtifactError(f"{folder}: holds no feature files; run bagscope extract first")
        self._paths = chosen_slides(self._paths, only, str(folder))
        self._open: OrderedDict[str, tuple[FeatureFile, SlideRecord]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Return the slides, in order of name."""
        return tuple(self._paths)

    def record(self, slide_id: str) -> SlideRecord:
        """Return what the slide's file says of itself."""
        return self._opened(slide_id)[1]

    def features(
        self, slide_id: str, rows: NDArray[np.int64] | None, *, copy: bool = False
    ) -> NDArray[Any]:
        """Return a view of all vectors, or a copy of some."""
        file, _ = self._opened(slide_id)
        return file.features if rows is None and not copy else read_rows(file, rows)

    def _opened(self, slide_id: str) -> tuple[FeatureFile, SlideRecord]:
        with self._lock:
            if slide_id in self._open:
                self._open.move_to_end(slide_id)
                return self._open[slide_id]
        file = read_feature_file(self._paths[slide_id])
        if file.slide_id != slide_id:
            raise SchemaError(
                f"{file.path}: holds the features of slide {file.slide_id!r}; give the file its "
                "slide's name"
            )
        found = file, record_of(file)
        with self._lock:
            self._open[slide_id] = found
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return found


def chosen_slides(
    found: Mapping[str, FoundT], only: Sequence[str] | None, location: str
) -> dict[str, FoundT]:
    """Return what was found of the slides asked for, of all where nothing is asked.

    Raises:
        ArtifactError: a slide asked for is not there.
    """
    if only is None:
        return dict(found)
    for slide_id in only:
        if slide_id not in found:
            raise ArtifactError(
                f"{location}: no features of slide {slide_id!r}; run bagscope extract first"
            )
    return {slide_id: found[slide_id] for slide_id in only}


def record_of(file: FeatureFile) -> SlideRecord:
    """Return an opened feature file's record."""
    rows, dimension = file.features.shape
    return SlideRecord(
        slide_id=file.slide_id,
        shape=(rows, dimension),
        dtype=file.features.dtype.name,
        coords_l0=file.coords_l0,
        grid=file.grid,
        encoder=file.encoder,
        weights_sha256=file.weights_sha256,
        fields=file.fields,
        fingerprint=file.fingerprint,
        attributes={
            name: _plain(file.attributes[name])
            for name in TILE_ATTRIBUTES
            if name in file.attributes
        },
        recorded=file.recorded,
        source=str(file.path),
    )


def _plain(value: Any) -> Any:
    """Return what JSON can hold: HDF5 gives NumPy's scalars and arrays."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _difference(one: SlideRecord, other: SlideRecord) -> str:
    """Return in words why two slides are not of one encoder; empty where they are."""
    names = one.encoder.get("name"), other.encoder.get("name")
    if names[0] != names[1]:
        return f"{names[0]} and {names[1]}"
    if one.weights_sha256 != other.weights_sha256:
        return f"weights {one.weights_sha256[:12]} and {other.weights_sha256[:12]}"
    if canonical_json(one.encoder) != canonical_json(other.encoder):
        return f"two specs of {names[0]}"
    if one.shape[1] != other.shape[1]:
        return f"dimensions {one.shape[1]} and {other.shape[1]}"
    return ""


def _row_numbers(rows: Rows, record: SlideRecord) -> NDArray[np.int64]:
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise IndexError(f"{record.slide_id}: rows must be a list of whole numbers")
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < record.shape[0]:
        raise IndexError(
            f"{record.slide_id}: rows {numbers.min()} to {numbers.max()} of {record.shape[0]}"
        )
    return numbers.astype(np.int64)


def _joined(arrays: Sequence[NDArray[np.int32] | None]) -> NDArray[np.int32] | None:
    present = [array for array in arrays if array is not None]
    return read_only(np.concatenate(present)) if len(present) == len(arrays) else None


def read_only(array: Any) -> Any:
    """Return a view of an array that can't be written to; None stays None."""
    if array is not None and array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array
