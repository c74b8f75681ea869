from __future__ import annotations

import gzip
import json
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from shapely.geometry import box, shape

from bagscope.errors import ConfigError
from bagscope.heatmaps.colours import ColourScale, shared_scale
from bagscope.heatmaps.geojson import hot_regions, write_geojson
from bagscope.heatmaps.tile_places import places_of
from bagscope.wsi.geojson import read_regions
from bagscope.wsi.outline import Polygon, Region
from tests.heatmaps.made import made_places


@pytest.fixture
def colours() -> ColourScale:
    return shared_scale("ratio", "log_weight", [(0.25, 4.0)])


def features_of(path: Path) -> list[dict[str, Any]]:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["type"] == "FeatureCollection"
    found: list[dict[str, Any]] = document["features"]
    return found


@pytest.mark.parametrize("frame", ["qupath", "openslide"])
def test_level_0_coordinates_come_back_exactly(
    tmp_path: Path, colours: ColourScale, frame: Any
) -> None:
    rng = np.random.default_rng(0)
    places = made_places(9, 7, extent_l0=511.87, origin_l0=(10_321.0, 20_007.0))
    values = rng.uniform(0.2, 5, len(places))
    path = tmp_path / "map.geojson"
    write_geojson(
        path, places, values, colours, slide_id="s", measurements={"ratio": values}, frame=frame
    )
    tiles = [f for f in features_of(path) if f["properties"]["objectType"] == "tile"]
    shift = (10_321, 20_007) if frame == "qupath" else (0, 0)
    corners = [np.min(f["geometry"]["coordinates"][0], axis=0) + shift for f in tiles]
    np.testing.assert_array_equal(corners, places.coords_l0)
    read = [r for r in read_regions(path, bounds_l0=places.area_l0) if r.object_type == "tile"]
    back = np.array([region.polygons[0].exterior_l0.min(axis=0) for region in read])
    np.testing.assert_array_equal(back, places.coords_l0)
    np.testing.assert_allclose([r.measurements["ratio"] for r in read], values, rtol=1e-5)


def test_what_qupath_needs_is_there(tmp_path: Path, colours: ColourScale) -> None:
    places = made_places(6, 6)
    values = np.random.default_rng(1).uniform(0.2, 5, 36)
    tissue = [
        Region(class_name="Tissue", polygons=(Polygon(exterior_l0=np.array(box_of(places))),))
    ]
    path = tmp_path / "map.geojson"
    measured = {"ratio": values}
    for name in ("map.geojson", "again.geojson"):
        write_geojson(
            tmp_path / name,
            places,
            values,
            colours,
            slide_id="s",
            measurements=measured,
            tissue=tissue,
        )
    assert path.read_bytes() == (tmp_path / "again.geojson").read_bytes()
    features = features_of(path)
    kinds = [f["properties"]["objectType"] for f in features]
    assert set(kinds) == {"annotation", "tile"}
    assert kinds.count("tile") == 36
    assert len({uuid.UUID(f["id"]) for f in features}) == len(features)
    for feature in features:
        properties, geometry = feature["properties"], shape(feature["geometry"])
        label = properties.get("classification", properties)
        assert len(label["color"]) == 3
        assert geometry.is_valid
        assert geometry.exterior.is_ccw
        assert all(isinstance(v, float | int) for v in properties.get("measurements", {}).values())
    named = {f["properties"].get("classification", {}).get("name") for f in features}
    assert named == {None, "Tissue", "ratio ≥ 2", "ratio ≥ 4"}


def box_of(places: Any) -> list[tuple[float, float]]:
    area = places.area_l0
    x, y = area.x_l0 + area.width_l0, area.y_l0 + area.height_l0
    return [(area.x_l0, area.y_l0), (x, area.y_l0), (x, y), (area.x_l0, y)]


@pytest.mark.parametrize("seed", range(5))
def test_hot_regions_are_the_union_of_the_hot_tiles(seed: int, colours: ColourScale) -> None:
    rng = np.random.default_rng(seed)
    keep = rng.random(400) < 0.9
    places = made_places(20, 20, extent_l0=63.7, keep=keep, mpp=0.5)
    values = rng.uniform(0.2, 5, keep.sum())
    found = hot_regions(places, values, 2.0, colours)
    merged = [shapely.Polygon(r.polygons[0].exterior_l0, r.polygons[0].holes_l0) for r in found]
    assert all(polygon.is_valid for polygon in merged)
    # A pixel and a half at most lies between a rounded corner and the next tile's.
    hot = shapely.union_all(
        [box(x, y, x + 63.7, y + 63.7) for x, y in places.coords_l0[values >= 2.0]]
    )
    difference = shapely.union_all(merged).symmetric_difference(hot).buffer(-0.75).area
    assert difference == 0
    assert any(polygon.interiors for polygon in merged)
    assert sum(region.measurements["tiles"] for region in found) == (values >= 2.0).sum()
    for region, polygon in zip(found, merged, strict=True):
        mm2 = polygon.area * 0.25 / 1e6
        assert region.measurements["area mm²"] == pytest.approx(mm2, rel=1e-5)
        within = [
            value
            for value, (x, y) in zip(values, places.coords_l0 + 32, strict=True)
            if polygon.contains(shapely.Point(x, y))
        ]
        assert region.measurements["tiles"] == len(within)
        assert region.measurements["highest ratio"] == pytest.approx(max(within), rel=1e-5)
        assert region.measurements["mean ratio"] == pytest.approx(np.mean(within), rel=2e-2)


def test_beyond_many_tiles_regions_only(tmp_path: Path, colours: ColourScale) -> None:
    places = made_places(5, 5)
    values = np.full(25, 3.0)
    path = tmp_path / "map.geojson"
    how: dict[str, Any] = {"slide_id": "s", "measurements": {"ratio": values}}
    (said,) = write_geojson(path, places, values, colours, max_tiles=24, **how)
    assert "25 tiles" in said
    (region,) = features_of(path)
    assert region["properties"]["measurements"]["tiles"] == 25
    with pytest.raises(ConfigError, match="--levels"):
        write_geojson(path, places, values, colours, max_tiles=24, levels=(), **how)


def test_tiles_off_any_lattice_are_told_and_drawn_alone(
    tmp_path: Path, colours: ColourScale
) -> None:
    coords = np.random.default_rng(0).permutation(60_000).reshape(-1, 2)[:5000].astype(np.int32)
    places = places_of(coords, None, {"extent_l0": 256.0, "step_l0": 256.0}, 5000)
    path = tmp_path / "map.geojson"
    (said,) = write_geojson(
        path, places, np.full(5000, 3.0), colours, slide_id="s", measurements={}
    )
    assert "no lattice" in said
    assert len(features_of(path)) == 5000


def test_packed_files_hold_the_same(tmp_path: Path, colours: ColourScale) -> None:
    places = made_places(3, 3)
    values = np.linspace(0.5, 3, 9)
    names = ("m.geojson", "m.geojson.gz", "m.geojson.zip")
    for name in names:
        write_geojson(
            tmp_path / name, places, values, colours, slide_id="s", measurements={"ratio": values}
        )
    plain, gzipped, zipped = (tmp_path / name for name in names)
    assert gzip.decompress(gzipped.read_bytes()) == plain.read_bytes()
    with zipfile.ZipFile(zipped) as archive:
        assert archive.namelist() == ["m.geojson"]
        assert archive.read("m.geojson") == plain.read_bytes()
