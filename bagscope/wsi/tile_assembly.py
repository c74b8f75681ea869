"""Cutting requested tiles out of stored ones, each stored tile prepared once.

A request is a square of the level, or of the level reduced by a whole number; it is put together
from the stored tiles that it touches. Requests are worked off in waves: the stored tiles that a
wave needs and that are not at hand are prepared, all threads at once, then its requests are
assembled, all threads at once. No thread ever waits for another's dictionary, nothing is prepared
twice, and a prepared tile is let go after its last use, or when the budget is spent.

Frames: `_gr` pixels of the grid, that is of the level after its whole-number reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bagscope.errors import ReadError
from bagscope.wsi.reading import in_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUDGET_BYTES = 128 << 20
"""What prepared tiles may weigh while a batch is read."""
KEEP_BYTES = 64 << 20
"""What prepared tiles may weigh between two batches."""
_WAVE_TILES = 24
"""Stored tiles per wave and thread: few enough to be in the cache when they are assembled."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Stored tiles as a grid: their size in grid pixels, and how many there are."""

    tile_width_gr: int
    tile_height_gr: int
    across: int
    down: int

    @property
    def tile_bytes(self) -> int:
        """Return what one prepared tile weighs."""
        return self.tile_width_gr * self.tile_height_gr * 3


@dataclass(frozen=True, slots=True)
class Requests:
    """Squares of the grid, in the order in which they are best worked off.

    Attributes:
        rows: (N,) of the batch, which request is which.
        x_gr, y_gr: (N,) top-left corners.
        columns, tile_rows: (N, 2) first and one-past-last stored tile touched, inside the grid.
        edge_gr: the squares' edge.
    """

    rows: list[int]
    x_gr: list[int]
    y_gr: list[int]
    columns: list[list[int]]
    tile_rows: list[list[int]]
    edge_gr: int

    def numbers(self, i: int, grid: TileGrid) -> list[int]:
        """Return the numbers of the stored tiles that request `i` touches."""
        (left, right), (top, bottom) = self.columns[i], self.tile_rows[i]
        return [row * grid.across + c for row in range(top, bottom) for c in range(left, right)]


