"""What the page is told of a slide."""

from __future__ import annotations

import numpy as np

from bagscope.heatmaps.review.slide_data import annotations_data
from bagscope.wsi.outline import Polygon, Region


def square(corner: float) -> Polygon:
    ring = np.array([[0, 0], [10, 0], [10, 10.004], [0, 10]]) + corner
    return Polygon(exterior_l0=ring)


def test_annotations_of_a_class_are_one_and_keep_every_polygon() -> None:
    regions = [
        Region(class_name="Tumor", polygons=(square(0), square(100))),
        Region(class_name="Necrosis", polygons=(square(200),)),
        Region(class_name="Tumor", polygons=(square(300),)),
    ]
    found = annotations_data(regions)
    assert [one["class"] for one in found] == ["Tumor", "Necrosis"]
    corners = [[polygon[0][0] for polygon in one["polygons"]] for one in found]
    assert corners == [[[0, 0], [100, 100], [300, 300]], [[200, 200]]]
    assert found[0]["polygons"][0][0][2] == [10, 10]
