"""Bags that never were a slide, and what holds for imports of every layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from bagscope.cohort.table import SlideRow, load_cohort
from bagscope.errors import BagscopeError, ConfigError, SpacingError
from bagscope.features.feature_file import read_feature_file
from bagscope.features.interop import import_features, recognise
from tests.features.interop import layouts
from tests.features.interop.imports import MPP, assert_same, extra, failure, imported, stored_order
from tests.features.interop.layouts import Truth, truth

# --- torchmil and bags that never were a slide ----------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".h5"])
def test_torchmil(tmp_path: Path, suffix: str) -> None:
    bags = {name: truth(count=n, seed=n) for name, n in (("a", 5), ("b", 9))}
    for label, (name, made) in enumerate(bags.items()):
        layouts.torchmil_bag(tmp_path / "data", name, made, label=label, suffix=suffix)
    report = import_features(tmp_path / "data", tmp_path / "out", encoder="mine")
    assert report.failures == ()
    assert report.layout == "torchmil"
    for name, made in bags.items():
        file = read_feature_file(tmp_path / "out" / f"{name}.h5")
        assert_same(file, made)
        labels = (np.arange(len(made.corners)) % 2)[stored_order(made)]
        np.testing.assert_array_equal(extra(file, "tile_labels"), labels)
    cohort = load_cohort(tmp_path / "out" / "cohort.csv")
    assert [(row.slide_id, row.columns["label"]) for row in cohort.rows] == [("a", "0"), ("b", "1")]
    assert all(row.path.exists() for row in cohort.rows)
    # What holds for every bag is said once, and counted.
    assert sum("level-0 corners" in w for one in report.outcomes for w in one.warnings) == 1
    assert any(note.startswith("2 slides: torchmil") for note in report.notes)


def many_bags(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    bag = np.sort(np.concatenate([np.arange(11), rng.integers(0, 11, 40)])).astype(np.int32)
    rng.shuffle(bag)
    x = rng.normal(size=(len(bag), 6)).astype(np.float32)
    y = (np.arange(11) % 2).astype(np.int8)
    np.savez(path, x=x, bag=bag, y=y, inst=(x[:, 0] > 0).astype(np.int8))
    return x, bag, y


def test_an_npz_of_many_bags(tmp_path: Path) -> None:
    x, bag, y = many_bags(tmp_path / "musk.npz")
    report = import_features(tmp_path / "musk.npz", tmp_path / "out", dtype="float32")
    assert report.counts == {"done": 11, "skipped": 0, "failed": 0}
    for index in range(11):
        file = read_feature_file(tmp_path / "out" / f"musk_{index:02d}.h5")
        assert file.coords_l0 is None
        np.testing.assert_array_equal(file.features, x[bag == index])
        np.testing.assert_array_equal(extra(file, "tile_labels"), x[bag == index][:, 0] > 0)
        assert file.encoder["name"] == "unknown"
    cohort = load_cohort(tmp_path / "out" / "cohort.csv")
    assert [row.columns["label"] for row in cohort.rows] == [str(value) for value in y]


def test_a_table_that_was_edited_is_kept(tmp_path: Path) -> None:
    many_bags(tmp_path / "musk.npz")
    import_features(tmp_path / "musk.npz", tmp_path / "out")
    table = tmp_path / "out" / "cohort.csv"
    edited = table.read_text().replace("musk_00.h5,0", "musk_00.h5,7")
    table.write_text(edited)
    report = import_features(tmp_path / "musk.npz", tmp_path / "out")
    assert "was kept" in report.notes[-1]
    assert table.read_text() == edited
    import_features(tmp_path / "musk.npz", tmp_path / "out", overwrite=True)
    assert table.read_text() != edited


def test_one_npz_per_bag(tmp_path: Path) -> None:
    made = truth()
    (tmp_path / "bags").mkdir()
    np.savez(tmp_path / "bags" / "a.npz", features=made.features, coords=made.corners, label="yes")
    np.savez(tmp_path / "bags" / "b.npz", x=made.features[:3])
    report = import_features(tmp_path / "bags", tmp_path / "out")
    assert report.failures == ()
    assert_same(read_feature_file(tmp_path / "out" / "a.h5"), made)
    assert read_feature_file(tmp_path / "out" / "b.h5").coords_l0 is None
    assert (tmp_path / "out" / "cohort.csv").read_text() == "slide_id,path,label\na,a.h5,yes\n"


def test_csv(tmp_path: Path) -> None:
    table = tmp_path / "bags.csv"
    table.write_text("bag,f1,f2,label\n007,1,2.5,x\nb,3,4,y\n007,-1,0,x\n")
    report = import_features(table, tmp_path / "out")
    assert report.failures == ()
    first = read_feature_file(tmp_path / "out" / "007.h5")
    np.testing.assert_array_equal(first.features, [[1, 2.5], [-1, 0]])
    np.testing.assert_array_equal(read_feature_file(tmp_path / "out" / "b.h5").features, [[3, 4]])
    cohort = load_cohort(tmp_path / "out" / "cohort.csv")
    assert [row.columns["label"] for row in cohort.rows] == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bag,f1\na,1\na,much\n", "row 3, column f1: 'much'"),
        ("name,f1\na,1\n", "names the bag"),
        ("bag,f1\na,\n", "row 2, column f1"),
        ("bag\na\n", "0 features"),
    ],
)
def test_a_csv_that_makes_no_bags(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bags.csv").write_text(text)
    with pytest.raises(Exception, match=said):
        import_features(tmp_path / "bags.csv", tmp_path / "out")


def test_a_bag_with_two_labels(tmp_path: Path) -> None:
    (tmp_path / "bags.csv").write_text("bag,f1,label\na,1,x\na,2,y\nb,2,y\n")
    report = import_features(tmp_path / "bags.csv", tmp_path / "out")
    assert [one.slide_id for one in report.failures] == ["a"]
    assert "'x', 'y'" in report.failures[0].message


# --- values, rows, resuming -----------------------------------------------------------------


def poison(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def test_one_bad_slide_stops_no_other(tmp_path: Path) -> None:
    made = truth()
    for name in ("a", "b", "c", "d", "e", "f"):
        path = layouts.trident_features(tmp_path / "job", name, made)
        if name == "b":
            path.write_bytes(path.read_bytes()[:300])
        if name == "c":
            poison(path, lambda file: file["features"].__setitem__((3, 2), np.nan))
        if name == "d":
            poison(path, lambda file: file["coords"].__setitem__(5, file["coords"][2]))
        if name == "e":
            poison(path, lambda file: file["features"].resize(11, axis=0))
    report = import_features(tmp_path / "job", tmp_path / "out", mpp=MPP)
    assert report.counts == {"done": 2, "skipped": 0, "failed": 4}
    messages = {one.slide_id: one.message for one in report.failures}
    assert "can't be read" in messages["b"]
    assert "feature 2 of row 3 is nan" in messages["c"]
    assert "rows 2 and 5 lie in one place" in messages["d"]
    assert "11 features beside 12 coordinates" in messages["e"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.h5", "f.h5"]


def test_what_float16_does_not_hold_is_kept_as_float32(tmp_path: Path) -> None:
    made = truth()
    large = Truth(made.corners, made.features.astype(np.float32) * 1e5)
    layouts.trident_features(tmp_path / "job", "a", large)
    file, _ = imported(tmp_path / "job", tmp_path / "out")
    assert file.features.dtype == np.float32
    assert_same(file, large)


def test_float32_on_request_is_exact(tmp_path: Path) -> None:
    made = truth()
    fine = Truth(made.corners, made.features.astype(np.float32) + np.float32(1e-4))
    layouts.trident_features(tmp_path / "job", "a", fine)
    file, _ = imported(tmp_path / "job", tmp_path / "out", dtype="float32")
    assert_same(file, fine)
    rounded, _ = imported(tmp_path / "job", tmp_path / "half")
    assert rounded.features.dtype == np.float16
    np.testing.assert_array_equal(rounded.features, fine.sorted().features.astype(np.float16))


def test_a_second_import_finds_everything_made(tmp_path: Path) -> None:
    path = layouts.trident_features(tmp_path / "job", "a", truth())
    out = tmp_path / "out"
    file, _ = imported(tmp_path / "job", out, mpp=MPP)
    before = file.path.read_bytes()
    assert import_features(tmp_path / "job", out, mpp=MPP).counts["skipped"] == 1
    again = import_features(tmp_path / "job", out, mpp=0.26)
    assert "tiling.mpp_x_l0 is 0.25, asked for 0.26" in again.failures[0].message
    again = import_features(tmp_path / "job", out, mpp=MPP, dtype="float32")
    assert "stored as float16, asked for float32" in again.failures[0].message
    assert file.path.read_bytes() == before
    poison(path, lambda content: content["features"].__setitem__((0, 0), 0.5))
    again = import_features(tmp_path / "job", out, mpp=MPP)
    assert "source_sha256" in again.failures[0].message
    again = import_features(tmp_path / "job", out, mpp=MPP, overwrite=True)
    assert again.counts["done"] == 1


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    layouts.trident_features(tmp_path / "job", "a", truth())
    one, _ = imported(tmp_path / "job", tmp_path / "one", mpp=MPP)
    other, _ = imported(tmp_path / "job", tmp_path / "other", mpp=MPP)
    assert one.path.read_bytes() == other.path.read_bytes()
    assert str(tmp_path).encode() not in one.path.read_bytes()


def test_an_unbelievable_pixel_size_is_refused_before_anything(tmp_path: Path) -> None:
    layouts.trident_features(tmp_path / "job", "a", truth())
    with pytest.raises(SpacingError, match="not a believable pixel size"):
        import_features(tmp_path / "job", tmp_path / "out", mpp=250.0)


def test_another_encoder_than_the_file_says_is_reported(tmp_path: Path) -> None:
    layouts.trident_features(tmp_path / "job", "a", truth(dimension=1024))
    file, report = imported(tmp_path / "job", tmp_path / "out", encoder="mine", mpp=MPP)
    assert file.encoder["name"] == "mine"
    assert "says encoder 'uni_v1'; taken as 'mine'" in report.outcomes[0].warnings[0]
    _, report = imported(tmp_path / "job", tmp_path / "same", encoder="uni", mpp=MPP)
    assert report.outcomes[0].warnings == ()


def test_recognised_sources_can_be_passed_on(tmp_path: Path) -> None:
    layouts.trident_features(tmp_path / "job", "a", truth())
    found = recognise(tmp_path / "job")
    assert import_features(found, tmp_path / "out").counts["done"] == 1


def test_names_that_differ_by_case_only_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bags.csv").write_text("bag,f1\na,1\nA,2\n")
    with pytest.raises(ConfigError, match="'A' and 'a' would be the same file"):
        import_features(tmp_path / "bags.csv", tmp_path / "out")


def test_a_name_that_can_not_be_a_file_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "bags.csv").write_text("bag,f1\na/b,1\nc,2\n")
    report = import_features(tmp_path / "bags.csv", tmp_path / "out")
    assert report.counts == {"done": 1, "skipped": 0, "failed": 1}
    assert "'a/b' can't be a slide id" in report.failures[0].message


def test_the_nearest_slide_of_the_table_is_named(tmp_path: Path) -> None:
    layouts.trident_features(tmp_path / "job", "TCGA-01-DX1", truth())
    rows = {n: SlideRow(slide_id=n, path=tmp_path, patient_id=n) for n in ("x", "TCGA-01-DX2")}
    assert "'TCGA-01-DX2'" in failure(tmp_path / "job", tmp_path / "out", slides=rows)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_of_other_kinds(tmp_path: Path) -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    (tmp_path / "clam").mkdir()
    torch.save(values, tmp_path / "clam" / "a.pt")
    file, _ = imported(tmp_path / "clam", tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(file.features, values.float().numpy())
    torch.save(values.to_sparse(), tmp_path / "clam" / "a.pt")
    assert "can't be read" in failure(tmp_path / "clam", tmp_path / "other")


def build(layout: str, folder: Path) -> None:
    """Write one slide in a layout."""
    made = truth()
    if layout == "clam":
        layouts.clam_patches(folder, "a", made.corners)
        layouts.clam_features(folder, "a", made)
    elif layout == "trident":
        layouts.trident_features(folder, "a", made)
    elif layout == "stamp":
        layouts.stamp_features(folder, "a", made, mpp=MPP)
    elif layout == "slideflow":
        layouts.slideflow_bag(folder, "a", made, tile_um=128, extent_l0=512)
    elif layout == "atlaspatch":
        layouts.atlaspatch_file(folder, "a", made, {"uni_v1": made.features})
    elif layout == "hs2p":
        layouts.hs2p_tiles(folder, "a", made.corners, vectors=made.features)
    elif layout == "torchmil":
        layouts.torchmil_bag(folder, "a", made, label=1)
    else:
        folder.mkdir(parents=True)
        np.savez_compressed(folder / "a.npz", x=made.features, coords=made.corners)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layout",
    ["atlaspatch", "clam", "hs2p", "plain", "slideflow", "stamp", "torchmil", "trident"],
)
def test_damage_is_always_told_in_words(tmp_path: Path, layout: str) -> None:
    rng = np.random.default_rng(8)
    build(layout, tmp_path / "sound")
    assert recognise(tmp_path / "sound").layout == layout
    files = [p for p in sorted((tmp_path / "sound").rglob("*")) if p.is_file()]
    for index in range(20):
        for file in files:
            content = bytearray(file.read_bytes())
            # HDF5 itself may run in circles over a flipped bit, so h5 files are only cut short.
            if index % 4 == 0 or file.suffix == ".h5":
                content = content[: rng.integers(len(content))]
            else:
                content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            place = tmp_path / str(index) / file.relative_to(tmp_path / "sound")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        # Any other error than ours ends the test.
        with contextlib.suppress(BagscopeError):
            import_features(tmp_path / str(index), tmp_path / f"out{index}", mpp=MPP)


def test_damaged_coordinates_fail_the_slides_that_need_them(tmp_path: Path) -> None:
    made = truth()
    for name in ("a", "b"):
        layouts.clam_features(tmp_path / "clam", name, made)
        layouts.clam_patches(tmp_path / "clam", name, made.corners)
        layouts.trident_features(tmp_path / "trident", name, made)
    (tmp_path / "clam" / "patches" / "b.h5").write_bytes(b"damaged")
    (patches,) = (tmp_path / "trident").rglob("b_patches.h5")
    patches.write_bytes(b"damaged")
    report = import_features(tmp_path / "clam", tmp_path / "out")
    assert [(one.slide_id, one.outcome) for one in report.outcomes] == [
        ("a", "done"),
        ("b", "failed"),
    ]
    assert import_features(tmp_path / "trident", tmp_path / "other").counts["done"] == 2
