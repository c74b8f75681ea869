from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from bagscope.artifacts import sha256_of_file
from bagscope.cohort.table import SlideRow, load_cohort
from bagscope.errors import BagscopeError, ConfigError, SpacingError
from bagscope.features.feature_file import FeatureFile, read_feature_file
from bagscope.features.interop import ConversionReport, import_features, recognise
from tests.builders import build_svs
from tests.features.interop import layouts
from tests.features.interop.layouts import Truth, truth

MPP = 0.25


def imported(source: Path, out: Path, **options: Any) -> tuple[FeatureFile, ConversionReport]:
    """Import a source of one slide and open what came of it."""
    report = import_features(source, out, **options)
    assert report.failures == (), report.failures
    (outcome,) = report.outcomes
    return read_feature_file(out / f"{outcome.slide_id}.h5"), report


def failure(source: Path, out: Path, **options: Any) -> str:
    """Return why the one slide of a source failed."""
    report = import_features(source, out, **options)
    (outcome,) = report.failures
    assert not list(out.rglob("*.h5"))
    return outcome.message


def assert_same(file: FeatureFile, made: Truth) -> None:
    expected = made.sorted()
    assert file.coords_l0 is not None
    assert file.coords_l0.dtype == np.int32
    np.testing.assert_array_equal(file.coords_l0, expected.corners)
    np.testing.assert_array_equal(file.features, expected.features)


def extra(file: FeatureFile, name: str) -> Any:
    with h5py.File(file.path) as content:
        return content[name][()]


# --- CLAM -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_clam_with_its_patches(tmp_path: Path, batched: bool) -> None:
    made = truth()
    layouts.clam_patches(tmp_path / "clam", "a", made.corners)
    layouts.clam_features(tmp_path / "clam" / "features", "a", made, batched=batched)
    file, report = imported(tmp_path / "clam", tmp_path / "out", encoder="uni", mpp=MPP)
    assert report.layout == "clam"
    assert_same(file, made)
    assert file.features.dtype == np.float16
    assert file.attributes["extent_l0"] == 512.0
    assert file.attributes["tile_px_l0"] == 512
    assert file.attributes["tile_px"] == 256
    assert file.attributes["mpp_effective"] == pytest.approx(0.5)
    assert file.attributes["mpp_source"] == "override"
    assert "width_l0" not in file.attributes  # level_dim is that of level 1
    assert file.encoder == {"name": "uni", "imported_from": "clam", "imported_as": "unknown"}
    assert file.weights_sha256 == "unknown"
    h5 = tmp_path / "clam" / "features" / "h5_files" / "a.h5"
    assert file.fields["stage"] == "import"
    assert file.fields["layout"] == "clam"
    assert file.fields["source_sha256"] == sha256_of_file(h5)
    np.testing.assert_array_equal(extra(file, "coords_source"), made.sorted().corners)


def test_clam_at_level_0_knows_the_slide_size_and_custom_downsample(tmp_path: Path) -> None:
    made = truth()
    layouts.clam_patches(
        tmp_path, "a", made.corners, patch_level=0, downsample=(1, 1), custom_downsample=2
    )
    layouts.clam_features(tmp_path, "a", made)
    file, _ = imported(tmp_path / "h5_files", tmp_path / "out", mpp=MPP)
    assert file.attributes["extent_l0"] == 512.0
    assert (file.attributes["width_l0"], file.attributes["height_l0"]) == (10000, 8000)


@pytest.mark.parametrize("beside", ["h5_files", "patches"])
def test_a_pt_takes_its_places_from_beside(tmp_path: Path, beside: str) -> None:
    made = truth()
    layouts.clam_features(tmp_path, "a", made)
    if beside == "patches":
        (tmp_path / "h5_files" / "a.h5").unlink()
        layouts.clam_patches(tmp_path, "a", made.corners)
    file, report = imported(tmp_path / "pt_files" / "a.pt", tmp_path / "out", mpp=MPP)
    assert_same(file, made)
    assert ("extent_l0" in file.attributes) == (beside == "patches")
    warned = " ".join(report.outcomes[0].warnings)
    assert ("tile size is not known" in warned) == (beside == "h5_files")


