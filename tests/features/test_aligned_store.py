"""Two aligned tilings as one store: each fine tile beside the coarse one that holds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bagscope.errors import SchemaError
from bagscope.features.store import FeatureStore
from tests.features.aligned import FINE_TILES, STEP_L0, WIDTH, store_aligned


def test_each_vector_stands_beside_that_of_the_tile_around_it(tmp_path: Path) -> None:
    both = FeatureStore.open(store_aligned(tmp_path, 2))
    fine, coarse = FeatureStore.open(tmp_path / "fine"), FeatureStore.open(tmp_path / "coarse")
    for name in both.slide_ids:
        found, around = both.bag(name), coarse.bag(name)
        assert found.features.shape == (FINE_TILES, 2 * WIDTH)
        np.testing.assert_array_equal(found.features[:, :WIDTH], fine.bag(name).features)
        assert found.coords_l0 is not None
        assert around.coords_l0 is not None
        for corner, vector in zip(found.coords_l0, found.features, strict=True):
            holds = ((around.coords_l0 <= corner) & (corner < around.coords_l0 + 2 * STEP_L0)).all(
                1
            )
            np.testing.assert_array_equal(vector[WIDTH:], around.features[holds][0])
        rows = np.array([5, 2])
        np.testing.assert_array_equal(both.bag(name, rows).features, found.features[rows])


def test_tilings_that_do_not_fall_together_are_refused(tmp_path: Path) -> None:
    both = FeatureStore.open(store_aligned(tmp_path, 1, origin_l0=(100, 0)))
    with pytest.raises(SchemaError, match=r"not of aligned tilings .*--coarser-mpp COARSE"):
        both.record("s00")


@pytest.mark.parametrize("location", ["a::b::c", "a::", "::b"])
def test_two_places_are_named(location: str) -> None:
    with pytest.raises(SchemaError, match="write FINE::COARSE"):
        FeatureStore.open(location)
