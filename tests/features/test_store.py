from __future__ import annotations

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagscope.errors import ArtifactError, SchemaError
from bagscope.features import feature_file, store
from bagscope.features.side_by_side import SideBySide
from bagscope.features.store import FeatureStore
from tests.features.stored import ENCODER, grid_of, store_slide, store_three, vectors_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "demo"
    store_three(folder)
    return folder


def test_every_bag_is_what_was_written(folder: Path) -> None:
    opened = FeatureStore.open(folder)
    assert opened.slide_ids == ("a", "b µ#2", "c")
    assert len(opened) == 3
    assert "a" in opened and "z" not in opened
    for bag, rows in zip(opened, (600, 3, 0), strict=True):
        np.testing.assert_array_equal(bag.features, vectors_of(bag.slide_id, rows))
        np.testing.assert_array_equal(bag.coords_l0, grid_of(rows) * 512)
        np.testing.assert_array_equal(bag.grid, grid_of(rows))
        assert bag.rows is None
        assert len(bag) == rows
        assert bag.attributes["tile_px"] == 256
        assert bag.attributes["bounds_l0"] == [1, 2, 3, 4]


def test_a_bag_is_a_view_that_nobody_can_write_to(folder: Path) -> None:
    bag = FeatureStore.open(folder).bag("a")
    again = FeatureStore.open(folder).bag("a", [0])
    for array in (bag.features, bag.coords_l0, bag.grid, again.features, again.coords_l0):
        assert array is not None and not array.flags.writeable
    base: Any = bag.features
    while isinstance(base, np.ndarray):
        assert not base.flags.owndata
        base = base.base
    # Nothing is kept of the file but its pages.
    assert type(base).__name__ in ("mmap", "memoryview")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, 599), max_size=900))
def test_chosen_rows_come_in_the_order_asked_for(folder: Path, rows: list[int]) -> None:
    bag = FeatureStore.open(folder).bag("a", rows)
    picked = np.array(rows, int)
    np.testing.assert_array_equal(bag.features, vectors_of("a", 600)[picked])
    np.testing.assert_array_equal(bag.coords_l0, grid_of(600)[picked] * 512)
    np.testing.assert_array_equal(bag.grid, grid_of(600)[picked])
    np.testing.assert_array_equal(bag.rows, picked)


@pytest.mark.parametrize("rows", [[-1], [600], [[0]], [0.5], [True]])
def test_rows_that_are_not_there_are_refused(folder: Path, rows: Any) -> None:
    with pytest.raises(IndexError, match="a: rows"):
        FeatureStore.open(folder).bag("a", rows)


def not_in_memory(*_: Any) -> bool:
    return False


def test_rows_of_a_file_that_is_not_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_file, "_in_memory", not_in_memory)
    rows = [5, 6, 7, 3, 599, 5]
    bag = FeatureStore.open(folder).bag("a", rows)
    np.testing.assert_array_equal(bag.features, vectors_of("a", 600)[rows])


def test_a_read_that_stops_short_is_taken_up_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv

    def grudging(descriptor: int, buffers: list[Any], at: int, *flags: int) -> int:
        return whole(descriptor, [buffers[0][:7]], at, *flags)

    monkeypatch.setattr(os, "preadv", grudging)
    monkeypatch.setattr(feature_file, "_in_memory", not_in_memory)
    opened, expected = FeatureStore.open(folder), vectors_of("a", 600)
    np.testing.assert_array_equal(opened.bag("a", [5, 6, 3]).features, expected[[5, 6, 3]])
    np.testing.assert_array_equal(opened.bag("a", copy=True).features, expected)


def test_a_copy_is_the_callers_own(folder: Path) -> None:
    opened = FeatureStore.open(folder)
    bag = opened.bag("a", copy=True)
    bag.features[:] = 0
    np.testing.assert_array_equal(opened.bag("a").features, vectors_of("a", 600))
    assert opened.bag("a", [1], copy=True).features.flags.writeable
    assert len(opened.bag("c", copy=True)) == 0


