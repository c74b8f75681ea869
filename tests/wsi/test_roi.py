"""Regions of interest: which areas they allow (against shapely), and what is refused."""

import json

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from bagscope.errors import ConfigError, SlideError
from bagscope.wsi import roi
from bagscope.wsi.outline import MaskFrame, Polygon, Region
from bagscope.wsi.roi import RoiSelection
from bagscope.wsi.slide import RectL0

FRAME = MaskFrame(shape=(40, 50), origin_x_l0=0, origin_y_l0=0, px_l0_x=10, px_l0_y=10)
BOUNDS = RectL0(x_l0=100, y_l0=200, width_l0=1000, height_l0=800)


def box(x0, y0, x1, y1, class_name="Tumor") -> Region:
    ring = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)
    return Region(class_name=class_name, polygons=(Polygon(exterior_l0=ring),))


def geojson_file(path, *class_names) -> object:
    ring = [[0, 0], [9, 0], [9, 9], [0, 0]]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"classification": {"name": name}} if name else {},
        }
        for name in class_names
    ]
    path.write_text(json.dumps(features))
    return path


@given(
    seed=st.integers(0, 10_000),
    corners=st.integers(3, 40),
    radius=st.floats(60, 180),
    px=st.floats(3, 20),
)
@settings(max_examples=60)
def test_the_area_of_a_region_is_that_of_shapely_within_one_percent(seed, corners, radius, px):
    rng = np.random.default_rng(seed)
    angle = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    reach = radius * rng.uniform(0.6, 1, corners)
    ring = np.stack([200 + reach * np.cos(angle), 200 + reach * np.sin(angle)], axis=1)
    side = int(400 / px) + 2
    frame = MaskFrame(shape=(side, side), origin_x_l0=0, origin_y_l0=0, px_l0_x=px, px_l0_y=px)
    region = Region(class_name="", polygons=(Polygon(exterior_l0=ring),))
    area = roi.rasterise([region], frame).sum(dtype=float) * px * px
    assert area == pytest.approx(shapely.Polygon(ring).area, rel=0.01)


def test_a_region_smaller_than_a_pixel_keeps_its_area():
    area = roi.rasterise([box(12, 13, 16, 18)], FRAME).sum() * 100
    assert area == pytest.approx(20, rel=0.26)  # eight scan lines a pixel see 5 / 10 as 4 of 8


REGIONS = [
    box(0, 0, 200, 400, "Tumor"),
    box(100, 0, 300, 400, "Stroma"),
    box(150, 0, 160, 400, "Artefact"),
]


@pytest.mark.parametrize(
    ("include", "exclude", "columns"),
    [
        (None, (), range(30)),
        (("Tumor",), (), range(20)),
        (("tumor ", "STROMA"), (), range(30)),
        (("Tumor",), ("Stroma",), range(10)),
        (None, ("Artefact",), [*range(15), *range(16, 30)]),
        (None, ("Tumor", "Stroma", "Artefact"), range(30, 50)),
        (("Necrosis",), (), []),
        (("Tumor",), ("Tumor",), []),
    ],
)
def test_what_is_allowed(include, exclude, columns):
    allowed = roi.allowed_mask(REGIONS, RoiSelection(include=include, exclude=exclude), FRAME)
    assert allowed.shape == FRAME.shape
    assert allowed.dtype == np.float32
    assert np.flatnonzero(allowed.min(axis=0) > 0.5).tolist() == list(columns)
    assert np.flatnonzero(allowed.max(axis=0) > 0).tolist() == list(columns)


def test_a_slide_without_regions_allows_nothing():
    assert roi.allowed_mask([], RoiSelection(), FRAME).max() == 0


# --- files ----------------------------------------------------------------------------------


def test_a_file_serves_every_slide_and_a_folder_each_its_own(tmp_path):
    one = geojson_file(tmp_path / "any.geojson", "Tumor")
    packed = tmp_path / "b.c.geojson.gz"
    packed.write_bytes(b"")
    assert roi.load(one, "slide") == one
    assert roi.load(tmp_path, "any") == one
    assert roi.load(tmp_path, "b.c") == packed
    assert roi.load(tmp_path, "b") is None


def test_two_files_for_a_slide_and_a_missing_path_are_refused(tmp_path):
    geojson_file(tmp_path / "a.geojson", "Tumor")
    geojson_file(tmp_path / "a.json", "Tumor")
    with pytest.raises(SlideError, match=r"a: has several .*a\.geojson and a\.json"):
        roi.load(tmp_path, "a")
    with pytest.raises(ConfigError, match="no such GeoJSON file or folder"):
        roi.load(tmp_path / "none", "a")


def test_a_class_that_no_file_uses_is_refused_with_those_there_are(tmp_path):
    files = [
        geojson_file(tmp_path / "a.geojson", "Tumor", ""),
        geojson_file(tmp_path / "b.geojson", "Stroma"),
    ]
    roi.require_known_classes(files, RoiSelection(include=("tumor",), exclude=("Stroma",)))
    with pytest.raises(ConfigError) as refusal:
        roi.require_known_classes(files, RoiSelection(include=("Tumour",)))
    assert "--roi-include 'Tumour'" in str(refusal.value)
    assert "unclassified, 'Stroma', 'Tumor'" in str(refusal.value)
    with pytest.raises(ConfigError, match=r"--roi-exclude 'Pen'.*no regions at all"):
        roi.require_known_classes([], RoiSelection(exclude=("Pen",)))


# --- extents --------------------------------------------------------------------------------


def test_regions_that_touch_the_slide_are_fine():
    def check(regions):
        roi.require_inside(regions, BOUNDS, slide_name="a.svs", file_name="a.geojson")

    check([])
    check([box(0, 0, 150, 250)])
    check([box(5000, 5000, 6000, 6000), box(1000, 900, 2000, 2000)])


def test_regions_all_outside_are_refused_with_both_extents():
    # The bounding box of the two contains the slide; neither region touches it.
    regions = [box(0, 0, 90, 90), box(5000, 4000, 6000, 4500)]
    with pytest.raises(SlideError) as refusal:
        roi.require_inside(regions, BOUNDS, slide_name="a.svs", file_name="a.geojson")
    message = str(refusal.value)
    assert "regions x 0 to 6000, y 0 to 4500" in message
    assert "slide x 100 to 1100, y 200 to 1000" in message
    assert "in the frame it is read in (qupath or openslide)" in message
