from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from bagscope.artifacts import fingerprint
from bagscope.errors import ArtifactError, SchemaError
from bagscope.wsi.opening import open_slide
from bagscope.wsi.tile_file import read_tile_file, read_tile_record, write_tile_file
from bagscope.wsi.tiles import TileSet, tile_slide
from bagscope.wsi.tiling import TilingSpec
from tests.stained import build_stained_svs

FIELDS = {"spec": {"mpp": 1.0}, "numerics": 1}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> TileSet:
    path = build_stained_svs(tmp_path_factory.mktemp("slide") / "a.svs", mpp=1.0)
    with open_slide(path) as slide:
        spec = TilingSpec(mpp=1.0, tile_px=64, coarser_mpp=(2.0,), overlap_px=16)
        return tile_slide(slide, spec).tiles


def write(path: Path, tiles: TileSet) -> Path:
    write_tile_file(
        path,
        tiles,
        slide_id="case-1",
        fields=FIELDS,
        tissue_method="test-1",
        outline_geojson='{"µ": 1}',
        summary={"tiles": len(tiles)},
    )
    return path


def test_what_was_written_is_read_back(tiles: TileSet, tmp_path: Path) -> None:
    back = read_tile_file(write(tmp_path / "a.h5", tiles))
    assert back.coords_l0.dtype == back.grid.dtype == np.int32
    np.testing.assert_array_equal(back.coords_l0, tiles.coords_l0)
    np.testing.assert_array_equal(back.grid, tiles.grid)
    np.testing.assert_array_equal(back.parent, tiles.parent)
    for name in ("tissue", "pen", "fold", "sharpness"):
        np.testing.assert_array_equal(getattr(back, name), getattr(tiles, name))
    assert back.spacing == tiles.spacing
    assert back.bounds_l0 == tiles.info.bounds_l0
    assert back.outline_geojson == '{"µ": 1}'
    assert back.fields == FIELDS
    assert back.attributes["fingerprint"] == fingerprint(FIELDS)
    record = read_tile_record(tmp_path / "a.h5")
    assert record.summary == {"tiles": len(tiles)}
    assert record.fields == FIELDS


def test_positions_follow_from_the_attributes(tiles: TileSet, tmp_path: Path) -> None:
    back = read_tile_file(write(tmp_path / "a.h5", tiles))
    expected = np.rint(back.attributes["origin_l0"] + back.grid * back.attributes["step_l0"])
    np.testing.assert_array_equal(back.coords_l0, expected.astype(np.int32))
    assert back.attributes["step_l0"] == 48.0


def test_the_same_tiles_give_the_same_bytes(tiles: TileSet, tmp_path: Path) -> None:
    one = write(tmp_path / "a.h5", tiles).read_bytes()
    assert write(tmp_path / "b.h5", tiles).read_bytes() == one


def test_readers_of_trident_coordinates_find_what_they_look_for(
    tiles: TileSet, tmp_path: Path
) -> None:
    with h5py.File(write(tmp_path / "a.h5", tiles)) as file:
        attributes = dict(file["coords"].attrs)
    assert attributes["patch_size"] == 64
    assert attributes["patch_size_level0"] == 64
    assert attributes["target_magnification"] == 10
    assert attributes["level0_magnification"] == 10
    assert attributes["overlap"] == 16
    assert attributes["name"] == "case-1"
    assert attributes["level0_width"] == tiles.info.width_l0
    assert attributes["level0_height"] == tiles.info.height_l0
    assert attributes["savetodir"] == ""


def test_no_path_is_in_the_file(tiles: TileSet, tmp_path: Path) -> None:
    content = write(tmp_path / "a.h5", tiles).read_bytes()
    assert str(tmp_path).encode() not in content
    assert str(tiles.info.path.parent).encode() not in content


def drop_coords(file: h5py.File) -> None:
    del file["coords"]


def shorten(file: h5py.File) -> None:
    values = file["grid"][:-1]
    del file["grid"]
    file["grid"] = values


def retype(file: h5py.File) -> None:
    values = file["tissue"][:].astype("S4")
    del file["tissue"]
    file["tissue"] = values


def forge(file: h5py.File) -> None:
    file.attrs["fingerprint_fields"] = json.dumps({"spec": "another"})


def age(file: h5py.File) -> None:
    file.attrs["schema_version"] = 99


def rename(file: h5py.File) -> None:
    file.attrs["schema"] = "somebody.else"


def forget(file: h5py.File) -> None:
    del file.attrs["step_l0"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_coords, "lacks the dataset 'coords'"),
        (shorten, "different lengths"),
        (retype, "expected floats"),
        (forge, "not that of its fields"),
        (age, "newer than 1"),
        (rename, "expected 'bagscope.tiles'"),
        (forget, "lacks the attributes step_l0"),
    ],
)
def test_each_damage_is_named(
    tiles: TileSet, tmp_path: Path, damage: Callable[[h5py.File], None], message: str
) -> None:
    path = write(tmp_path / "a.h5", tiles)
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(SchemaError, match=message) as caught:
        read_tile_file(path)
    assert "a.h5" in str(caught.value)


def test_a_file_cut_short_is_named(tiles: TileSet, tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", tiles)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SchemaError, match="not a readable HDF5 file"):
        read_tile_file(path)
    with pytest.raises(ArtifactError, match="no such tile file"):
        read_tile_file(tmp_path / "absent.h5")