def test_a_file_that_shrinks_or_goes_while_it_is_open_is_named(tmp_path: Path) -> None:
    store_three(tmp_path)
    opened = FeatureStore.open(tmp_path)
    opened.bag("a")
    os.truncate(tmp_path / "a.h5", 9000)
    with pytest.raises(ArtifactError, match=r"a\.h5: cut short"):
        opened.bag("a", [599])
    (tmp_path / "a.h5").unlink()
    with pytest.raises(ArtifactError, match=r"a\.h5: can't be read any more"):
        opened.bag("a", [599])


def test_opening_a_store_opens_no_file_and_few_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_files: list[str] = []

    def counted(path: Path) -> feature_file.FeatureFile:
        opened_files.append(path.stem)
        return feature_file.read_feature_file(path)

    monkeypatch.setattr(store, "read_feature_file", counted)
    monkeypatch.setattr(store, "OPEN_FILES", 2)
    for name in "abcd":
        store_slide(tmp_path, name, 2)
    many = FeatureStore.open(tmp_path)
    assert opened_files == []
    for name in "aabacacd":
        many.bag(name)
    assert opened_files == ["a", "b", "c", "d"]
    many.bag("b")
    assert opened_files == ["a", "b", "c", "d", "b"]
    assert (tmp_path / "d.h5").exists()


@pytest.mark.slow
def test_more_bags_than_files_may_be_open_can_be_walked(tmp_path: Path) -> None:
    store_slide(tmp_path, "s0", 2)
    one = FeatureStore.open(tmp_path)
    for _ in range(1200):
        one._backend._open.clear()  # type: ignore[attr-defined]
        one.bag("s0")


