from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bagscope.errors import ConfigError
from bagscope.features.feature_file import (
    FeatureFile,
    FeatureHeader,
    read_feature_file,
    write_feature_file,
)
from bagscope.features.interop import export_features, find_feature_files, import_features
from tests.features.interop.layouts import TRIDENT_ATTRIBUTES

MPP = 0.25
ROUND_TRIPS = ("trident", "clam", "stamp", "torchmil")
TILING = {
    "width_l0": 40000,
    "height_l0": 30000,
    "mpp_x_l0": MPP,
    "mpp_y_l0": MPP,
    "mpp_source": "openslide.mpp-x",
    "mpp_estimated": False,
    "mpp": 0.5,
    "mpp_effective": 0.5,
    "tile_px": 256,
    "tile_px_l0": 512,
    "extent_l0": 512.0,
    "overlap_px": 0,
}


def ours(
    folder: Path,
    slide_id: str = "a",
    *,
    coords: Any = None,
    features: Any = None,
    tile: Any = TILING,
    encoder: str = "uni2-h",
    dtype: Any = "float16",
) -> Path:
    """Write a feature file of ours."""
    if features is None:
        rng = np.random.default_rng(3)
        features = rng.normal(size=(9, 1536)).astype(np.float16)
        coords = np.array(
            [(x * 512 + 7, y * 512 + 9) for y in range(3) for x in range(3)], np.int32
        )
    header = FeatureHeader(
        slide_id=slide_id,
        fields={"stage": "extract", "slide": slide_id},
        encoder={"name": encoder},
        weights_sha256="0123",
        coords_l0=coords,
        tile=tile,
        extra={"tile_labels": np.arange(len(features)) % 3},
    )
    path = folder / f"{slide_id}.h5"
    write_feature_file(path, header, features, dtype=dtype)
    return path


def exported(path: Path, out: Path, to: Any, **options: Any) -> FeatureFile:
    """Export one file of ours and return it as it is read back."""
    report = export_features([path], out, to=to, **options)
    assert report.failures == (), report.failures
    return read_feature_file(path)


def back(source: Path, out: Path, **options: Any) -> FeatureFile:
    """Import what was exported."""
    report = import_features(source, out, **options)
    assert report.failures == (), report.failures
    (outcome,) = report.outcomes
    return read_feature_file(out / f"{outcome.slide_id}.h5")


# --- there and back -------------------------------------------------------------------------


@pytest.mark.parametrize("to", ROUND_TRIPS)
def test_there_and_back(tmp_path: Path, to: str) -> None:
    path = ours(tmp_path)
    there = exported(path, tmp_path / "foreign", to)
    again = back(tmp_path / "foreign", tmp_path / "back", mpp=MPP)
    np.testing.assert_array_equal(again.features, there.features)
    np.testing.assert_array_equal(again.coords_l0, there.coords_l0)
    assert again.features.dtype == np.float16
    if to != "torchmil":
        for name in ("extent_l0", "tile_px_l0", "mpp_x_l0"):
            assert again.attributes[name] == there.attributes[name]
    if to in ("trident", "stamp"):
        assert again.encoder["name"] == "uni2-h"
        assert again.attributes["mpp"] == there.attributes["mpp"]
        assert again.attributes["tile_px"] == there.attributes["tile_px"]


bags = st.integers(0, 6).flatmap(
    lambda count: st.tuples(
        hnp.arrays(np.int32, (count, 2), elements=st.integers(0, 150_000), unique=False).filter(
            lambda c: len(np.unique(c, axis=0)) == len(c)
        ),
        hnp.arrays(np.float16, (count, 3), elements=st.floats(-65504, 65504, width=16)),
    )
)


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    bag=bags, mpp=st.floats(0.1, 2.0), to=st.sampled_from(["trident", "clam", "stamp", "torchmil"])
)
def test_any_bag_comes_back(
    tmp_path_factory: pytest.TempPathFactory, bag: tuple[Any, Any], mpp: float, to: str
) -> None:
    folder = tmp_path_factory.mktemp("bag")
    coords, features = bag
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    coords, features = coords[order], features[order]
    sizes = {"width_l0": 200_000, "height_l0": 200_000}
    tile = {**TILING, **sizes, "mpp_x_l0": mpp, "mpp_y_l0": mpp, "mpp": 2 * mpp}
    path = ours(folder, coords=coords, features=features, tile=tile)
    exported(path, folder / "foreign", to)
    again = back(folder / "foreign", folder / "back", mpp=mpp)
    np.testing.assert_array_equal(again.coords_l0, coords)
    # As bytes, so that -0.0 and subnormals count.
    assert np.asarray(again.features).tobytes() == features.tobytes()


# --- as the tools read them -----------------------------------------------------------------


