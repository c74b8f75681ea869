"""GeoJSON against shapely, against QuPath's rules, and against what other tools write."""

import gzip
import json
import logging
import uuid

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bagscope.errors import SlideError
from bagscope.wsi import geojson
from bagscope.wsi.outline import MaskFrame, Polygon, Region, coverage, polygons
from bagscope.wsi.slide import RectL0

BOUNDS = RectL0(x_l0=1000, y_l0=-200, width_l0=50_000, height_l0=40_000)
NO_BOUNDS = RectL0(x_l0=0, y_l0=0, width_l0=50_000, height_l0=40_000)
SQUARE = [[10, 20], [110, 20], [110, 120], [10, 120], [10, 20]]


def region(ring=SQUARE, holes=(), class_name="Tissue", **more) -> Region:
    shape = Polygon(
        exterior_l0=np.array(ring[:-1], float),
        holes_l0=tuple(np.array(hole[:-1], float) for hole in holes),
    )
    return Region(class_name=class_name, polygons=(shape,), **more)


def feature(geometry=None, **properties) -> dict:
    geometry = geometry or {"type": "Polygon", "coordinates": [SQUARE]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def write(path, document) -> object:
    path.write_text(json.dumps(document))
    return path


def read(path, document, bounds=NO_BOUNDS, **options) -> list[Region]:
    return geojson.read_regions(write(path, document), bounds_l0=bounds, **options)


def written(regions, **options) -> dict:
    text = geojson.dump_regions(regions, slide_name="slide", **{"bounds_l0": BOUNDS, **options})
    return json.loads(text)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.geojson"


# --- writing --------------------------------------------------------------------------------


def test_features_follow_the_conventions_of_qupath():
    document = written([region(measurements={"area": 2.5}, name="piece")])
    assert document["type"] == "FeatureCollection"
    assert "crs" not in document
    (item,) = document["features"]
    assert uuid.UUID(item["id"])
    assert item["properties"] == {
        "objectType": "annotation",
        "name": "piece",
        "classification": {"name": "Tissue", "color": [0, 158, 115]},
        "measurements": {"area": 2.5},
    }
    assert item["geometry"]["type"] == "Polygon"
    (ring,) = item["geometry"]["coordinates"]
    assert ring[0] == ring[-1]
    assert len(ring) == 5


@pytest.mark.parametrize(("frame", "shift"), [("qupath", (1000, -200)), ("openslide", (0, 0))])
def test_the_qupath_frame_starts_at_the_corner_of_the_bounds(frame, shift):
    document = written([region()], frame=frame)
    ring = np.array(document["features"][0]["geometry"]["coordinates"][0])
    assert {tuple(p) for p in ring + shift} == {tuple(p) for p in SQUARE}
    about = document["bagscope"]
    assert (about["frame"], about["slide"]) == (frame, "slide")
    assert about["bounds_l0"] == [1000, -200, 50_000, 40_000]
    assert about["classes"]["Tissue"]


def test_rings_wind_as_rfc_7946_asks_and_numbers_have_two_decimals():
    hole = [[30, 40], [60, 40], [60, 70], [30, 40]]
    for ring in (SQUARE, SQUARE[::-1]):
        for inner in (hole, hole[::-1]):
            text = geojson.dump_regions([region(ring, [inner])], bounds_l0=BOUNDS, slide_name="a")
            geometry = json.loads(text)["features"][0]["geometry"]
            exterior, interior = map(shapely.LinearRing, geometry["coordinates"])
            assert exterior.is_ccw
            assert not interior.is_ccw
            assert "[-990.00,220.00]" in text


def test_several_polygons_are_one_multipolygon_and_nested_classes_have_names():
    shape = region().polygons[0]
    far = Polygon(exterior_l0=shape.exterior_l0 + 500)
    (item,) = written([Region(class_name="Tumor: Positive", polygons=(shape, far))])["features"]
    assert item["geometry"]["type"] == "MultiPolygon"
    assert shapely.geometry.shape(item["geometry"]).area == 2 * 100 * 100
    label = item["properties"]["classification"]
    assert label["names"] == ["Tumor", "Positive"]
    assert len(label["color"]) == 3


def test_the_same_regions_give_the_same_bytes_and_ids_differ_where_anything_does(tmp_path):
    regions = [region(), region(), region(class_name="Pen"), region(name="b")]
    for name in ("a", "b"):
        for ending in ("geojson", "geojson.gz"):
            geojson.write_regions(
                tmp_path / f"{name}.{ending}", regions, bounds_l0=BOUNDS, slide_name="slide"
            )
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()
    assert (tmp_path / "a.geojson.gz").read_bytes() == (tmp_path / "b.geojson.gz").read_bytes()
    assert (
        gzip.decompress((tmp_path / "a.geojson.gz").read_bytes())
        == (tmp_path / "a.geojson").read_bytes()
    )
    ids = {f["id"] for f in written(regions)["features"]}
    others = json.loads(geojson.dump_regions(regions, bounds_l0=BOUNDS, slide_name="other"))
    assert len(ids | {f["id"] for f in others["features"]}) == 8


def test_coordinates_that_are_not_numbers_are_never_written():
    with pytest.raises(ValueError, match="not a number"):
        written([region([[0, 0], [1, np.nan], [1, 1], [0, 0]])])
    with pytest.raises(ValueError, match="at least one polygon"):
        written([Region(class_name="Tissue", polygons=())])


# --- there and back -------------------------------------------------------------------------


@given(
    mask=hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=10)),
    frame=st.sampled_from(["qupath", "openslide"]),
    px=st.floats(0.5, 130),
    x=st.floats(-1000, 1e5),
)
@settings(max_examples=100)
def test_a_mask_survives_the_way_through_a_file(tmp_path_factory, mask, frame, px, x):
    path = tmp_path_factory.mktemp("g") / "a.geojson"
    at = MaskFrame(shape=mask.shape, origin_x_l0=x, origin_y_l0=-x, px_l0_x=px, px_l0_y=px * 1.01)
    regions = [Region(class_name="Tissue", polygons=(p,)) for p in polygons(mask, at)]
    geojson.write_regions(path, regions, bounds_l0=BOUNDS, slide_name="a", frame=frame)
    # The file's own word on its frame wins over the default.
    back = geojson.read_regions(path, bounds_l0=BOUNDS, default_frame="openslide")
    assert np.array_equal(coverage([p for r in back for p in r.polygons], at) >= 0.5, mask)
    assert [r.class_name for r in back] == ["Tissue"] * len(regions)


