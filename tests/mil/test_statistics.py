from __future__ import annotations

import numpy as np
import pytest
import torch

from bagscope.errors import ArtifactError
from bagscope.mil.sources import ArraySource
from bagscope.mil.statistics import FeatureStatistics, scale_of, statistics_of
from tests.mil.made_bags import made_source


def source_of(bags: list[np.ndarray]) -> ArraySource:
    return ArraySource(bags, made_source(len(bags)).cases)


def test_they_are_those_of_all_tiles_and_of_the_bags_means() -> None:
    generator = np.random.default_rng(0)
    bags = [
        (generator.normal(size=(n, 5)) * 3 + place).astype(np.float32)
        for place, n in enumerate((1, 40, 7, 300))
    ]
    found = statistics_of(source_of(bags))
    tiles = np.concatenate(bags).astype(np.float64)
    means = np.stack([bag.astype(np.float64).mean(0) for bag in bags])
    np.testing.assert_allclose(found.mean, tiles.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.std, tiles.std(0), rtol=1e-12)
    np.testing.assert_allclose(found.bag_mean, means.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.bag_std, means.std(0), rtol=1e-12)


def test_a_large_mean_cancels_nothing() -> None:
    generator = np.random.default_rng(1)
    small = [generator.normal(size=(n, 2)) for n in (30, 50)]
    far = [bag + 1e7 for bag in small]
    np.testing.assert_allclose(
        statistics_of(source_of(far)).std, np.concatenate(far).std(0), rtol=1e-7
    )


def test_they_come_back_from_tensors_to_the_same_bits() -> None:
    found = statistics_of(made_source(5))
    again = FeatureStatistics.of_tensors(found.tensors())
    for name in ("mean", "std", "bag_mean", "bag_std"):
        np.testing.assert_array_equal(getattr(found, name), getattr(again, name))


def test_scaled_tiles_have_mean_0_and_deviation_1() -> None:
    bags = [bag.astype(np.float32) * 7 + 2 for bag in np.random.default_rng(2).random((4, 50, 3))]
    for bag in bags:
        bag[:, 1] = 4.0  # never changes
    scale = scale_of(statistics_of(source_of(bags)))
    scaled = scale.apply(torch.from_numpy(np.concatenate(bags))).double().numpy()
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(0), [1, 0, 1], atol=1e-5)
    assert torch.isfinite(scale.factor).all()


def test_values_that_are_no_numbers_are_said_with_their_case() -> None:
    source = made_source(8, seed=1)
    source.read(3).features[0] = np.inf
    with pytest.raises(ArtifactError, match=r"c003: 1 of \d+ tiles"):
        statistics_of(source)