def test_trident_files_have_what_its_readers_look_for(tmp_path: Path) -> None:
    there = exported(ours(tmp_path), tmp_path / "job", "trident")
    folder = tmp_path / "job" / "20x_256px_0px_overlap"
    with (
        h5py.File(folder / "features_uni_v2" / "a.h5") as features,
        h5py.File(folder / "patches" / "a_patches.h5") as patches,
    ):
        assert features["features"].dtype == np.float32
        assert features["coords"].dtype == patches["coords"].dtype == np.int64
        assert features["features"].attrs["encoder"] == "uni_v2"
        np.testing.assert_array_equal(features["features"][:], there.features)
        for file in (features, patches):
            np.testing.assert_array_equal(file["coords"][:], there.coords_l0)
            attributes = dict(file["coords"].attrs)
            assert set(attributes) == set(TRIDENT_ATTRIBUTES)
            # By TRIDENT's own rule for the footprint.
            assert (
                attributes["patch_size"]
                * attributes["level0_magnification"]
                // attributes["target_magnification"]
                == attributes["patch_size_level0"]
                == 512
            )
            assert (attributes["level0_width"], attributes["level0_height"]) == (40000, 30000)
            assert attributes["savetodir"] == ""


def test_clam_files(tmp_path: Path) -> None:
    there = exported(ours(tmp_path), tmp_path / "clam", "clam")
    with h5py.File(tmp_path / "clam" / "h5_files" / "a.h5") as file:
        assert file["features"].dtype == np.float32
        assert file["coords"].dtype == np.int32
        np.testing.assert_array_equal(file["features"][:], there.features)
        np.testing.assert_array_equal(file["coords"][:], there.coords_l0)
    tensor = torch.load(tmp_path / "clam" / "pt_files" / "a.pt", weights_only=True)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), there.features)
    with h5py.File(tmp_path / "clam" / "patches" / "a.h5") as file:
        assert file["coords"].dtype == np.int64
        attributes = dict(file["coords"].attrs)
    assert attributes["patch_size"] * attributes["downsample"][0] == 512
    assert attributes["patch_level"] == 0
    assert attributes["level_dim"].tolist() == [40000, 30000]
    assert {"name", "save_path", "downsampled_level_dim"} < set(attributes)


def test_stamp_files(tmp_path: Path) -> None:
    there = exported(ours(tmp_path), tmp_path / "stamp", "stamp")
    (path,) = (tmp_path / "stamp").glob("uni2-*/a.h5")
    with h5py.File(path) as file:
        assert file["feats"].dtype == np.float16
        assert file["coords"].dtype == np.float32
        np.testing.assert_array_equal(file["feats"][:], there.features)
        # STAMP's reader: micrometres by the size of a tile give columns and rows.
        assert file.attrs["unit"] == "um"
        assert file.attrs["tile_size_um"] == 128.0
        assert file.attrs["tile_size_px"] == 256
        assert file.attrs["feat_type"] == "tile"
        assert file.attrs["extractor"] == "uni2"
        tiles = (file["coords"][:] - file["coords"][:].min(axis=0)) / file.attrs["tile_size_um"]
        np.testing.assert_array_equal(tiles, [(x, y) for y in range(3) for x in range(3)])


def test_torchmil_folders(tmp_path: Path) -> None:
    there = exported(ours(tmp_path), tmp_path / "mil", "torchmil", labels={"a": "1"})
    root = tmp_path / "mil"
    features = np.load(root / "features" / "features_uni2-h" / "a.npy")
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, there.features)
    np.testing.assert_array_equal(np.load(root / "coords" / "a.npy"), there.coords_l0)
    assert np.load(root / "labels" / "a.npy").tolist() == [1]
    np.testing.assert_array_equal(np.load(root / "patch_labels" / "a.npy"), np.arange(9) % 3)


def test_labels_come_back_from_torchmil(tmp_path: Path) -> None:
    exported(ours(tmp_path), tmp_path / "mil", "torchmil", labels={"a": "1"})
    back(tmp_path / "mil", tmp_path / "back")
    assert (tmp_path / "back" / "cohort.csv").read_text().splitlines()[1] == "a,a.h5,1"


@pytest.mark.parametrize("to", ["anndata", "anndata-zarr"])
def test_anndata_opens_it(tmp_path: Path, to: str) -> None:
    anndata = pytest.importorskip("anndata")
    there = exported(ours(tmp_path), tmp_path / "ad", to, labels={"a": "tumour"})
    if to == "anndata":
        data = anndata.read_h5ad(tmp_path / "ad" / "a.h5ad")
    else:
        data = anndata.read_zarr(tmp_path / "ad" / "a.zarr")
    assert data.X.dtype == np.float32
    np.testing.assert_array_equal(data.X, there.features)
    assert there.coords_l0 is not None
    np.testing.assert_array_equal(data.obsm["spatial"], there.coords_l0 + 256)
    np.testing.assert_array_equal(data.obs[["x_l0", "y_l0"]].to_numpy(), there.coords_l0)
    assert data.obs["tile_id"].tolist() == list(range(9))
    assert data.obs["library_id"].unique().tolist() == ["a"]
    assert data.obs["tile_label"].tolist() == [0, 1, 2] * 3
    factors = data.uns["spatial"]["a"]["scalefactors"]
    assert factors["spot_diameter_fullres"] == 512.0
    said = data.uns["bagscope"]
    assert said["spatial"] == "centre_l0"
    assert said["mpp_l0"] == MPP
    assert said["label"] == "tumour"
    assert json.loads(said["encoder"]) == {"name": "uni2-h"}