def test_a_lone_pt_is_a_bag_without_places(tmp_path: Path) -> None:
    made = truth()
    layouts.clam_features(tmp_path / "clam", "a", made)
    (tmp_path / "clam" / "h5_files" / "a.h5").unlink()
    file, report = imported(tmp_path / "clam", tmp_path / "out")
    assert file.coords_l0 is None
    np.testing.assert_array_equal(file.features, made.features)
    assert "no heatmaps" in report.outcomes[0].warnings[0]


def test_a_pt_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pt_files"
    folder.mkdir()
    torch.save({"features": Path("x")}, folder / "a.pt")
    assert "can't be read" in failure(folder, tmp_path / "out")
    torch.save([torch.zeros(2, 3)], folder / "a.pt")
    assert "as eva writes it" in failure(folder, tmp_path / "out")


def test_patches_of_another_run_are_refused(tmp_path: Path) -> None:
    made = truth()
    layouts.clam_patches(tmp_path, "a", made.corners + 1)
    layouts.clam_features(tmp_path, "a", made)
    assert "holds other coordinates" in failure(tmp_path / "h5_files", tmp_path / "out")


def test_an_old_clam_file_needs_the_slide_for_its_level(tmp_path: Path) -> None:
    made = truth(count=6, step=100, columns=3)
    layouts.clam_patches(tmp_path / "c", "a", made.corners, patch_size=32, downsample=None)
    layouts.clam_features(tmp_path / "c", "a", made)
    assert "--slides TABLE" in failure(tmp_path / "c" / "h5_files", tmp_path / "out")
    slide = tmp_path / "a.svs"
    build_svs(slide, width_px=1200, height_px=1024, downsamples=(1, 4), mpp=0.5)
    rows = {"a": SlideRow(slide_id="a", path=slide, patient_id="a")}
    file, _ = imported(tmp_path / "c" / "h5_files", tmp_path / "out", slides=rows)
    assert file.attributes["extent_l0"] == 128.0
    assert file.attributes["width_l0"] == 1200
    assert file.fields["slide"]["size_bytes"] == slide.stat().st_size


# --- TRIDENT and AtlasPatch -----------------------------------------------------------------


@pytest.mark.parametrize("coords_dtype", ["int64", "int32", "uint32", "uint16"])
def test_trident(tmp_path: Path, coords_dtype: str) -> None:
    made = truth(dimension=1024)
    layouts.trident_features(tmp_path / "job", "a", made, coords_dtype=coords_dtype)
    file, report = imported(tmp_path / "job", tmp_path / "out")
    assert report.layout == "trident"
    assert any("coordinates and no features" in note for note in report.notes)
    assert any("--mpp" in warning for warning in report.outcomes[0].warnings)
    assert_same(file, made)
    assert file.encoder["name"] == "uni"
    assert file.encoder["imported_as"] == "uni_v1"
    assert file.attributes["extent_l0"] == 512.0
    assert (file.attributes["tile_px"], file.attributes["overlap_px"]) == (256, 0)
    assert file.attributes["mpp"] == 0.5
    assert (file.attributes["width_l0"], file.attributes["height_l0"]) == (10000, 8000)
    assert "mpp_x_l0" not in file.attributes


def test_an_encoder_of_another_width_keeps_its_foreign_name(tmp_path: Path) -> None:
    layouts.trident_features(tmp_path / "job", "a", truth(dimension=7))
    file, _ = imported(tmp_path / "job", tmp_path / "out")
    assert file.encoder["name"] == "uni_v1"


@pytest.mark.parametrize("custom", [2, None])
def test_trident_of_old(tmp_path: Path, custom: int | None) -> None:
    made = truth()
    layouts.trident_legacy(tmp_path / "job", "a", made, custom_downsample=custom)
    file, report = imported(tmp_path / "job", tmp_path / "out")
    assert report.layout == "trident"
    assert_same(file, made)
    assert file.attributes["extent_l0"] == 256.0 * (custom or 1)
    assert file.encoder["imported_as"] == "conch_v1"  # from the folder's name


