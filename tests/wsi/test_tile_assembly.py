"""Assembly against plain cropping of a picture that is all there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.errors import ReadError
from bagscope.wsi import tile_assembly
from bagscope.wsi.reading import Crew
from bagscope.wsi.tile_assembly import TileGrid, TileStore, assemble, plan_assembly

GROUND = (7, 8, 9)
MARGIN = 400


class Picture:
    """A picture cut into stored tiles; some missing, some damaged; counts what is decoded."""

    def __init__(self, grid, missing=(), damaged=()):
        self.grid, self.missing, self.damaged = grid, set(missing), set(damaged)
        rng = np.random.default_rng(0)
        height, width = grid.down * grid.tile_height_gr, grid.across * grid.tile_width_gr
        self.pixels = rng.integers(10, 255, (height, width, 3), dtype=np.uint8)
        self.decoded = []
        self.canvas = np.empty((height + 2 * MARGIN, width + 2 * MARGIN, 3), np.uint8)
        self.canvas[...] = GROUND
        self.canvas[MARGIN : MARGIN + height, MARGIN : MARGIN + width] = self.pixels
        for number in self.missing:
            self.canvas[MARGIN:, MARGIN:][self.place(number)] = GROUND

    def place(self, number):
        row, column = divmod(number, self.grid.across)
        height, width = self.grid.tile_height_gr, self.grid.tile_width_gr
        return (
            slice(row * height, (row + 1) * height),
            slice(column * width, (column + 1) * width),
        )

    def fill(self, number, out):
        self.decoded.append(number)
        if number in self.damaged:
            out[...] = 128
            raise ReadError("damaged")
        if number in self.missing:
            return False
        out[...] = self.pixels[self.place(number)]
        return True

    def crop(self, x, y, edge):
        return self.canvas[y + MARGIN : y + MARGIN + edge, x + MARGIN : x + MARGIN + edge]

    def touched(self, x, y, edge):
        return {
            n
            for n in range(self.grid.across * self.grid.down)
            for rows, columns in [self.place(n)]
            if rows.start < y + edge and rows.stop > y and columns.start < x + edge
            if columns.stop > x
        }


def read(picture, corners, edge, threads=1, store=None):
    squares = np.zeros((len(corners), edge, edge, 3), np.uint8)
    with Crew(threads) as crew:
        faults = assemble(
            plan_assembly(np.array(corners, np.int64).reshape(-1, 2), edge, picture.grid),
            picture.grid,
            squares,
            list(range(len(corners))),
            fill=picture.fill,
            background=GROUND,
            store=store if store is not None else TileStore(),
            crew=crew,
        )
    return squares, faults


grids = st.builds(
    TileGrid,
    tile_width_gr=st.integers(1, 40),
    tile_height_gr=st.integers(1, 40),
    across=st.integers(1, 6),
    down=st.integers(1, 6),
)
corner_lists = st.lists(st.tuples(st.integers(-90, 250), st.integers(-90, 250)), max_size=12)


@given(grid=grids, corners=corner_lists, edge=st.integers(1, 80), data=st.data())
def test_squares_equal_plain_crops_and_no_tile_is_decoded_twice(grid, corners, edge, data):
    numbers = st.lists(st.integers(0, grid.across * grid.down - 1), max_size=4)
    picture = Picture(grid, data.draw(numbers), data.draw(numbers))
    squares, faults = read(picture, corners, edge, threads=data.draw(st.integers(1, 3)))
    for i, (x, y) in enumerate(corners):
        spoilt = bool(picture.touched(x, y, edge) & picture.damaged)
        assert (i in faults) == spoilt
        if not spoilt:
            assert np.array_equal(squares[i], picture.crop(x, y, edge))
    assert len(picture.decoded) == len(set(picture.decoded))
    assert set(picture.decoded) == set().union(*(picture.touched(*c, edge) for c in corners))


@given(grid=grids, batches=st.lists(corner_lists, max_size=5), edge=st.integers(1, 60))
def test_a_store_never_changes_what_is_read(grid, batches, edge):
    picture, store = Picture(grid), TileStore()
    for corners in batches:
        squares, _ = read(picture, corners, edge, threads=2, store=store)
        for square, (x, y) in zip(squares, corners, strict=True):
            assert np.array_equal(square, picture.crop(x, y, edge))


@pytest.mark.parametrize("per_batch", [1, 3, 7, 100])
def test_batches_in_raster_order_share_their_stored_tiles(per_batch):
    picture, store = Picture(TileGrid(16, 16, 12, 9)), TileStore()
    corners = [(x * 16 + 5, y * 16 + 9) for y in range(8) for x in range(11)]
    for start in range(0, len(corners), per_batch):
        read(picture, corners[start : start + per_batch], 16, store=store)
    assert len(picture.decoded) == len(set(picture.decoded)) == 12 * 9


def test_a_store_holds_no_more_than_its_budget(monkeypatch):
    grid = TileGrid(16, 16, 12, 9)
    monkeypatch.setattr(tile_assembly, "KEEP_BYTES", 3 * grid.tile_bytes)
    picture, store = Picture(grid), TileStore()
    for y in range(8):
        read(picture, [(x * 16 + 5, y * 16 + 9) for x in range(11)], 16, store=store)
        assert len(store.tiles) + len(store.idle) <= 3


def test_whole_tiles_are_not_kept():
    picture, store = Picture(TileGrid(16, 16, 4, 4)), TileStore()
    read(picture, [(x * 16, y * 16) for y in range(4) for x in range(4)], 16, store=store)
    assert not store.tiles


def test_the_first_fault_by_number_is_the_one_that_is_told():
    class Damaged(Picture):
        def fill(self, number, out):
            raise ReadError(f"tile {number}")

    _, faults = read(Damaged(TileGrid(16, 16, 4, 4)), [(8, 8)], 16, threads=3)
    assert str(faults[0]) == "tile 0"