def plan_requests(
    corners_gr: NDArray[np.int64], rows: NDArray[np.int64], edge_gr: int, grid: TileGrid
) -> Requests:
    """Order squares so that few prepared tiles are wanted at a time.

    They go row by row; where a whole row of the level would not fit the budget, in vertical
    stripes that do.

    Args:
        corners_gr: (N, 2) as (x, y).
        rows: (N,) row of each square in the batch.
        edge_gr: edge of a square.
        grid: the stored tiles.
    """
    x_gr, y_gr = corners_gr[:, 0], corners_gr[:, 1]
    width, height = grid.tile_width_gr, grid.tile_height_gr
    columns = np.clip(
        np.stack([x_gr // width, -(-(x_gr + edge_gr) // width)], axis=1), 0, grid.across
    )
    tile_rows = np.clip(
        np.stack([y_gr // height, -(-(y_gr + edge_gr) // height)], axis=1), 0, grid.down
    )
    tall = -(-edge_gr // height) + 1
    stripe = max(1, BUDGET_BYTES // (2 * tall * grid.tile_bytes))
    order = np.lexsort((x_gr, y_gr, columns[:, 0] // stripe))
    return Requests(
        rows=rows[order].tolist(),
        x_gr=x_gr[order].tolist(),
        y_gr=y_gr[order].tolist(),
        columns=columns[order].tolist(),
        tile_rows=tile_rows[order].tolist(),
        edge_gr=edge_gr,
    )


def assemble(
    requests: Requests,
    grid: TileGrid,
    *,
    prepare: Callable[[int], NDArray[np.uint8] | ReadError | None],
    deliver: Callable[[int, Pieces], None],
    at_hand: Mapping[int, NDArray[np.uint8] | None],
    threads: int,
) -> dict[int, NDArray[np.uint8] | None]:
    """Prepare every stored tile that is needed once, and deliver every request.

    Args:
        requests: what is wanted, in the order of `plan_requests`.
        grid: the stored tiles.
        prepare: returns a stored tile's pixels by its number, or why there are none, or None
            where it is missing and shows background; called by any thread.
        deliver: called by any thread with a row of the batch and its pieces.
        at_hand: tiles that an earlier batch left; not changed.
        threads: how many may work.

    Returns:
        The prepared tiles that the next batch in raster order will want.
    """
    count = len(requests.rows)
    prepared: dict[int, NDArray[np.uint8] | ReadError | None] = dict(at_hand)
    budget_tiles = max(BUDGET_BYTES // grid.tile_bytes, 1)
    last_use: dict[int, int] = {}
    for i in range(count):
        for number in requests.numbers(i, grid):
            last_use[number] = i
    expiring: list[list[int]] = [[] for _ in range(count)]
    for number, i in last_use.items():
        expiring[i].append(number)

    def prepare_share(numbers: Sequence[int]) -> None:
        for number in numbers:
            prepared[number] = prepare(number)

    def deliver_share(indices: Sequence[int]) -> None:
        for i in indices:
            pieces = Pieces(requests, i, grid, prepared)
            deliver(requests.rows[i], pieces)

    wave_tiles = _WAVE_TILES * threads
    lingering: list[int] = []
    start = 0
    while start < count:
        wanted: dict[int, None] = {}
        end = start
        while end < count and (end == start or len(wanted) < wave_tiles):
            for number in requests.numbers(end, grid):
                if number not in prepared:
                    wanted[number] = None
            end += 1
        in_threads(threads, list(wanted), prepare_share)
        in_threads(threads, range(start, end), deliver_share)
        for i in range(start, end):
            lingering += expiring[i]
        # A tile past its last use may still serve the next batch: it goes when room is needed.
        excess = len(prepared) - budget_tiles
        if excess > 0:
            for number in lingering[:excess]:
                prepared.pop(number, None)
            del lingering[:excess]
        start = end
    return _worth_keeping(requests, grid, prepared)


class Pieces:
    """The parts of one request, as pairs of places in stored tiles and in the request."""

    __slots__ = ("_grid", "_i", "_prepared", "_requests")

    def __init__(
        self,
        requests: Requests,
        i: int,
        grid: TileGrid,
        prepared: Mapping[int, NDArray[np.uint8] | ReadError | None],
    ) -> None:
        self._requests = requests
        self._i = i
        self._grid = grid
        self._prepared = prepared

    def paste_into(self, out: NDArray[np.uint8], background: tuple[int, int, int]) -> None:
        """Put the request together in `out` (edge, edge, 3).

        Raises:
            ReadError: one of its stored tiles could not be read.
        """
        requests, grid, i = self._requests, self._grid, self._i
        edge = requests.edge_gr
        x_gr, y_gr = requests.x_gr[i], requests.y_gr[i]
        (left, right), (top, bottom) = requests.columns[i], requests.tile_rows[i]
        width, height = grid.tile_width_gr, grid.tile_height_gr
        if (
            x_gr < left * width
            or y_gr < top * height
            or x_gr + edge > right * width
            or y_gr + edge > bottom * height
        ):
            out[...] = background
        for row in range(top, bottom):
            tile_y = row * height - y_gr
            y0, y1 = max(tile_y, 0), min(tile_y + height, edge)
            for column in range(left, right):
                pixels = self._prepared[row * grid.across + column]
                if isinstance(pixels, ReadError):
                    raise pixels
                tile_x = column * width - x_gr
                x0, x1 = max(tile_x, 0), min(tile_x + width, edge)
                if pixels is None:
                    out[y0:y1, x0:x1] = background
                else:
                    out[y0:y1, x0:x1] = pixels[y0 - tile_y : y1 - tile_y, x0 - tile_x : x1 - tile_x]


def _worth_keeping(
    requests: Requests,
    grid: TileGrid,
    prepared: Mapping[int, NDArray[np.uint8] | ReadError | None],
) -> dict[int, NDArray[np.uint8] | None]:
    """Return what the next batch will share with this one.

    The lowest stored row reached is shared by the next row of requests, the last request's tiles
    by its right neighbour.
    """
    if not requests.rows:
        return {}
    last = set(requests.numbers(len(requests.rows) - 1, grid))
    lowest_row = requests.tile_rows[-1][1] - 1
    room = KEEP_BYTES // grid.tile_bytes
    kept: dict[int, NDArray[np.uint8] | None] = {}
    for number in reversed(list(prepared)):
        pixels = prepared[number]
        if isinstance(pixels, ReadError) or len(kept) >= room:
            continue
        if number in last or number // grid.across >= lowest_row:
            kept[number] = pixels
    return dict(reversed(kept.items()))
