from __future__ import annotations

import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import pytest

from bagscope.errors import ArtifactError
from bagscope.features.feature_file import (
    FeatureHeader,
    FeatureWriter,
    Float16Overflow,
    read_feature_file,
)
from bagscope.features.sink import FeatureSink, Stored


def writer_of(path: Path, rows: int = 6) -> FeatureWriter:
    header = FeatureHeader(
        slide_id=path.stem,
        fields={"stage": "extract"},
        encoder={"name": "demo"},
        weights_sha256="0" * 64,
        coords_l0=np.arange(2 * rows, dtype=np.int32).reshape(rows, 2),
    )
    return FeatureWriter(path, header, rows=rows, dimension=3)


def vectors(rows: int = 6, value: float = 1.0) -> np.ndarray:
    return np.full((rows, 3), value, np.float32)


@pytest.fixture
def told() -> SimpleQueue[Stored]:
    return SimpleQueue()


def test_a_file_is_stored_in_the_order_of_its_orders(
    tmp_path: Path, told: SimpleQueue[Stored]
) -> None:
    sink = FeatureSink(told.put)
    writers = {name: writer_of(tmp_path / f"{name}.h5") for name in "abc"}
    for value, (name, writer) in enumerate(writers.items()):
        sink.write(name, writer, 3, vectors(3, value + 0.5))
        sink.write(name, writer, 0, vectors(3, value))
    for name, writer in writers.items():
        sink.finish(name, writer, None)
    found = [told.get(timeout=10) for _ in range(3)]
    sink.close()
    assert [(stored.key, stored.error) for stored in found] == [(n, None) for n in "abc"]
    for value, name in enumerate("abc"):
        features = read_feature_file(tmp_path / f"{name}.h5").features
        assert features[:, 0].tolist() == [value] * 3 + [value + 0.5] * 3


def test_rows_that_are_not_readable_are_left_out(tmp_path: Path, told: SimpleQueue[Stored]) -> None:
    sink = FeatureSink(told.put)
    writer = writer_of(tmp_path / "a.h5")
    sink.write("a", writer, 0, vectors())
    sink.finish("a", writer, np.array([True, False, True, True, False, True]))
    assert told.get(timeout=10).error is None
    sink.close()
    found = read_feature_file(tmp_path / "a.h5")
    assert found.coords_l0 is not None
    assert found.coords_l0[:, 0].tolist() == [0, 4, 6, 10]


def test_an_error_is_told_once_and_the_other_files_go_on(
    tmp_path: Path, told: SimpleQueue[Stored]
) -> None:
    sink = FeatureSink(told.put)
    bad, good = writer_of(tmp_path / "bad.h5"), writer_of(tmp_path / "good.h5")
    sink.write("bad", bad, 0, vectors(3, 1e6))
    sink.write("bad", bad, 3, vectors(3, 1e6))
    sink.finish("bad", bad, None)
    sink.write("good", good, 0, vectors())
    sink.finish("good", good, None)
    first, second = told.get(timeout=10), told.get(timeout=10)
    assert first.key == "bad"
    assert isinstance(first.error, Float16Overflow)
    assert (second.key, second.error) == ("good", None)
    sink.discard(bad)
    sink.close()
    with pytest.raises(Empty):
        told.get_nowait()
    assert [path.name for path in tmp_path.iterdir()] == ["good.h5"]


def test_after_a_discard_nothing_is_written_nor_told(
    tmp_path: Path, told: SimpleQueue[Stored]
) -> None:
    sink = FeatureSink(told.put)
    writer = writer_of(tmp_path / "a.h5")
    sink.write("a", writer, 0, vectors(3))
    sink.discard(writer)
    sink.write("a", writer, 3, vectors(3))
    sink.finish("a", writer, None)
    sink.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Empty):
        told.get_nowait()


def test_a_writer_never_suffers_for_one_that_had_its_place_in_memory(
    tmp_path: Path, told: SimpleQueue[Stored]
) -> None:
    sink = FeatureSink(told.put)
    for index in range(60):
        lost = writer_of(tmp_path / "lost.h5", rows=2)
        sink.discard(lost)
        sink.write("lost", lost, 0, vectors(2))
        del lost
        kept = writer_of(tmp_path / f"{index}.h5", rows=2)
        sink.write(index, kept, 0, vectors(2))
        sink.finish(index, kept, None)
        del kept
        stored = told.get(timeout=10)
        assert (stored.key, stored.error) == (index, None)
    sink.close()


def test_a_slow_disk_makes_the_encoder_wait_and_not_memory_grow(
    tmp_path: Path, told: SimpleQueue[Stored]
) -> None:
    gate = threading.Event()

    class Stuck:
        def write(self, start: int, content: Any) -> None:
            gate.wait(20)

    sink = FeatureSink(told.put)
    done = [0]

    def fill() -> None:
        for _ in range(200):
            sink.write("a", Stuck(), 0, vectors())  # type: ignore[arg-type]
            done[0] += 1

    filler = threading.Thread(target=fill, daemon=True)
    filler.start()
    for _ in range(100):
        before = done[0]
        time.sleep(0.05)
        if done[0] == before > 0:
            break
    assert 0 < done[0] < 50
    gate.set()
    filler.join(20)
    assert done[0] == 200
    sink.close()


def test_a_full_disk_is_told_in_plain_words(
    tmp_path: Path, told: SimpleQueue[Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def full(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sink = FeatureSink(told.put)
    writer = writer_of(tmp_path / "a.h5")
    monkeypatch.setattr(os, "pwrite", full)
    sink.write("a", writer, 0, vectors())
    stored = told.get(timeout=10)
    monkeypatch.undo()
    assert isinstance(stored.error, ArtifactError)
    assert "No space left" in str(stored.error)
    sink.close()
    assert list(tmp_path.iterdir()) == []
