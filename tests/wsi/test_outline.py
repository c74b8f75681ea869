"""Outlines against shapely (validity, area) and against the masks that they came from."""

import logging
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bagscope.wsi.outline import (
    MaskFrame,
    Polygon,
    Region,
    coverage,
    masks_from_regions,
    polygons,
    regions_of,
)

masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))
floats = st.floats(-1e5, 1e5)
pixel_l0 = st.floats(0.5, 130)


@dataclass
class Masks:
    tissue: np.ndarray
    pen: np.ndarray
    fold: np.ndarray
    frame: MaskFrame


def frame_of(shape, x=0.0, y=0.0, px=1.0, py=1.0) -> MaskFrame:
    return MaskFrame(shape=shape, origin_x_l0=x, origin_y_l0=y, px_l0_x=px, px_l0_y=py)


def as_shapely(shape: Polygon) -> shapely.Polygon:
    return shapely.Polygon(shape.exterior_l0, shape.holes_l0)


def blobs(seed: int, shape=(60, 80), sigma=1.5) -> np.ndarray:
    field = np.random.default_rng(seed).random(shape).astype(np.float32)
    return cv2.GaussianBlur(field, (0, 0), sigma) > 0.5


@given(mask=masks, x=floats, y=floats, px=pixel_l0, py=pixel_l0)
@settings(max_examples=300)
def test_a_mask_becomes_valid_polygons_of_the_same_area_and_comes_back(mask, x, y, px, py):
    frame = frame_of(mask.shape, x, y, px, py)
    shapes = polygons(mask, frame)
    assert all(as_shapely(shape).is_valid for shape in shapes)
    assert shapely.MultiPolygon([as_shapely(shape) for shape in shapes]).is_valid
    area = sum(as_shapely(shape).area for shape in shapes)
    assert area == pytest.approx(mask.sum() * px * py, rel=1e-6)
    assert np.array_equal(coverage(shapes, frame) >= 0.5, mask)


@given(mask=masks)
@settings(max_examples=200)
def test_one_polygon_per_edge_connected_fragment_ordered_by_its_first_pixel(mask):
    shapes = polygons(mask, frame_of(mask.shape))
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    assert len(shapes) == count - 1
    firsts = []
    for shape in shapes:
        inside = coverage([shape], frame_of(mask.shape)) >= 0.5
        assert len(np.unique(labels[inside])) == 1
        firsts.append(int(np.flatnonzero(inside)[0]))
    assert firsts == sorted(firsts)


def test_outlines_run_along_pixel_edges():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2:4] = True
    (shape,) = polygons(mask, frame_of(mask.shape, x=100, y=200, px=10, py=20))
    assert {tuple(point) for point in shape.exterior_l0} == {
        (120, 220), (140, 220), (140, 260), (120, 260),
    }  # fmt: skip
    assert len(shape.exterior_l0) == 4


def test_holes_are_kept_and_may_touch_at_corners():
    mask = np.ones((6, 6), bool)
    mask[2, 2] = mask[3, 3] = mask[4, 2] = False
    (shape,) = polygons(mask, frame_of(mask.shape))
    assert len(shape.holes_l0) == 3
    assert as_shapely(shape).is_valid


def test_a_hole_that_touches_the_outside_at_a_corner_is_a_hole():
    mask = np.ones((3, 3), bool)
    mask[1, 1] = mask[2, 2] = False
    (shape,) = polygons(mask, frame_of(mask.shape))
    assert len(shape.holes_l0) == 1
    assert as_shapely(shape).is_valid
    assert as_shapely(shape).area == 7


@pytest.mark.parametrize("mask", [np.zeros((3, 4), bool), np.zeros((0, 4), bool)])
def test_an_empty_mask_has_no_polygons(mask):
    assert polygons(mask, frame_of(mask.shape)) == []


def test_a_mask_of_another_shape_than_its_frame_is_refused():
    with pytest.raises(ValueError, match=r"mask is \(3, 4\), its frame \(4, 3\)"):
        polygons(np.zeros((3, 4), bool), frame_of((4, 3)))


@pytest.mark.parametrize("view", ["transposed", "strided"])
def test_masks_need_not_be_contiguous(view):
    base = blobs(3, (40, 60))
    mask = base.T if view == "transposed" else base[::2, ::3]
    shapes = polygons(mask, frame_of(mask.shape))
    assert np.array_equal(coverage(shapes, frame_of(mask.shape)) >= 0.5, mask)


@given(
    seed=st.integers(0, 10_000), sigma=st.floats(0.3, 3), tolerance=st.floats(0.1, 8),
)  # fmt: skip
@settings(max_examples=100)
def test_simplified_outlines_stay_valid_and_near(seed, sigma, tolerance):
    mask = blobs(seed, (40, 50), sigma)
    frame = frame_of(mask.shape, 7, -3, 32, 31)
    exact = polygons(mask, frame)
    simple = polygons(mask, frame, tolerance_px=tolerance)
    assert len(simple) == len(exact)
    assert all(as_shapely(shape).is_valid for shape in simple)
    for before, after in zip(exact, simple, strict=True):
        assert len(after.exterior_l0) <= len(before.exterior_l0)
        for ring, thinned in zip(before.rings_l0, after.rings_l0, strict=True):
            apart = shapely.hausdorff_distance(
                shapely.LinearRing(ring), shapely.LinearRing(thinned)
            )
            assert apart <= tolerance * 32 + 1e-6


