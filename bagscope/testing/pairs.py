"""Bags whose label lies in two kinds of tiles together: what no tile shows by itself.

"together": every second bag has tiles of both kinds, the others as many of one of them alone. A
score that is added up from single tiles puts the first halfway between the others.

"beside": every bag has as many of either kind. In every second bag they lie side by side on the
lattice, in the others nowhere.

Tiles are white noise about their bag's own offset, those of a kind shifted along its direction.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["together", "beside"]
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1))
_TRIES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantedPairs:
    """What `planted_pairs` made. D features, B bags.

    Attributes:
        bags: B arrays (n, D) float32, stored row by row.
        grids: B arrays (n, 2) int32, (column, row) of each tile.
        labels: (B,) int64.
        truth: B arrays (n,) bool, tiles of either kind in bags of label 1.
        directions: (2, D) of length 1, orthogonal: of either kind.
        shift: along them, in standard deviations of a tile.
    """

    kind: Kind
    bags: tuple[NDArray[np.float32], ...]
    grids: tuple[NDArray[np.int32], ...]
    labels: NDArray[np.int64]
    truth: tuple[NDArray[np.bool_], ...]
    directions: NDArray[np.float64]
    shift: float

    def __len__(self) -> int:
        return len(self.bags)

    def oracle_scores(self) -> NDArray[np.float64]:
        """Return (B,) what whoever knows the directions finds: the share of tiles that tell.

        Of "together" that of the rarer kind; of "beside" that of tiles with the other kind at
        their side.
        """
        found = []
        for bag, grid in zip(self.bags, self.grids, strict=True):
            along = bag.astype(np.float64) @ self.directions.T
            is_kind = along - np.median(along, axis=0) > self.shift / 2
            if self.kind == "together":
                found.append(is_kind.mean(axis=0).min())
            else:
                first, second = (set(map(tuple, grid[one].tolist())) for one in is_kind.T)
                found.append(sum(_is_beside(place, second) for place in first) / len(bag))
        return np.array(found)


def planted_pairs(
    kind: Kind,
    count: int = 150,
    *,
    dimension: int = 32,
    tiles: tuple[int, int] = (200, 2000),
    share: float = 0.02,
    shift: float = 6.0,
    offset: float = 0.25,
    seed: int = 0,
) -> PlantedPairs:
    """Make bags in which two kinds of tiles decide together; labels are 0, 1, 0, 1, ...

    Args:
        kind: "together" or "beside".
        count: bags.
        dimension: width of a tile's vector, at least 2.
        tiles: fewest and most of a bag; drawn evenly.
        share: of a bag's tiles that are of a kind, an even number and at least four.
        shift: of these, in standard deviations of a tile.
        offset: standard deviation of a bag's own offset, in each dimension.
        seed: of all draws.

    Raises:
        ValueError: bags too small or too full for the tiles that are to be planted.
    """
    if kind not in ("together", "beside"):
        raise ValueError(f"planted_pairs: kind is {kind!r}; it is together or beside")
    if dimension < 2 or tiles[0] < 16 or not 0 < share <= 0.1:
        raise ValueError(
            f"planted_pairs: dimension {dimension}, tiles {tiles}, share {share}; there must be 2 "
            "dimensions, 16 tiles in a bag, and a share of at most 0.1"
        )
    generator = np.random.default_rng(seed)
    directions = np.linalg.qr(generator.normal(size=(dimension, 2)))[0].T
    labels = np.arange(count) % 2
    bags, grids, truth = [], [], []
    for place, label in enumerate(labels):
        size = int(generator.integers(tiles[0], tiles[1] + 1))
        grid = square_lattice(size)
        half = max(2, round(share * size / 2))
        if kind == "together":
            of_first = half if label else 2 * half * (place // 2 % 2)
            chosen = generator.choice(size, 2 * half, replace=False).tolist()
            first, second = chosen[:of_first], chosen[of_first:]
        else:
            first, second = _beside(grid, half, bool(label), generator)
        bag = generator.standard_normal((size, dimension), np.float32)
        bag += offset * generator.standard_normal(dimension, np.float32)
        for rows, direction in zip((first, second), directions, strict=True):
            bag[rows] += (shift * direction).astype(np.float32)
        is_kind = np.zeros(size, np.bool_)
        is_kind[[*first, *second]] = bool(label)
        bags.append(bag)
        grids.append(grid)
        truth.append(is_kind)
    return PlantedPairs(
        kind=kind,
        bags=tuple(bags),
        grids=tuple(grids),
        labels=labels,
        truth=tuple(truth),
        directions=directions,
        shift=shift,
    )


def square_lattice(size: int) -> NDArray[np.int32]:
    """Return (size, 2) places, row by row on a square whose last row may be cut short."""
    edge = int(np.ceil(np.sqrt(size)))
    rows, columns = np.divmod(np.arange(size), edge)
    return np.stack([columns, rows], axis=1).astype(np.int32)


def _beside(
    grid: NDArray[np.int32], half: int, side_by_side: bool, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return the rows of either kind: pairs of neighbours, or no two neighbours of two kinds."""
    row_of = {tuple(place): row for row, place in enumerate(grid.tolist())}
    for _ in range(_TRIES):
        first: dict[tuple[int, ...], int] = {}
        second: dict[tuple[int, ...], int] = {}
        for row in generator.permutation(len(grid)).tolist():
            place = tuple(grid[row].tolist())
            if len(first) == half and len(second) == half:
                return list(first.values()), list(second.values())
            if place in first or place in second:
                continue
            if side_by_side:
                dx, dy = _SIDES[int(generator.integers(4))]
                other = (place[0] + dx, place[1] + dy)
                if other in row_of and other not in first and other not in second:
                    first[place], second[other] = row, row_of[other]
            elif len(first) <= len(second):
                if not _is_beside(place, second):
                    first[place] = row
            elif not _is_beside(place, first):
                second[place] = row
    raise ValueError(f"planted_pairs: no room for {2 * half} tiles in a bag of {len(grid)}")


def _is_beside(place: tuple[int, ...], others: Collection[tuple[int, ...]]) -> bool:
    return any((place[0] + dx, place[1] + dy) in others for dx, dy in _SIDES)