def test_every_field_of_a_region_comes_back(path):
    first = region(
        holes=[[[30, 40], [60, 40], [60, 70], [30, 40]]],
        class_name="A: B",
        name="n",
        object_type="detection",
        colour=(1, 2, 3),
        measurements={"m": -0.5},
    )
    geojson.write_regions(path, [first], bounds_l0=BOUNDS, slide_name="a")
    (back,) = geojson.read_regions(path, bounds_l0=BOUNDS)
    for name in ("class_name", "name", "object_type", "colour", "measurements"):
        assert getattr(back, name) == getattr(first, name)
    before, after = (
        shapely.Polygon(r.polygons[0].exterior_l0, r.polygons[0].holes_l0) for r in (first, back)
    )
    assert before.equals(after)


# --- what others write ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": [feature()]},
        [feature()],
        feature(),
        feature()["geometry"],
        [feature()["geometry"]],
        feature({"type": "MultiPolygon", "coordinates": [[SQUARE]]}),
        feature({"type": "GeometryCollection", "geometries": [feature()["geometry"]]}),
        feature({"type": "Polygon", "coordinates": [SQUARE[:-1]]}),
        feature({"type": "Polygon", "coordinates": [[[*point, 0.0] for point in SQUARE]]}),
    ],
)
def test_containers_and_geometries_in_use_are_read(path, document):
    (found,) = read(path, document)
    (shape,) = found.polygons
    assert {tuple(p) for p in shape.exterior_l0} == {tuple(p) for p in SQUARE}
    assert len(shape.exterior_l0) == 4


