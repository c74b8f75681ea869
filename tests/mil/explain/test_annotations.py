"""Overlaps are areas, metrics are scikit-learn's, lesions and detections are counted as drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import shapely
from sklearn import metrics

from bagscope.errors import ConfigError
from bagscope.mil.explain.annotations import (
    FROC_RATES,
    SlideDetections,
    chosen_regions,
    detections,
    froc,
    lesions_of,
    on_lesions,
    overlap_shares,
    tile_metrics,
)
from bagscope.wsi.geojson import read_regions
from bagscope.wsi.outline import MaskFrame, Polygon, Region, coverage
from bagscope.wsi.slide import RectL0

SIDE = 64


def lattice(columns: int, rows: int, side: int = SIDE) -> np.ndarray:
    x, y = np.meshgrid(np.arange(columns) * side, np.arange(rows) * side)
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)


def square(x: float, y: float, side: float, name: str = "Tumor") -> Region:
    ring = np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]], np.float64)
    return Region(class_name=name, polygons=(Polygon(exterior_l0=ring),))


def blob(seed: int) -> Region:
    """Return a star with a hole, of no simple shape."""
    generator = np.random.default_rng(seed)
    angle = np.sort(generator.uniform(0, 2 * np.pi, 40))
    ring = np.stack([np.cos(angle), np.sin(angle)], 1) * generator.uniform(150, 300, (40, 1)) + 320
    hole = np.array([[300.0, 300], [340, 300], [340, 350], [300, 350]])
    return Region(class_name="Tumor", polygons=(Polygon(exterior_l0=ring, holes_l0=(hole,)),))


def test_overlap_of_squares() -> None:
    # 1.5 tiles wide, half a tile down; a second one lies half upon it and counts once.
    regions = [square(0, 32, 96), square(48, 32, 48)]
    found = overlap_shares(regions, lattice(3, 3), SIDE)
    wanted = [[0.5, 0.25, 0], [1, 0.5, 0], [0, 0, 0]]
    np.testing.assert_allclose(found.reshape(3, 3), wanted)
    np.testing.assert_array_equal(overlap_shares([], lattice(2, 2), SIDE), 0)


@pytest.mark.parametrize("seed", range(4))
def test_overlap_is_the_rasterised_area(seed: int) -> None:
    region = blob(seed)
    found = overlap_shares([region], lattice(10, 10), SIDE)
    fine = MaskFrame(shape=(640, 640), origin_x_l0=0, origin_y_l0=0, px_l0_x=1, px_l0_y=1)
    covered = coverage(region.polygons, fine)
    wanted = covered.reshape(10, SIDE, 10, SIDE).mean((1, 3))
    np.testing.assert_allclose(found.reshape(10, 10), wanted, atol=2e-3)
    area = shapely.Polygon(region.polygons[0].exterior_l0, region.polygons[0].holes_l0).area
    assert found.sum() * SIDE**2 == pytest.approx(area)


def test_from_a_file_on_a_slide_with_bounds(tmp_path: Path) -> None:
    ring = [[0, 0], [64, 0], [64, 64], [0, 64], [0, 0]]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"classification": {"name": name}},
        }
        for name in ("Tumor", "Stroma")
    ]
    path = tmp_path / "s.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    bounds = RectL0(x_l0=1000, y_l0=2000, width_l0=640, height_l0=640)
    regions = chosen_regions(read_regions(path, bounds_l0=bounds), ["tumor"], where=path.name)
    assert [region.class_name for region in regions] == ["Tumor"]
    coords = np.array([[1000, 2000], [1064, 2000], [0, 0]], np.int32)
    np.testing.assert_array_equal(overlap_shares(regions, coords, SIDE), [1, 0, 0])


def test_unknown_classes_are_refused() -> None:
    regions = [square(0, 0, 10), square(0, 0, 10, name="")]
    assert chosen_regions(regions, None, where="a.geojson") == regions
    with pytest.raises(ConfigError, match=r"a.geojson: no region of class 'Tumour'; it has uncl"):
        chosen_regions(regions, ["Tumour"], where="a.geojson")


def test_tile_metrics_are_scikit_learn_s() -> None:
    generator = np.random.default_rng(0)
    shares = generator.uniform(size=300)
    scores = np.round(shares + generator.normal(size=300), 1)
    found = tile_metrics(scores, shares, threshold=0.8)
    truth = shares >= 0.5
    assert found.auroc == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert found.auprc == pytest.approx(metrics.average_precision_score(truth, scores))
    assert found.dice == pytest.approx(metrics.f1_score(truth, scores >= 0.8))
    assert (found.tiles, found.positive) == (300, truth.sum())


def test_tile_metrics_where_there_is_nothing() -> None:
    none = tile_metrics([0.1, 0.2], np.zeros(2), threshold=0.5)
    assert math.isnan(none.auroc) and math.isnan(none.auprc) and math.isnan(none.dice)
    assert tile_metrics([0.1, 0.9], np.zeros(2), threshold=0.5).dice == 0
    with pytest.raises(ValueError, match="3 scores for 2 tiles"):
        tile_metrics([0.1, 0.2, 0.3], np.zeros(2), threshold=0.5)
    with pytest.raises(ValueError, match="finite"):
        tile_metrics([0.1, math.nan], np.zeros(2), threshold=0.5)


def test_lesions_are_connected_parts() -> None:
    regions = [square(0, 0, 100), square(50, 50, 100), square(170, 0, 20), square(500, 500, 10)]
    areas = sorted(shape.area for shape in lesions_of(regions))
    assert areas == pytest.approx([100, 400, 17500])
    merged = lesions_of(regions, merge_l0=40)
    assert sorted(shape.area for shape in merged) == pytest.approx([100, 17900])
    assert lesions_of([]) == []


def test_detections_silence_their_surroundings() -> None:
    coords = lattice(6, 1)
    scores = [0.9, 0.8, 0.1, 0.3, 0.7, 0.7]
    assert detections(scores, coords, radius_l0=SIDE).tolist() == [0, 4, 2]
    assert detections(scores, coords, radius_l0=SIDE, at_least=0.5).tolist() == [0, 4]
    assert detections(scores, coords, radius_l0=0).tolist() == [0, 1, 4, 5, 3, 2]


@pytest.mark.parametrize("seed", range(3))
def test_detections_by_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    coords = lattice(12, 9)
    scores = generator.normal(size=len(coords))
    left, wanted = set(range(len(coords))), []
    while left:
        hottest = max(left, key=lambda tile: scores[tile])
        wanted.append(hottest)
        away = np.linalg.norm(coords - coords[hottest], axis=1)
        left -= set(np.flatnonzero(away <= 150).tolist())
    assert detections(scores, coords, radius_l0=150).tolist() == wanted


def test_detections_on_lesions() -> None:
    lesions = lesions_of([square(10, 10, 20), square(40, 0, 100), square(300, 300, 5)])
    coords = lattice(5, 5)
    found = on_lesions(lesions, np.arange(25.0), coords, SIDE, np.array([24, 0, 1]))
    # The first tile lies on two lesions, and on more of the larger.
    assert found.lesion.tolist()[0] != -1 and found.scores.tolist() == [24, 0, 1]
    sizes = [lesions[number].area for number in found.lesion]
    assert sizes == pytest.approx([25, 10000, 10000])
    assert on_lesions(lesions, np.arange(25.0), coords, SIDE, np.array([2 + 20])).lesion[0] == -1
    assert found.lesions == 3


def slide(scores: list[float], lesion: list[int], lesions: int) -> SlideDetections:
    return SlideDetections(
        scores=np.array(scores), lesion=np.array(lesion, np.int64), lesions=lesions
    )


def test_froc_counted_by_hand() -> None:
    curve = froc(
        [
            slide([0.9, 0.8, 0.7, 0.2], [0, -1, 0, 1], 3),
            slide([0.85, 0.3], [-1, -1], 0),
        ]
    )
    assert curve.lesions == 3
    assert curve.thresholds.tolist() == [math.inf, 0.9, 0.85, 0.8, 0.3, 0.2]
    assert curve.false_positives.tolist() == [0, 0, 0.5, 1.0, 1.5, 1.5]
    np.testing.assert_allclose(curve.sensitivity * 3, [0, 1, 1, 1, 1, 2])
    assert curve.sensitivity_at(0) == curve.sensitivity_at(1.4) == pytest.approx(1 / 3)
    assert curve.sensitivity_at(8) == pytest.approx(2 / 3)
    assert curve.score == pytest.approx((1 / 3 * 3 + 2 / 3 * 3) / len(FROC_RATES))
    assert curve.lesion_sensitivity(0.95) == 0
    assert curve.lesion_sensitivity(0.9) == pytest.approx(1 / 3)
    assert curve.lesion_sensitivity(0.0) == pytest.approx(2 / 3)


def test_froc_by_brute_force() -> None:
    generator = np.random.default_rng(3)
    slides = [
        slide(
            np.round(generator.uniform(size=12), 2).tolist(),
            generator.integers(-1, lesions, 12).tolist(),
            lesions,
        )
        for lesions in (0, 1, 4, 2)
    ]
    curve = froc(slides)
    for place, threshold in enumerate(curve.thresholds):
        found = misses = 0
        for one in slides:
            called = one.lesion[one.scores >= threshold]
            found += len(set(called.tolist()) - {-1})
            misses += int((called == -1).sum())
        assert curve.sensitivity[place] == pytest.approx(found / 7)
        assert curve.false_positives[place] == pytest.approx(misses / 4)


def test_froc_needs_a_lesion() -> None:
    with pytest.raises(ValueError, match="no slide has a lesion"):
        froc([slide([0.5], [-1], 0)])
