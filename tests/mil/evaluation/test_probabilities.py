from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from bagscope.mil.evaluation import probabilities


def drawn(seed: int, classes: int = 3, cases: int = 70):
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(classes), cases)
    y = np.array([random.choice(classes, p=row) for row in p])
    return y, p, random.integers(0, 4, cases)


def brute_ece(outcome, q, bins):
    """Loop over the bins (k/B, (k+1)/B]."""
    total = 0.0
    for k in range(bins):
        inside = (q > k / bins) & (q <= (k + 1) / bins) | ((k == 0) & (q == 0))
        if inside.any():
            total += inside.mean() * abs(outcome[inside].mean() - q[inside].mean())
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", [2, 4])
def test_losses_are_those_of_scikit_learn(seed, classes):
    y, p, weights = drawn(seed, classes)
    labels = range(classes)
    assert probabilities.log_loss(y, p, weights) == pytest.approx(
        metrics.log_loss(y, p, labels=labels, sample_weight=weights), abs=1e-12
    )
    wanted = np.average(((p - np.eye(classes)[y]) ** 2).sum(axis=1), weights=weights)
    assert probabilities.brier(y, p, weights) == pytest.approx(wanted, abs=1e-12)


def test_brier_of_two_classes_is_twice_the_binary_one():
    y, p, _ = drawn(0, 2)
    binary = probabilities.binary_brier(y, p[:, 1])
    assert binary == pytest.approx(metrics.brier_score_loss(y, p[:, 1]), abs=1e-12)
    assert probabilities.brier(y, p) == pytest.approx(2 * binary, abs=1e-12)


def test_certainty_in_the_wrong_class_is_a_finite_loss():
    assert probabilities.log_loss([0], [[0.0, 1.0]]) == pytest.approx(52 * np.log(2))
    assert probabilities.brier([0], [[0.0, 1.0]]) == 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_is_that_of_a_loop_over_bins(seed, bins):
    y, p, _ = drawn(seed, 2)
    q = p[:, 1].round(1)
    assert probabilities.binary_ece(y, q, bins=bins) == pytest.approx(
        brute_ece(y, q, bins), abs=1e-12
    )
    y, p, _ = drawn(seed, 4)
    right = (p.argmax(axis=1) == y).astype(float)
    assert probabilities.ece(y, p, bins=bins) == pytest.approx(
        brute_ece(right, p.max(axis=1), bins), abs=1e-12
    )


def test_the_default_is_fifteen_bins_of_equal_width():
    y, p, _ = drawn(5, 2)
    assert probabilities.ece(y, p) == probabilities.ece(y, p, bins=15, binning="width")


@pytest.mark.parametrize("bins", [1, 4, 7])
def test_bins_of_equal_mass_are_slices_of_the_ranks(bins):
    random = np.random.default_rng(bins)
    q = np.sort(random.random(28 * 5))
    outcome = random.random(len(q)) < q
    slices = np.array_split(np.arange(len(q)), bins)
    wanted = sum(len(s) / len(q) * abs(outcome[s].mean() - q[s].mean()) for s in slices)
    mixed = random.permutation(len(q))
    found = probabilities.binary_ece(outcome[mixed], q[mixed], bins=bins, binning="mass")
    assert found == pytest.approx(wanted, abs=1e-12)


def test_equal_probabilities_share_a_bin_of_mass():
    # Split over two bins, the cases of 0.5 would show an error that depends on their order.
    outcome = np.array([1] * 10 + [0] * 10)
    assert probabilities.binary_ece(outcome, np.full(20, 0.5), bins=2, binning="mass") == 0


def test_ends_of_the_range_have_bins():
    assert probabilities.binary_ece([0, 1], [0.0, 1.0]) == 0
    assert probabilities.binary_ece([1, 0], [0.0, 1.0]) == 1


@pytest.mark.parametrize(("bins", "binning"), [(0, "width"), (5, "depth")])
def test_unknown_bins_are_refused(bins, binning):
    with pytest.raises(ValueError, match="give 1 or more, of 'width' or 'mass'"):
        probabilities.binary_ece([0, 1], [0.2, 0.8], bins=bins, binning=binning)
