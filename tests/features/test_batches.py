"""Batches: whatever goes in comes out once, with its own vector, in batches of one shape."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagscope.features.batches import Batcher, Encoded
from bagscope.features.session import Pending

EDGE = 2


@dataclass
class Summing:
    """A session whose vector of a tile is its first byte and its sum; may run out of memory."""

    batch_size: int
    fits: int = 1000
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    shrunk: int = 0
    running: int = 0
    most_running: int = 0

    def new_batch(self) -> torch.Tensor:
        # Filled with what must never be seen: padding is the batcher's business.
        return torch.full((self.batch_size, EDGE, EDGE, 3), 255, dtype=torch.uint8)

    def submit(self, tiles: torch.Tensor) -> Pending:
        if len(tiles) > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        self.shapes.append(tuple(tiles.shape))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        flat = tiles.reshape(len(tiles), -1).float()

        def done() -> None:
            self.running -= 1

        return Pending(output=torch.stack([flat[:, 0], flat.sum(dim=1)], dim=1), done=done)

    def collect(self, pending: Pending) -> np.ndarray:
        pending.done()
        vectors: np.ndarray = pending.output.numpy()
        return vectors

    def encode(self, tiles: torch.Tensor) -> np.ndarray:
        return self.collect(self.submit(tiles))

    def shrink(self) -> None:
        self.batch_size //= 2
        self.shrunk += 1


def tiles_of(seed: int, count: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, EDGE, EDGE, 3), dtype=np.uint8)


class Collected:
    """Vectors by owner and row, each at most once."""

    def __init__(self) -> None:
        self.rows: dict[tuple[object, int], np.ndarray] = {}

    def take(self, parts: list[Encoded[object]]) -> None:
        for part in parts:
            for offset, vector in enumerate(part.vectors):
                place = (part.owner, part.start + offset)
                assert place not in self.rows
                self.rows[place] = vector.copy()


def put(batcher: Batcher[object], owner: object, tiles: np.ndarray, found: Collected) -> None:
    start = 0
    while start < len(tiles):
        count = batcher.add(owner, start, tiles[start:])
        assert count > 0
        start += count
        if batcher.is_full:
            found.take(list(batcher.run()))


def finish(batcher: Batcher[object], found: Collected) -> None:
    while not batcher.is_idle:
        found.take(list(batcher.run()))
        found.take(list(batcher.flush()))


def require_all(found: Collected, given_tiles: dict[object, np.ndarray]) -> None:
    expected = {
        (owner, row): np.array([tile.flat[0], tile.sum()], np.float32)
        for owner, tiles in given_tiles.items()
        for row, tile in enumerate(tiles)
    }
    assert found.rows.keys() == expected.keys()
    for place, vector in expected.items():
        np.testing.assert_array_equal(found.rows[place], vector)


@given(
    counts=st.lists(st.integers(0, 20), max_size=8),
    batch_size=st.integers(1, 9),
    fits=st.integers(1, 12),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_every_tile_comes_out_once_with_its_own_vector(
    counts: list[int], batch_size: int, fits: int, device: str
) -> None:
    # On "cuda" a batch is collected when the next one runs; the stand-in needs no such device.
    session = Summing(batch_size, fits, torch.device(device))
    batcher: Batcher[object] = Batcher(session)  # type: ignore[arg-type]
    found, everything = Collected(), {}
    for owner, count in enumerate(counts):
        everything[owner] = tiles_of(owner, count)
        put(batcher, owner, everything[owner], found)
    finish(batcher, found)
    require_all(found, everything)
    assert batcher.is_idle
    if fits >= batch_size:
        assert not session.shrunk
        assert set(session.shapes) <= {(batch_size, EDGE, EDGE, 3)}
        assert len(session.shapes) == -(-sum(counts) // batch_size)
    assert session.most_running <= 2


def test_padding_is_black_and_never_the_last_batchs_rest() -> None:
    seen: list[torch.Tensor] = []

    class Keeping(Summing):
        def submit(self, tiles: torch.Tensor) -> Pending:
            seen.append(tiles.clone())
            return super().submit(tiles)

    batcher: Batcher[object] = Batcher(Keeping(4))  # type: ignore[arg-type]
    found = Collected()
    put(batcher, "a", np.full((6, EDGE, EDGE, 3), 7, np.uint8), found)
    finish(batcher, found)
    assert (seen[0] == 7).all()
    assert (seen[1][:2] == 7).all()
    assert (seen[1][2:] == 0).all()


@pytest.mark.parametrize("filled", [5, 8, 3])
def test_a_session_that_another_line_of_batches_shrank(filled: int) -> None:
    session = Summing(8)
    one: Batcher[object] = Batcher(session)  # type: ignore[arg-type]
    found = Collected()
    everything: dict[object, np.ndarray] = {"a": tiles_of(1, filled), "b": tiles_of(2, 9)}
    one.add("a", 0, everything["a"])
    session.shrink()
    session.fits = session.batch_size
    if one.is_full:
        found.take(list(one.run()))
    put(one, "b", everything["b"], found)
    finish(one, found)
    require_all(found, everything)
    assert max(shape[0] for shape in session.shapes) == 4


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    class Broken(Summing):
        def submit(self, tiles: torch.Tensor) -> Pending:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    batcher: Batcher[object] = Batcher(Broken(2))  # type: ignore[arg-type]
    batcher.add("a", 0, tiles_of(0, 2))
    with pytest.raises(RuntimeError, match="multiplied"):
        list(batcher.run())


def test_what_was_running_is_not_lost_when_memory_runs_out() -> None:
    session = Summing(4, device=torch.device("cuda"))
    batcher: Batcher[object] = Batcher(session)  # type: ignore[arg-type]
    found = Collected()
    everything: dict[object, np.ndarray] = {"a": tiles_of(1, 4), "b": tiles_of(2, 4)}
    put(batcher, "a", everything["a"], found)
    assert not found.rows, "it is collected when the next batch is on its way"
    session.fits = 3
    put(batcher, "b", everything["b"], found)
    finish(batcher, found)
    require_all(found, everything)
