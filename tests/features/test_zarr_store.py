from __future__ import annotations

import json
import pickle
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from bagscope.artifacts import atomic_folder, folder_faults
from bagscope.errors import ArtifactError, SchemaError
from bagscope.features.store import FeatureStore
from bagscope.features.zarr_store import CHUNK_ROWS, SHARD_ROWS, remote_faults, write_zarr_store
from tests.features.stored import store_slide, store_three


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("zarr") / "demo"
    store_three(folder)
    store_slide(folder, "d", 4, coords_l0=None, grid=None)
    return FeatureStore.open(folder)


@pytest.fixture(params=["folder", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "deep" / "demo.zarr")
        return
    name = f"/{uuid.uuid4().hex}"
    yield f"memory:/{name}/demo.zarr"
    fsspec.filesystem("memory").rm(name, recursive=True)


def test_the_same_bags_come_out_of_it(source: FeatureStore, location: str) -> None:
    write_zarr_store(source, location)
    back = FeatureStore.open(location)
    assert back.slide_ids == source.slide_ids
    assert back.describe() == source.describe()
    for slide_id in source.slide_ids:
        one, other = source.bag(slide_id), back.bag(slide_id)
        assert one.features.dtype == other.features.dtype
        assert one.features.tobytes() == other.features.tobytes()
        np.testing.assert_array_equal(one.coords_l0, other.coords_l0)
        np.testing.assert_array_equal(one.grid, other.grid)
        assert one.attributes == other.attributes
        assert not other.features.flags.writeable
        record, stated = source.record(slide_id), back.record(slide_id)
        assert record.fields == stated.fields
        assert record.fingerprint == stated.fingerprint
        assert record.recorded == stated.recorded
    np.testing.assert_array_equal(
        back.patient_bag(["a", "d"]).features, source.patient_bag(["a", "d"]).features
    )
    both = source.beside(back)
    assert both.bag("a").features.shape == (600, 10)
    assert pickle.loads(pickle.dumps(back)).slide_ids == back.slide_ids


@pytest.mark.parametrize("rows", [[], [0], [599, 0, 256, 255, 255], list(range(100, 400))])
def test_chosen_rows(source: FeatureStore, location: str, rows: list[int]) -> None:
    write_zarr_store(source, location)
    one, other = source.bag("a", rows), FeatureStore.open(location).bag("a", rows)
    np.testing.assert_array_equal(one.features, other.features)
    np.testing.assert_array_equal(one.coords_l0, other.coords_l0)


def test_a_store_without_its_last_object_is_refused(source: FeatureStore, location: str) -> None:
    write_zarr_store(source, location)
    files, path = fsspec.core.url_to_fs(location)
    files.rm_file(f"{path}/complete.json")
    with pytest.raises(SchemaError, match=r"incomplete \(no complete\.json\)"):
        FeatureStore.open(location)


def test_an_interrupted_write_leaves_nothing_to_trust(
    source: FeatureStore, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(slide_id: str) -> None:
        raise KeyboardInterrupt

    opened = FeatureStore.open(source.location)
    monkeypatch.setattr(opened, "bag", stops)
    with pytest.raises(KeyboardInterrupt):
        write_zarr_store(opened, location)
    with pytest.raises(ArtifactError, match=r"incomplete|no such store"):
        FeatureStore.open(location)
    write_zarr_store(source, location)
    assert len(FeatureStore.open(location)) == 4


def test_a_complete_store_is_replaced_only_when_asked(
    source: FeatureStore, location: str, tmp_path: Path
) -> None:
    write_zarr_store(source, location)
    with pytest.raises(ArtifactError, match="exists already"):
        write_zarr_store(source, location)
    store_slide(tmp_path / "new", "n", 2)
    write_zarr_store(FeatureStore.open(tmp_path / "new"), location, replace=True)
    assert FeatureStore.open(location).slide_ids == ("n",)
    assert faults_of(location) == []


def faults_of(location: str) -> list[str]:
    return remote_faults(location) if "://" in location else folder_faults(Path(location))


def test_every_changed_lost_or_new_object_is_named(source: FeatureStore, location: str) -> None:
    write_zarr_store(source, location)
    assert faults_of(location) == []
    files, path = fsspec.core.url_to_fs(location)
    shard = f"{path}/features/a/c/0/0"
    content = bytearray(files.cat_file(shard))
    content[100] ^= 1
    files.pipe_file(shard, bytes(content))
    files.rm_file(f"{path}/coords/a/c/0/0")
    files.pipe_file(f"{path}/grid/a/new", b"1")
    found = sorted(fault.removeprefix(f"{path}/") for fault in faults_of(location))
    assert found == [
        "coords/a/c/0/0: missing",
        "features/a/c/0/0: content changed since it was written",
        "grid/a/new: not in complete.json",
    ]


def test_any_zarr_reader_finds_sharded_raw_arrays(source: FeatureStore, tmp_path: Path) -> None:
    write_zarr_store(source, tmp_path / "demo.zarr")
    array = zarr.open_array(str(tmp_path / "demo.zarr" / "features" / "a"), mode="r")
    assert array.metadata.zarr_format == 3
    assert array.chunks == (CHUNK_ROWS, 5)
    assert array.shards == (3 * CHUNK_ROWS, 5)
    assert array.compressors == ()
    np.testing.assert_array_equal(array[:], source.bag("a").features)


def test_a_large_slide_is_several_objects(tmp_path: Path) -> None:
    rows = SHARD_ROWS + 1
    vectors = store_slide(tmp_path / "demo", "big", rows, 2)
    write_zarr_store(FeatureStore.open(tmp_path / "demo"), tmp_path / "demo.zarr")
    assert len(list((tmp_path / "demo.zarr/features/big/c").glob("*/0"))) == 2
    back = FeatureStore.open(tmp_path / "demo.zarr")
    np.testing.assert_array_equal(back.bag("big").features, vectors)
    picked = [0, SHARD_ROWS - 1, SHARD_ROWS]
    np.testing.assert_array_equal(back.bag("big", picked).features, vectors[picked])


def test_writing_twice_gives_the_same_bytes(source: FeatureStore, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_zarr_store(source, tmp_path / f"{name}.zarr")
    records = [
        json.loads((tmp_path / f"{n}.zarr/complete.json").read_text()) for n in ("one", "two")
    ]
    assert records[0] == records[1]
    assert str(tmp_path) not in json.dumps(records[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": "somebody.else"}, "expected 'bagscope.features.zarr'"),
        ({"schema": "bagscope.features.zarr", "schema_version": 99}, "newer than 1"),
    ],
)
def test_another_or_a_newer_schema_is_refused(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    with atomic_folder(tmp_path / "a.zarr", fields):
        pass
    with pytest.raises(SchemaError, match=message):
        FeatureStore.open(tmp_path / "a.zarr")


def test_slides_that_were_exchanged_are_refused(source: FeatureStore, tmp_path: Path) -> None:
    write_zarr_store(source, tmp_path / "a.zarr")
    features = tmp_path / "a.zarr" / "features"
    (features / "a").rename(tmp_path / "kept")
    (features / "d").rename(features / "a")
    with pytest.raises(SchemaError, match="its fingerprint is not that of its fields"):
        FeatureStore.open(tmp_path / "a.zarr").bag("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not readable as JSON"),
        (b"[]", "lacks fields"),
        (b'{"fields": {}, "fingerprint": "x", "files": {}}', "not that of its fields"),
    ],
)
def test_a_damaged_last_object_is_named(content: bytes, message: str) -> None:
    name = uuid.uuid4().hex
    files = fsspec.filesystem("memory")
    files.pipe_file(f"/{name}/complete.json", content)
    with pytest.raises(SchemaError, match=message):
        FeatureStore.open(f"memory://{name}")
    files.rm(f"/{name}", recursive=True)


def test_what_is_not_such_a_store_is_refused(source: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such store"):
        FeatureStore.open(tmp_path / "absent.zarr")
    with pytest.raises(SchemaError, match="incomplete"):
        FeatureStore.open(f"memory://{uuid.uuid4().hex}/absent.zarr")
    with pytest.raises(ArtifactError, match=r"bagscope\[remote\]"):
        FeatureStore.open("nothing-of-the-kind://bucket/demo.zarr")
    write_zarr_store(source, tmp_path / "demo.zarr")
    shutil.rmtree(tmp_path / "demo.zarr" / "coords" / "a")
    with pytest.raises(SchemaError, match="lacks coords/a"):
        FeatureStore.open(tmp_path / "demo.zarr").bag("a")