def test_anndata_of_a_bag_without_places(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    exported(ours(tmp_path, features=np.ones((3, 4), np.float16), tile={}), tmp_path, "anndata")
    data = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert data.shape == (3, 4)
    assert not data.obsm
    assert "spatial" not in data.uns


def test_anndata_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "anndata", None)
    with pytest.raises(ConfigError, match="pip install anndata"):
        export_features([ours(tmp_path)], tmp_path / "ad", to="anndata")


# --- what can't be written ------------------------------------------------------------------


def refusal(path: Path, out: Path, to: Any, **options: Any) -> str:
    """Return why the one file could not be exported."""
    (failed,) = export_features([path], out, to=to, **options).failures
    assert not [p for p in out.rglob("*") if p.is_file()]
    return failed.message


def test_bags_without_places(tmp_path: Path) -> None:
    vectors = np.ones((3, 4), np.float16)
    path = ours(tmp_path, features=vectors, tile={})
    assert "holds no coordinates" in refusal(path, tmp_path / "t", "trident")
    assert "holds no coordinates" in refusal(path, tmp_path / "s", "stamp")
    for to in ("torchmil", "clam"):
        exported(path, tmp_path / to, to)
    again = back(tmp_path / "clam", tmp_path / "back")
    assert again.coords_l0 is None
    np.testing.assert_array_equal(again.features, vectors)


def test_sizes_that_are_not_known_are_named(tmp_path: Path) -> None:
    known = {name: value for name, value in TILING.items() if not name.startswith("mpp")}
    path = ours(tmp_path, features=np.ones((1, 2)), coords=np.array([[3, 4]]), tile=known)
    assert "need mpp, which is not known" in refusal(path, tmp_path / "t", "trident")
    assert "mpp_x_l0, mpp_y_l0" in refusal(path, tmp_path / "s", "stamp")
    exported(path, tmp_path / "clam", "clam")


def test_stamp_has_no_room_for_float32(tmp_path: Path) -> None:
    large = np.full((1, 2), 1e6, np.float32)
    path = ours(tmp_path, features=large, coords=np.array([[3, 4]]))
    assert "float16 does not hold" in refusal(path, tmp_path / "s", "stamp")
    exported(path, tmp_path / "t", "trident")
    np.testing.assert_array_equal(back(tmp_path / "t", tmp_path / "b").features, large)


def test_torchmil_labels_are_numbers(tmp_path: Path) -> None:
    path = ours(tmp_path)
    assert "label is 'yes'" in refusal(path, tmp_path / "m", "torchmil", labels={"a": "yes"})


# --- a second run ---------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["trident", "clam", "stamp", "torchmil", "anndata", "anndata-zarr"])
def test_a_second_export_writes_only_what_is_missing(tmp_path: Path, to: Any) -> None:
    if to.startswith("anndata"):
        pytest.importorskip("anndata")
    path, out = ours(tmp_path), tmp_path / "foreign"
    exported(path, out, to)
    made = [p for p in out.rglob("*") if p.is_file()]
    assert export_features([path], out, to=to).counts["skipped"] == 1
    assert not list(out.rglob("*.tmp"))
    # Files of the layout alone: a status that was lost is no licence to replace them.
    for status in (out / "status").rglob("*.json"):
        assert str(tmp_path) not in status.read_text()
        status.unlink()
    assert export_features([path], out, to=to).counts["failed"] == 1
    assert export_features([path], out, to=to, overwrite=True).counts["done"] == 1
    assert sorted(made) == sorted(p for p in out.rglob("*") if p.is_file())


def test_a_missing_part_is_made_again_and_another_source_refused(tmp_path: Path) -> None:
    path, out = ours(tmp_path), tmp_path / "clam"
    exported(path, out, "clam")
    (out / "pt_files" / "a.pt").unlink()
    assert export_features([path], out, to="clam").counts["done"] == 1
    assert (out / "pt_files" / "a.pt").exists()
    ours(tmp_path, encoder="another")
    (failed,) = export_features([path], out, to="clam").failures
    assert "was not made from this a.h5; pass --overwrite" in failed.message


def test_one_damaged_file_stops_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    for name in ("a", "b", "c"):
        ours(folder, name)
    (folder / "b.h5").write_bytes((folder / "b.h5").read_bytes()[:500])
    report = export_features(find_feature_files(folder), tmp_path / "t", to="trident")
    assert report.counts == {"done": 2, "skipped": 0, "failed": 1}
    assert report.failures[0].slide_id == "b"


def test_a_misspelt_layout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trident"):
        export_features([ours(tmp_path)], tmp_path / "x", to="tridnt")  # type: ignore[arg-type]


def test_nothing_warns_when_read_by_others(tmp_path: Path) -> None:
    pytest.importorskip("anndata")
    zarr = pytest.importorskip("zarr")
    exported(ours(tmp_path), tmp_path / "ad", "anndata-zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(tmp_path / "ad" / "a.zarr", mode="r")
        assert {"X", "obs", "obsm", "uns"} <= {name for name, _ in group.members()}