def test_without_a_word_on_its_frame_a_file_is_in_the_default_frame(path):
    (moved,) = read(path, [feature()], BOUNDS)
    assert moved.polygons[0].exterior_l0.min(axis=0).tolist() == [1010, -180]
    (kept,) = read(path, [feature()], BOUNDS, default_frame="openslide")
    assert kept.polygons[0].exterior_l0.min(axis=0).tolist() == [10, 20]


@pytest.mark.parametrize(
    ("properties", "class_name", "colour"),
    [
        ({"classification": {"name": "Tumor", "color": [200, 0, 0]}}, "Tumor", (200, 0, 0)),
        ({"classification": {"name": "Tumor", "colorRGB": -3670016}}, "Tumor", (200, 0, 0)),
        ({"classification": {"names": ["Tumor", "Pos"]}}, "Tumor: Pos", None),
        ({"classification": "Tumor"}, "Tumor", None),
        ({"classification": '{"name": "Tumor", "color": [1, 2, 3]}'}, "Tumor", (1, 2, 3)),
        ({"classification": "{odd name"}, "{odd name", None),
        ({"name": " Tumor "}, "Tumor", None),
        ({"classification": {"name": ""}, "name": "Tumor"}, "Tumor", None),
        ({"classification": {"name": "Tumor", "color": "red"}}, "Tumor", None),
        ({"tissue_id": 3}, "", None),
    ],
)
def test_classes_in_every_form_in_use(path, properties, class_name, colour):
    (found,) = read(path, [feature(**properties)])
    assert (found.class_name, found.colour) == (class_name, colour)
    assert geojson.class_names(path) == {class_name}


def test_an_ellipse_fills_the_box_of_what_qupath_writes_for_it(path):
    # QuPath writes an ellipse as a polygon around it, and takes only the bounding box back.
    diamond = [[0, 50], [100, 0], [200, 50], [100, 100], [0, 50]]
    geometry = {"type": "Polygon", "coordinates": [diamond], "isEllipse": True}
    (found,) = read(path, [feature(geometry)])
    ellipse = shapely.Polygon(found.polygons[0].exterior_l0)
    assert ellipse.area == pytest.approx(np.pi * 100 * 50, rel=1e-9)
    assert ellipse.bounds == pytest.approx((0, 0, 200, 100), abs=0.1)


def test_packed_files_byte_order_marks_children_and_measurement_lists(tmp_path):
    parent = feature(measurements=[{"name": "m", "value": 2}, {"name": "n", "value": "x"}])
    parent["childObjects"] = [feature(name="child")]
    text = "\ufeff" + json.dumps([parent])
    packed = tmp_path / "named-wrongly.geojson"
    packed.write_bytes(gzip.compress(text.encode()))
    first, child = geojson.read_regions(packed, bounds_l0=NO_BOUNDS)
    assert first.measurements == {"m": 2.0}
    assert child.class_name == "child"


def test_a_measurement_that_is_not_a_number_is_dropped(path):
    path.write_text(json.dumps([feature(measurements={"a": float("nan"), "b": 1})]))
    assert geojson.read_regions(path, bounds_l0=NO_BOUNDS)[0].measurements == {"b": 1.0}


def test_points_and_lines_beside_areas_are_passed_over_with_a_word(path, caplog):
    line = feature({"type": "LineString", "coordinates": [[0, 0], [1, 1]]})
    with caplog.at_level(logging.WARNING):
        assert len(read(path, [line, feature()])) == 1
    assert "features[0] (LineString)" in caplog.text