def test_two_encoders_of_trident_are_not_mixed(tmp_path: Path) -> None:
    made = truth()
    for encoder in ("uni_v1", "phikon"):
        layouts.trident_features(tmp_path, "a", made, encoder=encoder)
    with pytest.raises(ConfigError, match=r"features_phikon.*features_uni_v1.*give the folder"):
        import_features(tmp_path, tmp_path / "out")
    folder = tmp_path / "20x_256px_0px_overlap" / "features_phikon"
    file, _ = imported(folder, tmp_path / "out")
    assert file.encoder["name"] == "phikon"


def test_a_slide_without_tissue_is_skipped(tmp_path: Path) -> None:
    path = layouts.trident_features(tmp_path / "job", "a", truth())
    with h5py.File(path, "r+") as file:
        attributes = dict(file["coords"].attrs)
        del file["features"], file["coords"]
        file["features"] = np.zeros(0, np.float32)
        file["coords"] = np.zeros((0, 2), np.int64)
        file["coords"].attrs.update(attributes)
    report = import_features(tmp_path / "job", tmp_path / "out")
    assert report.counts == {"done": 0, "skipped": 1, "failed": 0}
    assert "no tiles" in report.outcomes[0].warnings[0]


def test_atlaspatch_asks_which_encoder(tmp_path: Path) -> None:
    made = truth(dimension=1024)
    encoders = {"uni_v1": made.features, "resnet50": made.features[:, :9] * 2}
    layouts.atlaspatch_file(tmp_path / "ap", "a", made, encoders)
    assert "holds features of resnet50, uni_v1" in failure(tmp_path / "ap", tmp_path / "out")
    file, report = imported(tmp_path / "ap", tmp_path / "out", encoder="uni", mpp=MPP)
    assert report.layout == "atlaspatch"
    assert_same(file, made)
    assert file.encoder["name"] == "uni"
    assert file.attributes["extent_l0"] == 512.0
    assert extra(file, "coords_source").shape == (12, 5)
    file, _ = imported(tmp_path / "ap", tmp_path / "other", encoder="resnet50")
    np.testing.assert_array_equal(file.features, (made.features[:, :9] * 2)[_order(made)])


def _order(made: Truth) -> list[int]:
    return sorted(range(len(made.corners)), key=lambda i: tuple(made.corners[i][::-1]))


# --- STAMP ----------------------------------------------------------------------------------


@pytest.mark.parametrize("age", ["current", "v2.0"])
@pytest.mark.parametrize("dataset", ["feats", "patch_embeddings"])
def test_stamp(tmp_path: Path, age: Any, dataset: str) -> None:
    mpp = 0.2527
    corners = np.rint(truth().corners / 512 * (256 / mpp)).astype(int)
    made = Truth(corners, truth(dimension=1536).features)
    layouts.stamp_features(tmp_path / "s", "a", made, mpp=mpp, age=age, dataset=dataset)
    file, report = imported(tmp_path / "s", tmp_path / "out", mpp=mpp)
    assert report.layout == "stamp"
    assert_same(file, made)
    assert file.attributes["extent_l0"] == pytest.approx(256 / mpp)
    assert file.encoder["name"] == "uni2-h"
    if age == "current":
        assert file.attributes["mpp"] == pytest.approx(256 / 224)
    assert extra(file, "coords_source").dtype == np.float64


def test_stamp_of_old_has_a_stride_of_224(tmp_path: Path) -> None:
    step = round(256 / MPP)
    made = truth(step=step)
    layouts.stamp_features(tmp_path / "s", "a", made, mpp=MPP, age="historic")
    file, _ = imported(tmp_path / "s", tmp_path / "out", mpp=MPP)
    assert_same(file, made)
    assert file.attributes["extent_l0"] == 256 / MPP
    assert file.attributes["tile_px"] == 224
    assert file.encoder["imported_as"] == "uni2"