def test_simplification_saves_points():
    yy, xx = np.mgrid[:200, :200]
    mask = (xx - 100) ** 2 + (yy - 100) ** 2 < 80**2
    exact = polygons(mask, frame_of(mask.shape))[0]
    simple = polygons(mask, frame_of(mask.shape), tolerance_px=1.5)[0]
    assert len(simple.exterior_l0) < len(exact.exterior_l0) / 8
    assert as_shapely(simple).area == pytest.approx(mask.sum(), rel=0.02)


def test_a_hole_in_a_bump_keeps_the_bump():
    mask = np.zeros((60, 120), bool)
    mask[:50, 5:115] = True
    mask[50:54, 50:60] = True
    frame = frame_of(mask.shape)
    (flat,) = polygons(mask, frame, tolerance_px=5)
    assert as_shapely(flat).bounds[3] == 50
    mask[52, 54] = False
    (bumpy,) = polygons(mask, frame, tolerance_px=5)
    assert as_shapely(bumpy).is_valid
    assert as_shapely(bumpy).bounds[3] == 54
    assert len(bumpy.holes_l0) == 1


# --- coverage -------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    points=st.integers(3, 9),
    x=st.floats(-50, 50),
    y=st.floats(-50, 50),
)
@settings(max_examples=60)
def test_coverage_is_the_area_that_shapely_finds_in_each_pixel(seed, points, x, y):
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.random(points)) * 2 * np.pi
    radius = rng.uniform(10, 60, points)
    ring = np.stack([x + 70 + radius * np.cos(angle), y + 60 + radius * np.sin(angle)], 1)
    hole = (ring - ring.mean(0)) * 0.3 + ring.mean(0)
    frame = frame_of((20, 24), x=x, y=y, px=5.5, py=6.25)
    got = coverage([Polygon(exterior_l0=ring, holes_l0=(hole,))], frame)
    # Even-odd, as the hole of a star may leave it.
    truth = shapely.symmetric_difference(
        shapely.make_valid(shapely.Polygon(ring)), shapely.make_valid(shapely.Polygon(hole))
    )
    columns, rows = np.meshgrid(np.arange(24), np.arange(20))
    left, top = x + columns * 5.5, y + rows * 6.25
    boxes = shapely.box(left, top, left + 5.5, top + 6.25)
    expected = shapely.area(shapely.intersection(truth, boxes)) / (5.5 * 6.25)
    assert np.abs(got - expected).max() < 0.13  # one of eight scan lines, and rounding
    assert np.abs(got - expected).mean() < 0.005


def test_polygons_that_overlap_count_once_and_those_that_abut_add_up():
    def box(x0, x1):
        return Polygon(exterior_l0=np.array([[x0, 0], [x1, 0], [x1, 2], [x0, 2]], float))

    frame = frame_of((2, 4))
    assert coverage([box(0, 3), box(1, 4)], frame).max() == 1
    assert np.allclose(coverage([box(0, 1.5), box(1.5, 4)], frame), 1)


def test_polygons_outside_the_frame_cover_nothing():
    far = Polygon(exterior_l0=np.array([[50, 50], [60, 50], [60, 60]], float))
    assert coverage([far], frame_of((4, 4))).sum() == 0


def test_polygons_that_reach_beyond_the_frame_are_cut_off():
    large = Polygon(exterior_l0=np.array([[-9, -9], [90, -9], [90, 90], [-9, 90]], float))
    assert coverage([large], frame_of((4, 6))).min() == 1


# --- classes --------------------------------------------------------------------------------


def test_regions_of_masks_come_back_as_the_same_masks():
    tissue, pen, fold = blobs(1), blobs(2, sigma=3), blobs(3, sigma=5)
    frame = frame_of(tissue.shape, 1000, -20, 32.02, 31.98)
    regions = regions_of(Masks(tissue, pen, fold, frame))
    assert {region.class_name for region in regions} == {"Tissue", "Pen", "Fold"}
    assert all(len(region.polygons) == 1 for region in regions)
    for mask, back in zip((tissue, pen, fold), masks_from_regions(regions, frame), strict=True):
        assert np.array_equal(mask, back)


def test_unclassified_regions_are_tissue_and_unknown_classes_are_named(caplog):
    square = (Polygon(exterior_l0=np.array([[0, 0], [2, 0], [2, 2], [0, 2]], float)),)
    other = (Polygon(exterior_l0=np.array([[3, 3], [4, 3], [4, 4], [3, 4]], float)),)
    regions = [
        Region(class_name="", polygons=square),
        Region(class_name="Necrosis", polygons=other),
        Region(class_name="PEN", polygons=other),
    ]
    with caplog.at_level(logging.WARNING):
        tissue, pen, fold = masks_from_regions(regions, frame_of((4, 4)))
    assert tissue.sum() == 4
    assert pen.sum() == 1
    assert fold.sum() == 0
    assert "Necrosis" in caplog.text
    assert "PEN" not in caplog.text
