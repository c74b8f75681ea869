from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from bagscope.errors import ConfigError
from bagscope.features.interop import recognise
from bagscope.features.interop.recognition import content_of_h5
from tests.features.interop import layouts
from tests.features.interop.layouts import truth


def h5(path: Path, coords: dict[str, object] | None, **datasets: object) -> Path:
    """Write an h5 with the given attributes on coords (None for no coords) and datasets."""
    with h5py.File(path, "w") as file:
        if coords is not None:
            file["coords"] = np.zeros((2, 2), np.int64)
            file["coords"].attrs.update(coords)
        for name, values in datasets.items():
            file[name] = values
    return path


TILES = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("content", "coords", "datasets"),
    [
        ("stamp", {}, {"feats": TILES}),
        ("stamp", {}, {"patch_embeddings": TILES}),
        ("trident", {"patch_size_level0": 512}, {"features": TILES}),
        ("trident", {"patch_level": 0, "patch_size": 256}, {"features": TILES}),
        ("clam", {}, {"features": TILES}),
        ("clam", None, {"features": TILES}),
        ("atlaspatch", {}, {"features/uni_v1": TILES}),
        ("coordinates", {"patch_size_level0": 512}, {}),
        ("coordinates", {"patch_level": 0}, {}),
        ("coordinates", {}, {"imgs": np.zeros((2, 4, 4, 3), np.uint8)}),
        ("wsinfer", {"patch_spacing_um_px": 0.25, "patch_level": 0}, {}),
        ("slide-vectors", {}, {"features": np.zeros(768, np.float32)}),
        ("unknown", None, {"something": TILES}),
    ],
)
def test_an_h5_by_its_evidence(
    tmp_path: Path, content: str, coords: dict[str, object] | None, datasets: dict[str, object]
) -> None:
    assert content_of_h5(h5(tmp_path / "a.h5", coords, **datasets)) == content


@pytest.mark.parametrize(
    ("name", "coords", "datasets", "said"),
    [
        ("a.h5", {"patch_size_level0": 512}, {}, "holds coordinates and no features"),
        ("a.h5", {"patch_spacing_um_px": 0.25}, {}, "wsinfer's coordinates"),
        ("a.h5", {}, {"features": np.zeros(9, np.float32)}, "one vector for the whole slide"),
        ("a.h5", None, {"x": TILES}, "of no layout that is known here"),
        ("a.bin", None, {"x": TILES}, "of no layout that is known here"),
    ],
)
def test_a_file_that_can_not_be_imported_is_told_why(
    tmp_path: Path,
    name: str,
    coords: dict[str, object] | None,
    datasets: dict[str, object],
    said: str,
) -> None:
    with pytest.raises(ConfigError, match=said):
        recognise(h5(tmp_path / name, coords, **datasets))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        recognise(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no h5, pt or npz files"):
        recognise(tmp_path)
    h5(tmp_path / "a.h5", {"patch_level": 0})
    with pytest.raises(ConfigError, match="holds coordinates and no features"):
        recognise(tmp_path)


def test_a_pt_is_slideflow_with_an_index_beside(tmp_path: Path) -> None:
    layouts.slideflow_bag(tmp_path / "sf", "a", truth(), tile_um=128, extent_l0=512)
    (tmp_path / "clam").mkdir()
    torch.save(torch.zeros(2, 3), tmp_path / "clam" / "a.pt")
    assert recognise(tmp_path / "sf").layout == "slideflow"
    assert recognise(tmp_path / "sf" / "a.pt").layout == "slideflow"
    assert recognise(tmp_path / "clam").layout == "clam"
    with pytest.raises(ConfigError, match=r"several layouts \(clam, slideflow\)"):
        recognise(tmp_path)


def test_clam_is_one_bag_per_slide_though_it_has_three_files(tmp_path: Path) -> None:
    made = truth()
    for name in ("a", "b"):
        layouts.clam_patches(tmp_path, name, made.corners)
        layouts.clam_features(tmp_path / "features", name, made)
    (tmp_path / "process_list_autogen.csv").write_text("slide_id,status\na,done\n")
    found = recognise(tmp_path)
    assert [(s.slide_id, s.path.parent.name) for s in found.sources] == [
        ("a", "h5_files"),
        ("b", "h5_files"),
    ]
    assert all("tiling" in s.companions for s in found.sources)
    assert found.notes == (
        "2 files left out: each holds coordinates and no features; give the features made from "
        "them, or run bagscope extract",
    )


def test_slide_vectors_of_trident_are_left_out(tmp_path: Path) -> None:
    layouts.trident_features(tmp_path, "a", truth())
    folder = tmp_path / "20x_256px_0px_overlap" / "slide_features_titan"
    folder.mkdir()
    h5(folder / "a.h5", {}, features=np.zeros(768, np.float32))
    found = recognise(tmp_path)
    assert [s.path.parent.name for s in found.sources] == ["features_uni_v1"]
    assert any("one vector for the whole slide" in note for note in found.notes)


def test_a_damaged_file_counts_as_a_slide(tmp_path: Path) -> None:
    layouts.trident_features(tmp_path, "a", truth())
    (tmp_path / "b.h5").write_bytes(b"not HDF5 at all")
    found = recognise(tmp_path)
    assert found.layout == "trident"
    assert {s.slide_id: s.layout for s in found.sources} == {"a": "trident", "b": "unreadable"}