def test_threads_share_a_store(folder: Path) -> None:
    shared = FeatureStore.open(folder)
    expected = vectors_of("a", 600)
    rows = [np.random.default_rng(seed).permutation(600)[:50] for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        bags = pool.map(lambda r: shared.bag("a", r), rows)
        for bag, picked in zip(bags, rows, strict=True):
            np.testing.assert_array_equal(bag.features, expected[picked])


def test_a_store_goes_to_another_process_by_its_name(folder: Path) -> None:
    opened = FeatureStore.open(folder)
    opened.bag("a")
    back = pickle.loads(pickle.dumps(opened))
    assert back.slide_ids == opened.slide_ids
    np.testing.assert_array_equal(back.bag("a").features, opened.bag("a").features)


def test_a_patient_is_the_slides_end_to_end(folder: Path) -> None:
    bag = FeatureStore.open(folder).patient_bag(["b µ#2", "c", "a"])
    expected = np.concatenate([vectors_of("b µ#2", 3), vectors_of("a", 600)])
    np.testing.assert_array_equal(bag.features, expected)
    assert bag.features.dtype == np.float16
    assert bag.tile_slide.tolist() == [0] * 3 + [2] * 600
    assert bag.tile_row.tolist() == [*range(3), *range(600)]
    assert bag.tile_slide.dtype == bag.tile_row.dtype == np.int32
    np.testing.assert_array_equal(bag.coords_l0, np.concatenate([grid_of(3), grid_of(600)]) * 512)
    assert len(bag) == 603
    assert len(bag.attributes) == 3


def test_a_patient_with_a_slide_in_float32_or_without_coords(tmp_path: Path) -> None:
    store_three(tmp_path)
    opened = FeatureStore.open(tmp_path)
    store_slide(tmp_path, "d", 4, coords_l0=None)
    path = tmp_path / "e.h5"
    feature_file.write_feature_file(
        path,
        feature_file.FeatureHeader(
            slide_id="e",
            fields={},
            encoder=ENCODER,
            weights_sha256="ab" * 32,
            coords_l0=grid_of(2),
            grid=grid_of(2),
        ),
        np.full((2, 5), 1e6),
    )
    opened = FeatureStore.open(tmp_path)
    bag = opened.patient_bag(["a", "e"])
    assert bag.features.dtype == np.float32
    np.testing.assert_array_equal(bag.features[:600], vectors_of("a", 600).astype(np.float32))
    assert bag.coords_l0 is not None
    mixed = opened.patient_bag(["a", "d"])
    assert mixed.coords_l0 is None
    assert mixed.grid is not None


@pytest.mark.parametrize("slide_ids", [[], ["a", "a"]])
def test_a_patient_without_slides_or_with_one_twice_is_refused(
    folder: Path, slide_ids: list[str]
) -> None:
    with pytest.raises(ValueError, match="each one once"):
        FeatureStore.open(folder).patient_bag(slide_ids)


def test_what_a_store_holds(folder: Path) -> None:
    found = FeatureStore.open(folder).describe()
    assert found.encoder_name == "demo"
    assert found.encoder == ENCODER
    assert found.weights_sha256 == "ab" * 32
    assert found.dimension == 5
    assert found.dtypes == {"float16": 3}
    assert found.slides == 3
    assert found.tiles == 603
    assert found.tiling == {"mpp": (0.5,), "tile_px": (256,), "overlap_px": (0,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {**ENCODER, "name": "other"}}, "demo and other"),
        ({"encoder": {**ENCODER, "mean": [0.4, 0.5]}}, "two specs of demo"),
        ({"weights_sha256": "cd" * 32}, "weights abababababab and cdcdcdcdcdcd"),
        ({"dimension": 6}, "dimensions 5 and 6"),
    ],
)
def test_a_folder_that_mixes_encoders_is_refused_by_file(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    store_three(tmp_path)
    store_slide(tmp_path, "d", 2, **change)
    opened = FeatureStore.open(tmp_path)
    with pytest.raises(SchemaError, match=message) as caught:
        opened.describe()
    assert "a.h5" in str(caught.value) and "d.h5" in str(caught.value)
    opened = FeatureStore.open(tmp_path)
    opened.bag("d")
    with pytest.raises(SchemaError, match="mixes encoders"):
        opened.bag("a")


def test_what_is_not_there_is_named_and_the_nearest_suggested(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no features of slide 'A'; did you mean 'a'|run bags"):
        FeatureStore.open(folder).bag("A")
    with pytest.raises(ArtifactError, match="did you mean 'b µ#2'"):
        FeatureStore.open(folder).bag("b µ#3")
    with pytest.raises(ArtifactError, match="no such feature folder"):
        FeatureStore.open(tmp_path / "absent")
    (tmp_path / ".x.h5.host~1~00000000.tmp").touch()
    (tmp_path / ".x.h5").touch()
    with pytest.raises(ArtifactError, match="holds no feature files"):
        FeatureStore.open(tmp_path)


def test_a_file_under_another_slides_name_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "a.h5", tmp_path / "z.h5")
    with pytest.raises(SchemaError, match=r"z\.h5: holds the features of slide 'a'"):
        FeatureStore.open(tmp_path).bag("z")


def test_encoders_side_by_side(folder: Path, tmp_path: Path) -> None:
    other = {**ENCODER, "name": "other"}
    wide = store_slide(tmp_path, "a", 600, 8, encoder=other)
    store_slide(tmp_path, "only here", 2, 8, encoder=other)
    both = FeatureStore.open(folder).beside(FeatureStore.open(tmp_path))
    assert both.slide_ids == ("a",)
    assert both.missing == {
        "b µ#2": (str(tmp_path),),
        "c": (str(tmp_path),),
        "only here": (str(folder),),
    }
    rows = [5, 3, 599]
    bag = both.bag("a", rows)
    expected = np.concatenate([vectors_of("a", 600), wide], axis=1)[rows]
    np.testing.assert_array_equal(bag.features, expected)
    np.testing.assert_array_equal(bag.coords_l0, grid_of(600)[rows] * 512)
    assert [b.features.shape for b in both.bags("a")] == [(600, 5), (600, 8)]
    with pytest.raises(ValueError, match="at least one"):
        SideBySide([])


def moved(coords: np.ndarray) -> np.ndarray:
    coords = coords.copy()
    coords[41, 1] += 1
    return coords


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (600, {"coords_l0": moved(grid_of(600) * 512)}, r"row 41 lies at \(3072, 2560\) and \(30"),
        (599, {}, "600 and 599 of them"),
        (600, {"coords_l0": None}, "one has no coordinates"),
    ],
)
def test_encoders_of_other_tiles_do_not_go_side_by_side(
    folder: Path, tmp_path: Path, rows: int, changes: dict[str, Any], message: str
) -> None:
    store_slide(tmp_path, "a", rows, **changes)
    both = FeatureStore.open(folder).beside(FeatureStore.open(tmp_path))
    with pytest.raises(SchemaError, match=message):
        both.bag("a")
