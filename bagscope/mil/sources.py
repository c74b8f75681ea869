"""Where bags come from: a feature store, or arrays in memory. Nothing is read before it is asked.

A source holds the cases that it may give and no others; its store knows no other slides. What is
handed to a trainer can therefore not lead to a case that was held back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import ArtifactError
from bagscope.features.store import FeatureStore
from bagscope.mil.cases import Case

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseBag:
    """The tiles of one case, or some of them.

    Attributes:
        features: (n, D) float16 or float32, in memory that may be written to.
        coords_l0: (n, 2) int32, None where any slide has none.
        grid: (n, 2) int32 (column, row), None where any slide has none.
        parent: (n,) int64, which coarser tile of the case holds each tile; None where the features
            are of one resolution.
        slide_ids: the case's slides.
        tile_slide: (n,) int32, index into `slide_ids`.
        tile_row: (n,) int32, the row in that slide's feature file.
        tile_um: (slides,) side of a tile in micrometres, NaN where it is not known.
        mpp_l0: (slides,) micrometres per level-0 pixel, NaN where it is not known.
    """

    case: Case
    features: NDArray[Any]
    coords_l0: NDArray[np.int32] | None
    grid: NDArray[np.int32] | None
    slide_ids: tuple[str, ...]
    tile_slide: NDArray[np.int32]
    tile_row: NDArray[np.int32]
    tile_um: NDArray[np.float64]
    mpp_l0: NDArray[np.float64]
    parent: NDArray[np.int64] | None = None


class BagSource(Protocol):
    """Bags by their place in `cases`. `read` may be called by several threads."""

    @property
    def cases(self) -> tuple[Case, ...]:
        """Return the cases that there are."""
        ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tiles of each case."""
        ...

    @property
    def dimension(self) -> int:
        """Return the width of a tile's vector."""
        ...

    def grid(self, index: int) -> NDArray[np.int32] | None:
        """Return the case's (column, row) of each tile, None where there is none."""
        ...

    def parent(self, index: int) -> NDArray[np.int64] | None:
        """Return which coarser tile holds each of the case's, None where there are none."""
        ...

    def read(self, index: int, rows: Rows | None = None) -> CaseBag:
        """Return a case's bag, or the given rows of it."""
        ...


class StoreSource:
    """Cases whose tiles lie in a feature store."""

    def __init__(self, store: FeatureStore, cases: Sequence[Case]) -> None:
        """Take a store that knows the cases' slides, and best no others.

        Raises:
            ArtifactError: a case without a single tile; names them.
        """
        self._store = store
        self._cases = tuple(cases)
        counts = {
            slide_id: store.record(slide_id).shape
            for case in self._cases
            for slide_id in case.slide_ids
        }
        self._lengths = np.array(
            [sum(counts[slide_id][0] for slide_id in case.slide_ids) for case in self._cases],
            np.int64,
        )
        empty = [
            case.case_id for case in self._cases if not sum(counts[s][0] for s in case.slide_ids)
        ]
        if empty:
            raise ArtifactError(
                f"{store.location}: {', '.join(empty[:10])} ({len(empty)} in all) have no tiles; "
                "leave them out of the table, or tile them with a lower min_tissue"
            )
        self._dimension = next(iter(counts.values()))[1] if counts else 0

    @property
    def cases(self) -> tuple[Case, ...]:
        """Return the cases that there are."""
        return self._cases

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tiles of each case."""
        return self._lengths

    @property
    def dimension(self) -> int:
        """Return the width of a tile's vector."""
        return self._dimension

    def grid(self, index: int) -> NDArray[np.int32] | None:
        """Return the case's (column, row) of each tile; slides of a patient lie side by side."""
        return _side_by_side(
            [self._store.record(slide_id).grid for slide_id in self._cases[index].slide_ids]
        )

    def parent(self, index: int) -> NDArray[np.int64] | None:
        """Return which coarser tile holds each of the case's; no two slides share one."""
        found, begin = [], 0
        for slide_id in self._cases[index].slide_ids:
            own = self._store.record(slide_id).parent
            if own is None:
                return None
            found.append(own.astype(np.int64) + begin)
            begin += int(own.max()) + 1 if len(own) else 0
        return np.concatenate(found)

    def read(self, index: int, rows: Rows | None = None) -> CaseBag:
        """Return a case's bag, or the given rows of it, in rising order of slides."""
        case = self._cases[index]
        records = [self._store.record(slide_id) for slide_id in case.slide_ids]
        starts = np.cumsum([0, *(record.shape[0] for record in records)])
        chosen = [
            None if rows is None else rows[(rows >= low) & (rows < high)] - low
            for low, high in itertools.pairwise(starts)
        ]
        bags = [
            self._store.bag(record.slide_id, part, copy=True)
            for record, part in zip(records, chosen, strict=True)
        ]
        counts = [len(bag) for bag in bags]
        tile_row = [
            np.arange(count) if part is None else part
            for count, part in zip(counts, chosen, strict=True)
        ]
        features = [bag.features for bag in bags]
        parent = self.parent(index)
        if parent is not None and rows is not None:
            parent = np.concatenate(
                [parent[start:][part] for start, part in zip(starts, chosen, strict=False)]
            )
        return CaseBag(
            case=case,
            features=features[0] if len(features) == 1 else np.concatenate(features),
            coords_l0=_joined([bag.coords_l0 for bag in bags]),
            grid=_side_by_side([bag.grid for bag in bags]),
            slide_ids=case.slide_ids,
            tile_slide=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            tile_row=np.concatenate(tile_row).astype(np.int32),
            tile_um=np.array([_tile_um(record.attributes) for record in records]),
            mpp_l0=np.array([_number(record.attributes, "mpp") for record in records]),
            parent=parent,
        )