def test_stamp_refusals(tmp_path: Path) -> None:
    made, out = truth(), tmp_path / "out"
    path = layouts.stamp_features(tmp_path / "s", "a", made, mpp=MPP, version="99.0.0")
    assert "newer than 2.5" in failure(tmp_path / "s", out, mpp=MPP)
    with h5py.File(path, "r+") as file:
        file.attrs["stamp_version"] = "2.4.0"
    assert "--slides TABLE, or pass --mpp" in failure(tmp_path / "s", out)
    with h5py.File(path, "r+") as file:
        file.attrs["feat_type"] = "patient"
    assert "one vector per patient" in failure(tmp_path / "s", out, mpp=MPP)
    with h5py.File(path, "r+") as file:
        file.attrs["feat_type"] = "tile"
        del file.attrs["tile_size_um"]
    assert "states no tile size" in failure(tmp_path / "s", out, mpp=MPP)


def test_the_pixel_size_comes_from_the_slide(tmp_path: Path) -> None:
    slide = tmp_path / "a.svs"
    build_svs(slide, width_px=1200, height_px=1024, mpp=0.5)
    made = truth(count=6, step=128, columns=3)
    layouts.stamp_features(tmp_path / "s", "a", made, mpp=0.5, tile_um=64.0)
    rows = {"a": SlideRow(slide_id="a", path=slide, patient_id="p")}
    file, _ = imported(tmp_path / "s", tmp_path / "out", slides=rows)
    assert_same(file, made)
    assert file.attributes["mpp_x_l0"] == 0.5
    assert file.attributes["mpp_source"] != "override"
    assert file.attributes["bounds_l0"].tolist() == [0, 0, 1200, 1024]
    assert "lies at" in failure(tmp_path / "s", tmp_path / "no", slides=rows, mpp=0.1)
    assert "no slide 'a'" in failure(tmp_path / "s", tmp_path / "no", slides={})


# --- slideflow, hs2p ------------------------------------------------------------------------


def test_slideflow_centres_become_corners(tmp_path: Path) -> None:
    made = truth()
    layouts.slideflow_bag(tmp_path / "bags", "a", made, tile_um=128, extent_l0=512)
    file, report = imported(tmp_path / "bags", tmp_path / "out", mpp=MPP)
    assert report.layout == "slideflow"
    assert_same(file, made)
    assert file.attributes["extent_l0"] == 512.0
    assert file.encoder["imported_as"] == "slideflow.model.extractors.CTransPath"
    np.testing.assert_array_equal(extra(file, "coords_source"), made.sorted().corners + 256)
    assert "centres" in failure(tmp_path / "bags", tmp_path / "no")


def test_slideflow_needs_micrometres(tmp_path: Path) -> None:
    layouts.slideflow_bag(tmp_path / "bags", "a", truth(), tile_um="20x", extent_l0=512)
    assert "'20x', a magnification" in failure(tmp_path / "bags", tmp_path / "out", mpp=MPP)
    (tmp_path / "bags" / "bags_config.json").unlink()
    assert "bags_config.json" in failure(tmp_path / "bags", tmp_path / "out", mpp=MPP)


def test_hs2p_with_features_beside(tmp_path: Path) -> None:
    made = truth(step=500)
    layouts.hs2p_tiles(tmp_path / "run", "a", made.corners, vectors=made.features)
    file, report = imported(tmp_path / "run", tmp_path / "out")
    assert report.layout == "hs2p"
    assert_same(file, made)
    assert file.attributes["extent_l0"] == 500.0
    assert file.attributes["mpp_x_l0"] == pytest.approx(0.256)
    assert file.attributes["mpp"] == 0.5


def test_hs2p_without_features(tmp_path: Path) -> None:
    layouts.hs2p_tiles(tmp_path / "run", "a", truth().corners)
    assert "holds coordinates and no features" in failure(tmp_path / "run", tmp_path / "out")


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
        labels = (np.arange(len(made.corners)) % 2)[_order(made)]
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
