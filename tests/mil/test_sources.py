from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bagscope.errors import ArtifactError
from bagscope.mil.sources import ArraySource, StoreSource
from tests.mil.made_bags import made_source
from tests.mil.stored_bags import case_of, store_slides

COUNTS = {"a": 5, "b": 7, "c": 2}


@pytest.fixture
def patients(tmp_path: Path) -> StoreSource:
    """Return a patient of two slides, and one of a single slide."""
    store = store_slides(tmp_path, COUNTS)
    return StoreSource(store, [case_of("two", "b", "a"), case_of("one", "c")])


def test_a_patient_s_bag_is_its_slides_end_to_end(patients: StoreSource) -> None:
    assert patients.lengths.tolist() == [12, 2]
    assert patients.dimension == 3
    bag = patients.read(0)
    # Slide b is the second one that was written, slide a the first.
    assert bag.features[:, 0].tolist() == [100, 101, 102, 103, 104, 105, 106, 0, 1, 2, 3, 4]
    assert bag.features[3].tolist() == [103, 1103, 2103]
    assert bag.slide_ids == ("b", "a")
    assert bag.tile_slide.tolist() == [0] * 7 + [1] * 5
    assert bag.tile_row.tolist() == [*range(7), *range(5)]
    assert bag.tile_um.tolist() == [128.0, 128.0]
    assert bag.mpp_l0.tolist() == [0.25, 0.25]
    assert bag.coords_l0 is not None
    assert bag.coords_l0[7:].tolist() == [[0, 0], [512, 0], [1024, 0], [1536, 0], [0, 512]]


def test_chosen_rows_are_those_of_the_whole_bag(patients: StoreSource) -> None:
    whole = patients.read(0)
    rows = np.array([0, 2, 6, 7, 11])
    some = patients.read(0, rows)
    for name in ("features", "coords_l0", "tile_slide", "tile_row"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[rows], name)
    only_second = patients.read(0, np.array([8, 9]))
    assert only_second.tile_slide.tolist() == [1, 1]
    assert only_second.tile_row.tolist() == [1, 2]


def test_slides_lie_side_by_side_and_share_no_place(patients: StoreSource) -> None:
    grid = patients.grid(0)
    assert grid is not None
    assert len({tuple(place) for place in grid.tolist()}) == len(grid) == 12
    first, second = grid[:7], grid[7:]
    # An empty column stands between, so that no tile is another slide's neighbour.
    assert second[:, 0].min() - first[:, 0].max() == 2
    whole = patients.read(0).grid
    np.testing.assert_array_equal(whole, grid)


def test_a_slide_without_a_lattice_leaves_its_patient_without(tmp_path: Path) -> None:
    store = store_slides(tmp_path, COUNTS, without_grid="a")
    source = StoreSource(store, [case_of("two", "b", "a"), case_of("one", "c")])
    assert source.grid(0) is None
    assert source.read(0).grid is None
    assert source.read(0).coords_l0 is not None
    assert source.grid(1) is not None


def test_what_is_read_may_be_written_to(patients: StoreSource) -> None:
    for _ in range(2):
        found = patients.read(1).features
        assert found[0, 0] == 200
        found[:] = -1


def test_cases_without_a_tile_are_named(tmp_path: Path) -> None:
    store = store_slides(tmp_path, {"full": 2, "bare": 0, "void": 0})
    with pytest.raises(ArtifactError, match=r"bare, void \(2 in all\) have no tiles"):
        StoreSource(store, [case_of("full"), case_of("bare"), case_of("void")])
    # Together with a slide that has tiles it is a bag.
    assert StoreSource(store, [case_of("both", "full", "bare")]).lengths.tolist() == [2]


def test_arrays_are_a_source_too() -> None:
    bags = [np.arange(6.0).reshape(3, 2), np.ones((1, 2))]
    source = ArraySource(bags, made_source(2).cases)
    assert source.lengths.tolist() == [3, 1]
    assert source.read(0, np.array([0, 2])).features.tolist() == [[0, 1], [4, 5]]
    assert source.read(0, np.array([0, 2])).tile_row.tolist() == [0, 2]
    assert source.grid(0) is None


def test_arrays_that_are_no_bags_are_refused() -> None:
    cases = made_source(2).cases
    good = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="bag 1 is"):
        ArraySource([good, np.zeros((0, 3), np.float32)], cases)
    with pytest.raises(ValueError, match="bag 1 is"):
        ArraySource([good, np.zeros((2, 4), np.float32)], cases)
    with pytest.raises(ValueError, match="bag 0 is"):
        ArraySource([np.zeros(3), good], cases)
    with pytest.raises(ValueError, match="finite"):
        ArraySource([good, np.full((2, 3), np.nan, np.float32)], cases)
    with pytest.raises(ValueError, match="give as many"):
        ArraySource([good], cases)
