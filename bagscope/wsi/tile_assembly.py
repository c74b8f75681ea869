"""Cutting requested squares out of stored tiles, each stored tile decoded once.

Work goes by stored tile and not by request: a tile is decoded into memory that is still in the
processor's cache, and every part of it that some request shows is copied to its place at once.
So no decoded tile has to be kept while a batch is read, threads share nothing that they change
but disjoint places of the result, and nobody waits for anybody. Only tiles that the next batch
will want as well, when batches go over a slide in raster order, outlast a batch.

Frames: `_gr` pixels of the grid, that is of the level after its whole-number reduction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bagscope.errors import ReadError
from bagscope.wsi.jpeg_stream import cached_buffer
from bagscope.wsi.slide import Rgb

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bagscope.wsi.reading import Crew

KEEP_BYTES = 64 << 20
"""What decoded tiles may weigh between two batches."""

Fill = Callable[[int, "NDArray[np.uint8]"], bool]
"""Fills an array with a stored tile by its number; false where the tile is missing."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Stored tiles as a grid: their size in grid pixels, and how many there are."""

    tile_width_gr: int
    tile_height_gr: int
    across: int
    down: int

    @property
    def tile_bytes(self) -> int:
        """Return what a decoded tile weighs."""
        return self.tile_width_gr * self.tile_height_gr * 3


class Piece(NamedTuple):
    """A part of a stored tile that is a part of a request: the same rectangle in both."""

    request: int
    in_request: tuple[slice, slice]
    in_tile: tuple[slice, slice]


class Frontier(NamedTuple):
    """How far a batch in raster order has come, in rows and columns of stored tiles.

    The next batch goes on to the right of the last request, in its rows or in the ones below.
    """

    top: int
    bottom: int
    right: int

    def is_ahead(self, number: int, grid: TileGrid) -> bool:
        """Return whether the next batches may want a stored tile."""
        row, column = divmod(number, grid.across)
        return row >= self.bottom or (row >= self.top and column >= self.right)


@dataclass(frozen=True, slots=True)
class Assembly:
    """Which parts of which stored tiles make up a batch of squares.

    Attributes:
        pieces: stored tile's number → its pieces, in the order in which they are best decoded.
        partly_outside: requests that reach beyond the grid.
        frontier: how far the batch goes.
        wanted_next: numbers that a batch going on from there will want again.
    """

    pieces: dict[int, list[Piece]]
    partly_outside: list[int]
    frontier: Frontier
    wanted_next: frozenset[int]


