"""Cutting requested tiles out of stored ones, each stored tile prepared once.

A request is a square of the level, or of the level reduced by a whole number; it is put together
from the stored tiles that it touches. Requests are worked off in waves: in each, all threads
together deliver the requests of the wave before and prepare the stored tiles of this one. Nobody
waits for another's dictionary, nothing is prepared twice, and a prepared tile's memory goes to
another one after its last use.

Frames: `_gr` pixels of the grid, that is of the level after its whole-number reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bagscope.errors import ReadError
from bagscope.wsi.reading import Crew
from bagscope.wsi.slide import Rgb

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUDGET_BYTES = 128 << 20
"""What prepared tiles may weigh while a batch is read, unless one request alone needs more."""
KEEP_BYTES = 64 << 20
"""What prepared tiles may weigh between two batches."""
_WAVE_TILES = 8
_WAVE_TILES_PER_THREAD = 32
"""Stored tiles per wave: few, so that they are still in the processor's cache when they are cut;
with several threads more, since at the end of each wave they wait for each other."""


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
    """Squares of the grid, in the order in which they are worked off.

    Attributes:
        rows: of the batch, which request is which.
        x_gr: left edges.
        y_gr: top edges.
        columns: first and one-past-last column of stored tiles touched, inside the grid.
        tile_rows: first and one-past-last row of stored tiles touched.
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
) -> list[Requests]:
    """Order squares so that few prepared tiles are wanted at a time.

    They go row by row; where the stored tiles under a whole row of squares would not fit the
    budget, the level is worked off in vertical stripes under which they do.

    Args:
        corners_gr: (N, 2) as (x, y).
        rows: (N,) row of each square in the batch.
        edge_gr: edge of a square.
        grid: the stored tiles.

    Returns:
        One entry per stripe that holds squares.
    """
    x_gr, y_gr = corners_gr[:, 0], corners_gr[:, 1]
    width, height = grid.tile_width_gr, grid.tile_height_gr
    columns = np.clip(
        np.stack([x_gr // width, -(-(x_gr + edge_gr) // width)], axis=1), 0, grid.across
    )
    tile_rows = np.clip(
        np.stack([y_gr // height, -(-(y_gr + edge_gr) // height)], axis=1), 0, grid.down
    )
    tall, wide = -(-edge_gr // height) + 1, -(-edge_gr // width) + 1
    stripe_columns = max(1, BUDGET_BYTES // (tall * grid.tile_bytes) - wide)
    stripes = columns[:, 0] // stripe_columns
    order = np.lexsort((x_gr, y_gr, stripes))
    cuts = np.flatnonzero(np.diff(stripes[order])) + 1
    return [
        Requests(
            rows=rows[part].tolist(),
            x_gr=x_gr[part].tolist(),
            y_gr=y_gr[part].tolist(),
            columns=columns[part].tolist(),
            tile_rows=tile_rows[part].tolist(),
            edge_gr=edge_gr,
        )
        for part in np.split(order, cuts)
    ]


def assemble(
    requests: Requests,
    grid: TileGrid,
    *,
    prepare: Callable[[int, NDArray[np.uint8] | None], NDArray[np.uint8] | ReadError | None],
    deliver: Callable[[int, Pieces], None],
    at_hand: Mapping[int, NDArray[np.uint8] | None],
    crew: Crew,
) -> dict[int, NDArray[np.uint8] | None]:
    """Prepare every stored tile that is needed once, and deliver every request.

    Args:
        requests: one entry of what `plan_requests` returned.
        grid: the stored tiles.
        prepare: is given a stored tile's number and, where there is one, an array of the right
            shape to fill; returns its pixels, or why there are none, or None where it is missing
            and shows background; called by any thread.
        deliver: is given a row of the batch and its pieces; called by any thread.
        at_hand: tiles that an earlier batch left; not changed.
        crew: the threads.

    Returns:
        The prepared tiles that the next batch in raster order will want.
    """
    count = len(requests.rows)
    touched = [requests.numbers(i, grid) for i in range(count)]
    last_use = {number: i for i, numbers in enumerate(touched) for number in numbers}
    prepared: dict[int, NDArray[np.uint8] | ReadError | None] = {
        number: at_hand[number] for number in last_use.keys() & at_hand.keys()
    }
    kept: dict[int, NDArray[np.uint8] | None] = {}
    idle: list[NDArray[np.uint8]] = []
    buffers: dict[int, NDArray[np.uint8]] = {}
    wave_tiles = _WAVE_TILES if crew.threads == 1 else _WAVE_TILES_PER_THREAD * crew.threads

    def work(item: tuple[bool, int]) -> None:
        is_request, index = item
        if is_request:
            deliver(requests.rows[index], Pieces(requests, index, grid, prepared))
        else:
            prepared[index] = prepare(index, buffers.pop(index, None))

    pending = range(0)
    start = 0
    while start < count or pending:
        wanted: dict[int, None] = {}
        end = start
        while end < count and len(wanted) < wave_tiles:
            wanted.update((number, None) for number in touched[end] if number not in prepared)
            end += 1
        for number in wanted:
            if not idle:
                break
            buffers[number] = idle.pop()
        crew.run([(True, i) for i in pending] + [(False, number) for number in wanted], work)
        for i in pending:
            for number in touched[i]:
                if last_use[number] != i:
                    continue
                pixels = prepared.pop(number)
                if isinstance(pixels, ReadError):
                    continue
                if _serves_next_batch(requests, grid, number):
                    kept[number] = pixels
                elif pixels is not None and number not in at_hand:
                    idle.append(pixels)
        pending, start = range(start, end), end
    room = max(1, KEEP_BYTES // grid.tile_bytes)
    return dict(list(kept.items())[-room:])


def _serves_next_batch(requests: Requests, grid: TileGrid, number: int) -> bool:
    """Return whether a batch that goes on in raster order will want a stored tile again.

    It starts to the right of the last request, in the same row of stored tiles or the next.
    """
    row, column = divmod(number, grid.across)
    top, bottom = requests.tile_rows[-1]
    return row >= bottom - 1 or (row >= top and column >= requests.columns[-1][1] - 1)


class Pieces:
    """The parts of one request: where they lie in stored tiles and in the request."""

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

    def paste_into(self, out: NDArray[np.uint8], background: Rgb) -> None:
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
