"""Slides of every foreign layout, imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from bagscope.artifacts import sha256_of_file
from bagscope.cohort.table import SlideRow
from bagscope.errors import ConfigError
from bagscope.features.interop import import_features
from tests.builders import build_svs
from tests.features.interop import layouts
from tests.features.interop.imports import MPP, assert_same, extra, failure, imported, stored_order
from tests.features.interop.layouts import Truth, truth

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
    np.testing.assert_array_equal(file.features, (made.features[:, :9] * 2)[stored_order(made)])


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