class ArraySource:
    """Bags that are arrays in memory, as a scikit-learn user has them."""

    def __init__(
        self,
        bags: Sequence[NDArray[Any]],
        cases: Sequence[Case],
        *,
        grids: Sequence[NDArray[np.int32]] | None = None,
        parents: Sequence[NDArray[np.int64]] | None = None,
        tile_um: float = math.nan,
    ) -> None:
        """Take one (n, D) array per case.

        Args:
            bags: of the cases.
            cases: as many.
            grids: (n, 2) int32 (column, row) of each bag's tiles, where they lie on a lattice.
            parents: (n,) which coarser tile holds each of a bag's, where vectors are of two
                resolutions.
            tile_um: side of a tile in micrometres; with a lattice, tiles then have coordinates.

        Raises:
            ValueError: no bags, an empty one, widths that differ, or values that are not finite.
        """
        self._bags = [np.asarray(bag) for bag in bags]
        self._cases = tuple(cases)
        self._grids = None if grids is None else [np.asarray(grid, np.int32) for grid in grids]
        self._parents = None if parents is None else [np.asarray(one, np.int64) for one in parents]
        self._tile_um = tile_um
        shapes = [(len(bag), 2) for bag in self._bags]
        if self._grids is not None and [grid.shape for grid in self._grids] != shapes:
            raise ValueError("grids must hold a (column, row) for every tile of every bag")
        if len(self._bags) != len(self._cases) or not self._bags:
            raise ValueError(f"{len(self._bags)} bags and {len(self._cases)} cases; give as many")
        width = self._bags[0].shape[-1]
        for place, bag in enumerate(self._bags):
            if bag.ndim != 2 or not len(bag) or bag.shape[1] != width:
                raise ValueError(
                    f"bag {place} is {bag.shape}; every bag must be (tiles, {width}) with at least "
                    "one tile"
                )
            if bag.dtype.kind != "f" or not np.isfinite(bag).all():
                raise ValueError(
                    f"bag {place} holds {bag.dtype} values that are not all finite numbers; pass "
                    "float arrays without NaN"
                )

    @property
    def cases(self) -> tuple[Case, ...]:
        """Return the cases that there are."""
        return self._cases

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tiles of each case."""
        return np.array([len(bag) for bag in self._bags], np.int64)

    @property
    def dimension(self) -> int:
        """Return the width of a tile's vector."""
        return int(self._bags[0].shape[1])

    def grid(self, index: int) -> NDArray[np.int32] | None:
        """Return the (column, row) of each tile; None where no lattice was given."""
        return None if self._grids is None else self._grids[index]

    def parent(self, index: int) -> NDArray[np.int64] | None:
        """Return which coarser tile holds each of the bag's; None where none were given."""
        return None if self._parents is None else self._parents[index]

    def read(self, index: int, rows: Rows | None = None) -> CaseBag:
        """Return a bag, or the given rows of it."""
        bag = self._bags[index]
        case = self._cases[index]
        numbers = np.arange(len(bag)) if rows is None else rows
        grid = None if self._grids is None else self._grids[index][numbers]
        has_size = not math.isnan(self._tile_um)
        return CaseBag(
            case=case,
            features=bag if rows is None else bag[rows],
            # A pixel for every micrometre, so that a tile is as many pixels wide.
            coords_l0=(grid * self._tile_um).astype(np.int32)
            if grid is not None and has_size
            else None,
            grid=grid,
            slide_ids=(case.case_id,),
            tile_slide=np.zeros(len(numbers), np.int32),
            tile_row=numbers.astype(np.int32),
            tile_um=np.array([self._tile_um]),
            mpp_l0=np.array([1.0 if has_size else math.nan]),
            parent=None if self._parents is None else self._parents[index][numbers],
        )


def _tile_um(attributes: Any) -> float:
    return _number(attributes, "tile_px") * _number(attributes, "mpp_effective")


def _number(attributes: Any, name: str) -> float:
    value = attributes.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _joined(arrays: Sequence[NDArray[np.int32] | None]) -> NDArray[np.int32] | None:
    present = [array for array in arrays if array is not None]
    if len(present) < len(arrays):
        return None
    return present[0] if len(present) == 1 else np.concatenate(present)


def _side_by_side(grids: Sequence[NDArray[np.int32] | None]) -> NDArray[np.int32] | None:
    """Return several slides' lattices as one, so that no two tiles share a place."""
    present = [grid for grid in grids if grid is not None]
    if len(present) < len(grids):
        return None
    moved, begin = [], 0
    for grid in present:
        moved.append(grid + np.array([begin, 0], np.int32) if begin else grid)
        begin += int(grid[:, 0].max()) + 2 if len(grid) else 0
    return _joined(moved)
