"""What is flagged as unlike: how often by mistake, and what must not be missed."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from bagscope.mil.cases import Case
from bagscope.mil.ood import OodReference, moments_of, ood_distance, reference_of
from bagscope.mil.sources import ArraySource
from bagscope.mil.statistics import statistics_of

DIMENSION = 12


def source_of(bags: list[np.ndarray], each: int = 1) -> ArraySource:
    """Return bags as a source, `each` of a patient."""
    cases = [
        Case(case_id=f"c{place}", patient_id=f"p{place // each}", slide_ids=(f"c{place}",))
        for place in range(len(bags))
    ]
    return ArraySource(bags, cases)


def draw(generator: np.random.Generator, count: int) -> list[np.ndarray]:
    """Return bags of correlated dimensions on different scales, with an offset of their own."""
    mixing = np.random.default_rng(7).normal(size=(DIMENSION, DIMENSION))
    scale = np.geomspace(0.01, 100, DIMENSION)
    bags = []
    for _ in range(count):
        tiles = generator.normal(size=(generator.integers(3, 40), DIMENSION)) @ mixing
        bags.append((tiles + 0.7 * generator.standard_t(4, size=DIMENSION)) * scale)
    return bags


def distances(train: list[np.ndarray], new: list[np.ndarray]) -> tuple[OodReference, np.ndarray]:
    source = source_of(train)
    statistics = statistics_of(source)
    reference = reference_of(source, statistics)
    found = [ood_distance(moments_of(bag), statistics, reference) for bag in new]
    return reference, np.array(found)


@pytest.mark.parametrize("each", [1, 3])
def test_a_training_bag_is_judged_by_the_other_patients_alone(each: int) -> None:
    """Brute force: leave each patient out, compute both distances from the rest in plain NumPy."""
    bags = draw(np.random.default_rng(3), 9)
    bag, tile = [], []
    for place, one in enumerate(bags):
        rest = [other for at, other in enumerate(bags) if at // each != place // each]
        means = np.array([other.mean(axis=0) for other in rest])
        tiles = np.concatenate(rest)
        wide = [values.var(axis=0) for values in (means, tiles)]
        wide = [np.maximum(values, 0.05**2 * values.mean()) for values in wide]
        bag.append(np.sqrt(((one.mean(axis=0) - means.mean(axis=0)) ** 2 / wide[0]).mean()))
        tile.append(np.sqrt(((one - tiles.mean(axis=0)) ** 2 / wide[1]).mean()))
    source = source_of(bags, each)
    reference = reference_of(source, statistics_of(source))
    expected = np.sort(np.maximum(bag / np.median(bag), tile / np.median(tile)))
    np.testing.assert_allclose(reference.scores, expected, rtol=1e-9)
    assert reference.usual_bag == pytest.approx(np.median(bag))
    assert reference.usual_tiles == pytest.approx(np.median(tile))


@pytest.mark.parametrize(("train", "stated"), [(30, 1 / 31), (150, 1 / 151)])
def test_bags_of_the_same_kind_are_flagged_at_the_stated_rate(train: int, stated: float) -> None:
    rounds, new = 100, 30
    flagged = 0
    for seed in range(rounds):
        generator = np.random.default_rng([train, seed])
        reference, found = distances(draw(generator, train), draw(generator, new))
        assert reference.false_alarm_rate == pytest.approx(stated)
        flagged += int((found > 1).sum())
    rate = flagged / (rounds * new)
    # The limit is the largest of the training scores, so each round has a rate of its own, which
    # varies as much as it is large; within a round the draws are independent.
    error = stated * math.sqrt(1 / rounds + 1 / (stated * rounds * new))
    assert rate == pytest.approx(stated, abs=4 * error)


def test_shifted_features_are_noticed() -> None:
    generator = np.random.default_rng(5)
    train, scale = draw(generator, 120), np.geomspace(0.01, 100, DIMENSION)
    _, shifted = distances(train, [bag + 12 * scale for bag in draw(generator, 40)])
    _, other_scale = distances(train, [bag * 4 for bag in draw(generator, 40)])
    assert (shifted > 1).mean() > 0.95
    assert (other_scale > 1).mean() > 0.9


def test_some_strange_tiles_are_noticed_though_they_leave_the_mean_where_it_was() -> None:
    generator = np.random.default_rng(6)
    train, strange = draw(generator, 120), []
    for bag in draw(generator, 40):
        off, some = 40 * np.geomspace(0.01, 100, DIMENSION), bag[: 1 + len(bag) // 8]
        strange.append(np.concatenate([bag, some + off, some - off]))
    _, found = distances(train, strange)
    assert (found > 1).mean() > 0.95


def test_a_dimension_that_never_moved_does_not_stay_unwatched() -> None:
    generator = np.random.default_rng(8)
    train = [np.c_[bag, np.full(len(bag), 3.0)] for bag in draw(generator, 60)]
    new = [np.c_[bag, np.full(len(bag), 3.0)] for bag in draw(generator, 20)]
    _, same = distances(train, new)
    moved = [bag + np.r_[np.zeros(DIMENSION), 1e4] for bag in new]
    _, found = distances(train, moved)
    assert np.isfinite(same).all()
    assert (found > 1).all()


def test_of_two_bags_nothing_is_said() -> None:
    generator = np.random.default_rng(9)
    reference, found = distances(draw(generator, 2), draw(generator, 3))
    assert np.isnan(found).all()
    assert reference.false_alarm_rate == 0


def test_tensors_and_back() -> None:
    reference, _ = distances(draw(np.random.default_rng(4), 10), [])
    again = OodReference.of_tensors(reference.tensors())
    assert again.limit == reference.limit
    assert again.usual_bag == reference.usual_bag
    np.testing.assert_array_equal(again.scores, reference.scores)


@pytest.mark.parametrize("tiles", [1, 1024, 2500])
def test_moments_are_those_of_all_tiles_at_once(tiles: int) -> None:
    bag = (100 + np.random.default_rng(1).normal(size=(tiles, DIMENSION))).astype(np.float32)
    found, exact = moments_of(bag), bag.astype(np.float64)
    assert found.tiles == tiles
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.variance, exact.var(axis=0), rtol=1e-9, atol=1e-12)


def test_moments_of_a_large_bag_take_little_memory() -> None:
    bag = np.ones((40_000, 64), np.float16)
    tracemalloc.start()
    try:
        moments_of(bag)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < bag.nbytes / 2
