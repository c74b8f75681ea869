from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bagscope.testing import PlantedPairs, planted_pairs


def made(kind: str, shift: float = 6.0) -> PlantedPairs:
    return planted_pairs(kind, 40, tiles=(60, 200), share=0.05, shift=shift)  # type: ignore[arg-type]


def kinds_of(pairs: PlantedPairs, bag: int) -> np.ndarray:
    """Return (n, 2) bool, found without what was planted: a shift this large stands apart."""
    along = pairs.bags[bag] @ pairs.directions.T
    return along - np.median(along, axis=0) > pairs.shift / 2


@pytest.mark.parametrize("kind", ["together", "beside"])
def test_either_label_has_as_many_tiles_of_a_kind(kind: str) -> None:
    pairs = made(kind, shift=12.0)
    for bag, label in enumerate(pairs.labels):
        first, second = kinds_of(pairs, bag).sum(0)
        half = max(2, round(0.05 * len(pairs.bags[bag]) / 2))
        assert first + second == 2 * half
        if label or kind == "beside":
            assert first == second == half
        else:
            assert {int(first), int(second)} == {0, 2 * half}
        assert pairs.truth[bag].sum() == (2 * half if label else 0)


def test_kinds_lie_side_by_side_where_the_label_says_so_and_nowhere_else() -> None:
    pairs = made("beside", shift=12.0)
    for bag, label in enumerate(pairs.labels):
        first, second = (pairs.grids[bag][one] for one in kinds_of(pairs, bag).T)
        apart = np.abs(first[:, None] - second[None]).sum(2).min(1)
        assert (apart == 1).all() if label else (apart > 1).all()


@pytest.mark.parametrize("kind", ["together", "beside"])
def test_whoever_knows_the_kinds_tells_bags_apart_and_their_means_do_not(kind: str) -> None:
    pairs = planted_pairs(kind, 400, tiles=(60, 200), share=0.05, dimension=8)  # type: ignore[arg-type]
    assert roc_auc_score(pairs.labels, pairs.oracle_scores()) > 0.99
    means = np.stack([bag.mean(0) for bag in pairs.bags]) @ pairs.directions.T
    for along in (*means.T, means.sum(1), means[:, 0] - means[:, 1]):
        assert 0.4 < roc_auc_score(pairs.labels, along) < 0.6


def test_tiles_are_stored_row_by_row_on_a_lattice() -> None:
    pairs = made("beside")
    for grid in pairs.grids:
        assert len({tuple(place) for place in grid.tolist()}) == len(grid)
        keys = grid[:, 1].astype(np.int64) * 10_000 + grid[:, 0]
        assert (np.diff(keys) > 0).all()


def test_what_has_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="16 tiles"):
        planted_pairs("together", 2, tiles=(4, 8))
    with pytest.raises(ValueError, match="it is together or beside"):
        planted_pairs("apart", 2)  # type: ignore[arg-type]