class TileStore:
    """Decoded tiles and spare memory that outlast a batch.

    Whoever reads takes the store away from the slide and gives it back afterwards, so that two
    readers never share one: a tile's memory is used again for another tile.

    Attributes:
        tiles: number → pixels, None where the tile is missing.
        idle: arrays of the tiles' shape, free to be filled.
    """

    __slots__ = ("idle", "tiles")

    def __init__(self) -> None:
        self.tiles: dict[int, NDArray[np.uint8] | None] = {}
        self.idle: list[NDArray[np.uint8]] = []

    def replace(self, tiles: dict[int, NDArray[np.uint8] | None], grid: TileGrid) -> None:
        """Hold other tiles, as many as `KEEP_BYTES` allow, the lowest in the level first."""
        room = max(1, KEEP_BYTES // grid.tile_bytes)
        held = dict(sorted(tiles.items())[-room:])
        old = [pixels for number, pixels in self.tiles.items() if number not in held]
        self.idle += [pixels for pixels in old if pixels is not None]
        self.tiles = held
        del self.idle[max(0, room - len(held)) :]


def plan_assembly(corners_gr: NDArray[np.int64], edge_gr: int, grid: TileGrid) -> Assembly:
    """Find the stored tiles under squares of the grid.

    Args:
        corners_gr: (N, 2) as (x, y), in any order; may lie outside the grid.
        edge_gr: edge of a square.
        grid: the stored tiles.
    """
    size = np.array([grid.tile_width_gr, grid.tile_height_gr])
    count = np.array([grid.across, grid.down])
    first = corners_gr // size
    last = (corners_gr + edge_gr - 1) // size
    outside = (first < 0).any(axis=1) | (last >= count).any(axis=1)
    spans = (last - first).max(axis=0, initial=0) + 1
    found = []
    for row in range(int(spans[1])):
        for column in range(int(spans[0])):
            tile = first + np.array([column, row])
            inside = ((tile <= last) & (tile >= 0) & (tile < count)).all(axis=1)
            request = np.flatnonzero(inside)
            tile = tile[inside]
            number = tile[:, 1] * grid.across + tile[:, 0]
            # Where the stored tile's corner lies in the request.
            corner = tile * size - corners_gr[inside]
            start = np.maximum(corner, 0)
            stop = np.minimum(corner + size, edge_gr)
            found.append(np.column_stack([number, request, start, stop, start - corner]))
    rows = np.concatenate(found) if found else np.zeros((0, 8), np.int64)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    pieces: dict[int, list[Piece]] = {number: [] for number in rows[:, 0].tolist()}
    for number, request, x0, y0, x1, y1, tile_x, tile_y in rows.tolist():
        in_tile = slice(tile_y, tile_y + y1 - y0), slice(tile_x, tile_x + x1 - x0)
        pieces[number].append(Piece(request, (slice(y0, y1), slice(x0, x1)), in_tile))
    frontier = Frontier(0, 0, 0)
    if len(corners_gr):
        final = np.lexsort((corners_gr[:, 0], corners_gr[:, 1]))[-1]
        right, bottom = last[final].tolist()
        frontier = Frontier(int(first[final, 1]), bottom, right)
    whole = _whole_tile(grid)
    return Assembly(
        pieces=pieces,
        partly_outside=np.flatnonzero(outside).tolist(),
        frontier=frontier,
        # A tile that one request shows whole is not expected to be wanted by another.
        wanted_next=frozenset(
            number
            for number, parts in pieces.items()
            if frontier.is_ahead(number, grid)
            and not (len(parts) == 1 and parts[0].in_tile == whole)
        ),
    )


def _whole_tile(grid: TileGrid) -> tuple[slice, slice]:
    return slice(0, grid.tile_height_gr), slice(0, grid.tile_width_gr)


def assemble(
    assembly: Assembly,
    grid: TileGrid,
    squares: NDArray[np.uint8],
    rows: list[int],
    *,
    fill: Fill,
    background: Rgb,
    store: TileStore,
    crew: Crew,
) -> dict[int, ReadError]:
    """Decode every stored tile of a batch once, and put its pieces into place.

    Args:
        assembly: what `plan_assembly` returned.
        grid: the stored tiles.
        squares: (M, edge, edge, 3) uint8, C-contiguous; request i goes to `squares[rows[i]]`.
        rows: (N,) where each request goes.
        fill: decodes a stored tile; called by any thread.
        background: the colour where nothing is stored.
        store: what an earlier batch left; afterwards, what the next one will want.
        crew: the threads.

    Returns:
        Request → why it can't be shown, for those over stored tiles that could not be read.
    """
    for request in assembly.partly_outside:
        squares[rows[request]] = background
    local = threading.local()
    faults: dict[int, ReadError] = {}
    # What earlier batches left and this one did not touch may still lie ahead.
    kept = {
        number: pixels
        for number, pixels in store.tiles.items()
        if number not in assembly.pieces and assembly.frontier.is_ahead(number, grid)
    }
    buffers = {
        number: store.idle.pop()
        if store.idle
        else cached_buffer(grid.tile_height_gr, grid.tile_width_gr)
        for number in assembly.wanted_next
        if number not in store.tiles
    }
    whole = _whole_tile(grid)

    def place(number: int, parts: list[Piece]) -> None:
        if number in store.tiles:
            pixels = store.tiles[number]
        else:
            buffer = buffers.get(number)
            if buffer is None and len(parts) == 1 and parts[0].in_tile == whole:
                square = squares[rows[parts[0].request]]
                if not fill(number, square[parts[0].in_request]):
                    square[parts[0].in_request] = background
                return
            if buffer is None:
                buffer = getattr(local, "tile", None)
            if buffer is None:
                buffer = local.tile = cached_buffer(grid.tile_height_gr, grid.tile_width_gr)
            pixels = buffer if fill(number, buffer) else None
        if number in assembly.wanted_next:
            kept[number] = pixels
        for part in parts:
            square = squares[rows[part.request]]
            square[part.in_request] = background if pixels is None else pixels[part.in_tile]

    def work(item: tuple[int, list[Piece]]) -> None:
        number, parts = item
        try:
            place(number, parts)
        except ReadError as error:
            faults[number] = error

    crew.run(assembly.pieces.items(), work)
    store.replace(kept, grid)
    return {
        part.request: faults[number]
        for number in sorted(faults, reverse=True)
        for part in assembly.pieces[number]
    }
