from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from bagscope.mil.evaluation import regression


def drawn(seed: int, cases: int = 60):
    random = np.random.default_rng(seed)
    y = random.integers(0, 8, cases).astype(float)
    return y, y + random.integers(-3, 4, cases), random.integers(0, 4, cases)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_metrics_are_those_of_scikit_learn_and_scipy(seed, offset):
    y, predicted, weights = drawn(seed)
    y, predicted = y + offset, predicted + offset
    for metric, theirs in [
        (regression.mae, metrics.mean_absolute_error),
        (regression.rmse, metrics.root_mean_squared_error),
        (regression.r2, metrics.r2_score),
    ]:
        assert metric(y, predicted) == pytest.approx(theirs(y, predicted), abs=1e-9)
        assert metric(y, predicted, weights) == pytest.approx(
            theirs(y, predicted, sample_weight=weights), abs=1e-9
        )
    assert regression.pearson(y, predicted) == pytest.approx(
        stats.pearsonr(y, predicted).statistic, abs=1e-9
    )
    assert regression.spearman(y, predicted) == pytest.approx(
        stats.spearmanr(y, predicted).statistic, abs=1e-12
    )


def test_rank_correlation_knows_the_order_alone():
    y, predicted, _ = drawn(9)
    assert regression.spearman(np.exp(y), predicted**3) == pytest.approx(
        regression.spearman(y, predicted), abs=1e-12
    )
    assert regression.spearman(y, y) == 1
    assert regression.spearman(y, -y) == pytest.approx(-1)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9 + 0.1])
def test_constants_have_no_correlation_and_no_r2(constant):
    y, predicted, weights = drawn(1)
    flat = np.full(len(y), constant)
    for metric in (regression.pearson, regression.spearman):
        with pytest.raises(ValueError, match="the correlation is undefined"):
            metric(y, flat)
        with pytest.raises(ValueError, match="the correlation is undefined"):
            metric(flat, predicted, weights)
    with pytest.raises(ValueError, match="R² is undefined"):
        regression.r2(flat, predicted)


def test_a_resample_of_equal_values_is_undefined():
    # Sums of squares about the mean cancel, and in most of these resamples not to exactly 0.
    y = np.array([0.1, 0.1, 0.1, 0.7, 1.3])
    counts = np.random.default_rng(0).integers(1, 9, (200, 5))
    counts[:-1, 3:] = 0
    for metric in (regression.r2, regression.pearson, regression.spearman):
        values = metric(y, y, counts)
        assert np.isnan(values[:-1]).all()
        assert values[-1] == pytest.approx(1)