def test_an_empty_collection_is_no_region(path):
    assert read(path, {"type": "FeatureCollection", "features": []}) == []


def test_a_self_crossing_outline_is_repaired_to_what_shapely_makes_of_it(path):
    bow_tie = [[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]
    (found,) = read(path, [feature({"type": "Polygon", "coordinates": [bow_tie]})])
    shapes = [shapely.Polygon(p.exterior_l0, p.holes_l0) for p in found.polygons]
    assert len(shapes) == 2
    assert all(shape.is_valid for shape in shapes)
    assert sum(shape.area for shape in shapes) == shapely.make_valid(shapely.Polygon(bow_tie)).area


def test_sound_outlines_are_read_without_shapely(path):
    import subprocess
    import sys

    write(path, [feature()])
    code = (
        "import sys; from pathlib import Path; from bagscope.wsi import geojson; "
        "from bagscope.wsi.slide import RectL0; "
        f"geojson.read_regions(Path({str(path)!r}), "
        "bounds_l0=RectL0(x_l0=0, y_l0=0, width_l0=1, height_l0=1)); "
        "sys.exit(bool({'shapely', 'cv2', 'torch', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- refusals -------------------------------------------------------------------------------


def polygon(coordinates) -> dict:
    return feature({"type": "Polygon", "coordinates": coordinates})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"type": "Topology"}, r"neither a FeatureCollection.*Topology"),
        ("text", r"neither a FeatureCollection.*text"),
        ([feature(), 7], r"features\[1\] is 7"),
        ([{"type": "Polygons", "coordinates": []}], r"features\[0\] is .*Polygons"),
        ([feature({"type": "Circle", "radius": 3})], r"features\[0\]: its geometry is .*Circle"),
        ([feature({"type": "Point", "coordinates": [1, 2]})], r"features\[0\] \(Point\).*no poly"),
        ([feature(), polygon([[[0, 0], [1, "x"], [1, 1]]])], r'features\[1\].*\[1, "x"\]'),
        ([polygon([[[0, 0], [1, float("nan")], [1, 1]]])], r"features\[0\].*\[1, NaN\]"),
        ([polygon([[[0, 0], [1, float("inf")], [1, 1]]])], r"features\[0\].*Infinity"),
        ([polygon([[[0, 0], [1, True], [1, 1]]])], r"features\[0\].*true"),
        ([polygon([[[0, 0], [1]]])], r"features\[0\].*\[1\]"),
        ([polygon([[[0, 0], [1, 1], [0, 0]]])], r"features\[0\].*encloses nothing"),
        ([polygon([[]])], r"features\[0\].*encloses nothing"),
        ([polygon([[[0, 0], [5, 5], [9, 9], [0, 0]]])], r"features\[0\].*encloses nothing"),
        ([polygon([])], r"features\[0\]: a polygon whose coordinates are \[\]"),
        ([polygon([3])], r"features\[0\]: a ring is 3"),
        ([feature({"type": "MultiPolygon", "coordinates": None})], r"features\[0\].*null"),
        ([feature({"type": "GeometryCollection"})], r"features\[0\].*GeometryCollection"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(path, document, message):
    with pytest.raises(SlideError, match=message) as refusal:
        read(path, document)
    assert str(refusal.value).startswith("a.geojson")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe[]", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (gzip.compress(b"[]", mtime=0)[:-4], "could not be read"),
        (b"\x1f\x8bxx", "could not be read"),
    ],
)
def test_broken_files_are_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(SlideError, match=message):
        geojson.read_regions(path, bounds_l0=NO_BOUNDS)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(SlideError, match="no such GeoJSON file"):
        geojson.read_regions(tmp_path / "none.geojson", bounds_l0=NO_BOUNDS)
    with pytest.raises(SlideError, match="could not be read"):
        geojson.read_regions(tmp_path, bounds_l0=NO_BOUNDS)
