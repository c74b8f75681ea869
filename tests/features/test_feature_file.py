from __future__ import annotations

import errno
import itertools
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bagscope.artifacts import fingerprint, seal_holds
from bagscope.errors import ArtifactError, SchemaError
from bagscope.features.feature_file import (
    FeatureHeader,
    FeatureWriter,
    Float16Overflow,
    read_feature_file,
    write_feature_file,
)

FIELDS = {"stage": "extract", "spec": {"encoder": "µ"}, "tiles": "abc"}
any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def header(rows: int = 5, **changes: Any) -> FeatureHeader:
    coords = np.stack([np.arange(rows) * 512, np.arange(rows) // 3], axis=1).astype(np.int32)
    values: dict[str, Any] = {
        "slide_id": "case-1",
        "fields": FIELDS,
        "encoder": {"name": "demo", "dimension": 3},
        "weights_sha256": "f" * 64,
        "coords_l0": coords,
        "grid": coords // 512,
        "tile": {"mpp": 0.5, "tile_px": 256, "bounds_l0": np.array([0, 0, 9, 9]), "none_of_it": 1},
        "recorded": {"device": "cpu"},
    }
    return FeatureHeader(**{**values, **changes})


def vectors_of(rows: int, dimension: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float16)


@any_folder
@given(
    vectors=hnp.arrays(
        np.float16, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=300)
    )
)
def test_what_was_written_is_read_back_bit_by_bit(tmp_path: Path, vectors: np.ndarray) -> None:
    path = tmp_path / "case-1.h5"
    wanted = header(len(vectors))
    write_feature_file(path, wanted, vectors)
    back = read_feature_file(path)
    assert back.features.dtype == np.float16
    assert back.features.shape == vectors.shape
    assert back.features.tobytes() == vectors.tobytes()
    assert not back.features.flags.writeable
    np.testing.assert_array_equal(back.coords_l0, wanted.coords_l0)
    np.testing.assert_array_equal(back.grid, wanted.grid)
    assert len(back) == len(vectors)
    assert seal_holds(path)


@any_folder
@given(readable=hnp.arrays(np.bool_, st.integers(0, 700)))
def test_exactly_the_readable_rows_stay(tmp_path: Path, readable: np.ndarray) -> None:
    rows = len(readable)
    vectors, source = vectors_of(rows), np.arange(rows)
    wanted = header(rows, extra={"coords_source": source})
    writer = FeatureWriter(tmp_path / "a.h5", wanted, rows=rows, dimension=3)
    writer.write(0, vectors)
    writer.finish(readable)
    assert wanted.coords_l0 is not None and wanted.grid is not None
    kept = header(
        coords_l0=wanted.coords_l0[readable],
        grid=wanted.grid[readable],
        extra={"coords_source": source[readable]},
    )
    write_feature_file(tmp_path / "b.h5", kept, vectors[readable])
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    np.testing.assert_array_equal(read_feature_file(tmp_path / "a.h5").features, vectors[readable])


@any_folder
@given(cuts=st.lists(st.integers(0, 900), max_size=6), order=st.randoms())
def test_pieces_and_their_order_leave_no_trace(tmp_path: Path, cuts: list[int], order: Any) -> None:
    vectors = vectors_of(900)
    write_feature_file(tmp_path / "whole.h5", header(900), vectors)
    writer = FeatureWriter(tmp_path / "parts.h5", header(900), rows=900, dimension=3)
    edges = [0, *sorted(cuts), 900]
    parts = list(itertools.pairwise(edges))
    order.shuffle(parts)
    for start, stop in parts:
        writer.write(start, vectors[start:stop].astype(np.float32))
    writer.finish()
    assert (tmp_path / "parts.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_any_hdf5_reader_finds_everything(tmp_path: Path) -> None:
    path, vectors = tmp_path / "a.h5", vectors_of(600, 100)
    extra = {"coords_source": np.arange(600.0)}
    write_feature_file(path, header(600, extra=extra), vectors)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["features"][:], vectors)
        assert file["features"].chunks is None
        assert file["features"].compression is None
        assert file["features"].id.get_offset() % 4096 == 0
        np.testing.assert_array_equal(file["coords_source"][:], extra["coords_source"])
        expected = [zlib.crc32(vectors[at : at + 256].tobytes()) for at in (0, 256, 512)]
        assert file["crc32"][:].tolist() == expected
        assert file.attrs["mpp"] == 0.5
        assert file.attrs["fingerprint"] == fingerprint(FIELDS)
        assert json.loads(file.attrs["encoder"]) == {"name": "demo", "dimension": 3}
        assert "none_of_it" not in file.attrs
    back = read_feature_file(path)
    assert back.sha256.encode() in path.read_bytes()
    assert back.recorded == {"device": "cpu"}
    assert back.extra_names == ("coords_source",)
    assert back.fields == FIELDS


def test_a_bag_that_never_was_a_slide_has_no_coords(tmp_path: Path) -> None:
    write_feature_file(tmp_path / "a.h5", header(coords_l0=None, grid=None), vectors_of(5))
    back = read_feature_file(tmp_path / "a.h5")
    assert back.coords_l0 is None
    assert back.grid is None


def test_no_path_and_no_time_is_in_the_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_feature_file(tmp_path / name / "a.h5", header(), vectors_of(5))
    content = (tmp_path / "one" / "a.h5").read_bytes()
    assert content == (tmp_path / "two" / "a.h5").read_bytes()
    assert str(tmp_path).encode() not in content


@pytest.mark.parametrize("value", [65536.0, -1e30])
def test_what_float16_cannot_hold_is_kept_as_float32(tmp_path: Path, value: float) -> None:
    vectors = vectors_of(5).astype(np.float32)
    vectors[3, 1] = value
    vectors[2, 2] = np.nan
    writer = FeatureWriter(tmp_path / "a.h5", header(), rows=5, dimension=3)
    with pytest.raises(Float16Overflow):
        writer.write(0, vectors)
    writer.discard()
    assert list(tmp_path.iterdir()) == []
    write_feature_file(tmp_path / "a.h5", header(), vectors)
    back = read_feature_file(tmp_path / "a.h5")
    assert back.features.dtype == np.float32
    assert back.attributes["stored_dtype"] == "float32"
    np.testing.assert_array_equal(back.features, vectors)


def test_values_that_were_infinite_are_no_overflow(tmp_path: Path) -> None:
    vectors = np.array([[np.inf, 65504.0, np.nan]], np.float32)
    write_feature_file(tmp_path / "a.h5", header(1), vectors)
    back = read_feature_file(tmp_path / "a.h5").features
    assert back.dtype == np.float16
    np.testing.assert_array_equal(back, vectors)


@pytest.mark.parametrize(("start", "shape"), [(-1, (2, 3)), (4, (2, 3)), (0, (2, 4)), (0, (6,))])
def test_rows_without_a_place_are_refused(
    tmp_path: Path, start: int, shape: tuple[int, ...]
) -> None:
    writer = FeatureWriter(tmp_path / "a.h5", header(), rows=5, dimension=3)
    with pytest.raises(ValueError, match=r"a\.h5"):
        writer.write(start, np.zeros(shape, np.float16))
    with pytest.raises(ValueError, match="readable"):
        writer.finish(np.ones(4, bool))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_after_the_end(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path / "a.h5", header(), rows=5, dimension=3)
    writer.write(0, vectors_of(5))
    writer.finish()
    before = (tmp_path / "a.h5").read_bytes()
    with pytest.raises(ValueError, match="after it was finished"):
        writer.write(0, vectors_of(5))
    with pytest.raises(ValueError, match="after it was finished"):
        writer.finish()
    writer.discard()
    assert (tmp_path / "a.h5").read_bytes() == before


def full_disk(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["write", "finish", "leave out"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    writer = FeatureWriter(tmp_path / "a.h5", header(600), rows=600, dimension=3)
    if moment != "write":
        writer.write(0, vectors_of(600))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH112, PTH208
    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.raises(ArtifactError, match=r"a\.h5: could not be written \(No space left") as full:
        if moment == "write":
            writer.write(0, vectors_of(600))
        else:
            writer.finish(np.arange(600) > 3 if moment == "leave out" else None)
    assert "\n" not in str(full.value)
    assert list(tmp_path.iterdir()) == []
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) < descriptors  # noqa: PTH208
    writer.discard()


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_feature_file(tmp_path / "a.h5", header(), vectors_of(5))
    assert list(tmp_path.iterdir()) == []


def test_room_for_the_largest_slide_takes_neither_memory_nor_time(tmp_path: Path) -> None:
    empty = header(coords_l0=None, grid=None)
    writer = FeatureWriter(tmp_path / "a.h5", empty, rows=3_000_000, dimension=2560)
    (temporary,) = tmp_path.iterdir()
    assert temporary.stat().st_size > 3_000_000 * 2560 * 2
    assert temporary.stat().st_blocks * 512 < 1 << 20
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def drop(name: str) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        del file[name]

    return damage


def put(name: str, values: np.ndarray) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        del file[name]
        file[name] = values

    return damage


def attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        if value is None:
            del file.attrs[name]
        else:
            file.attrs[name] = value

    return damage


def chunk(file: h5py.File) -> None:
    values = file["features"][:]
    del file["features"]
    file.create_dataset("features", data=values, chunks=(1, 3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("features"), "lacks features"),
        (drop("crc32"), "lacks crc32"),
        (attribute("encoder", None), "lacks encoder"),
        (attribute("encoder", "{not json"), "damaged"),
        (attribute("schema", "somebody.else"), "expected 'bagscope.features'"),
        (attribute("schema_version", 99), "newer than 1"),
        (attribute("fingerprint", "0" * 64), "not that of its fields"),
        (put("grid", np.zeros((4, 2), np.int32)), "grid is"),
        (put("coords", np.zeros((5, 3), np.int32)), "coords is"),
        (put("crc32", np.zeros(2, np.uint32)), "2 checksums for 5 rows"),
        (put("features", np.zeros((5, 3), np.int16)), "expected float16 or float32"),
        (chunk, "not contiguous"),
    ],
)
def test_each_damage_is_named(
    tmp_path: Path, damage: Callable[[h5py.File], None], message: str
) -> None:
    path = tmp_path / "a.h5"
    write_feature_file(path, header(), vectors_of(5))
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(SchemaError, match=message) as caught:
        read_feature_file(path)
    assert "a.h5" in str(caught.value)
    assert not seal_holds(path)


def test_a_missing_and_a_cut_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(ArtifactError, match="no such feature file"):
        read_feature_file(path)
    write_feature_file(path, header(), vectors_of(5))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SchemaError, match=r"damaged|cut short"):
        read_feature_file(path)
