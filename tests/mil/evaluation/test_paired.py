from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from bagscope.mil.evaluation import paired, ranking, regression


def drawn(seed: int, cases: int = 80, *, strength: float = 1.0, tied: bool = True):
    random = np.random.default_rng(seed)
    outcome = np.r_[0, 0, 1, 1, random.integers(0, 2, cases - 4)]
    common = random.normal(size=cases)
    first = outcome * strength + common + random.normal(size=cases)
    second = outcome + common + random.normal(size=cases)
    return (outcome, first.round(), second.round()) if tied else (outcome, first, second)


def brute_covariance(outcome, scores):
    """Placement values pair by pair (DeLong 1988)."""
    positive, negative = scores[:, outcome == 1], scores[:, outcome == 0]
    ahead = positive[:, :, None] - negative[:, None, :]
    kernel = (ahead > 0) + 0.5 * (ahead == 0)
    over_negatives, over_positives = kernel.mean(axis=2), kernel.mean(axis=1)
    covariance = np.cov(over_negatives) / positive.shape[1]
    return kernel.mean(axis=(1, 2)), covariance + np.cov(over_positives) / negative.shape[1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [False, True])
def test_delong_is_that_of_placement_values(seed, tied):
    outcome, first, second = drawn(seed, tied=tied)
    areas, covariance = paired.delong_covariance(outcome, np.stack([first, second]))
    wanted_areas, wanted = brute_covariance(outcome, np.stack([first, second]))
    np.testing.assert_allclose(areas, wanted_areas, atol=1e-12)
    np.testing.assert_allclose(covariance, wanted, atol=1e-12)
    found = paired.delong_test(outcome, first, second)
    spread = np.sqrt(wanted[0, 0] + wanted[1, 1] - 2 * wanted[0, 1])
    z = (wanted_areas[0] - wanted_areas[1]) / spread
    assert found.statistic == pytest.approx(z, rel=1e-9)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)
    assert (found.first, found.second) == pytest.approx(tuple(wanted_areas), abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * spread, rel=1e-6)
    assert (found.high + found.low) / 2 == pytest.approx(found.difference, abs=1e-12)


def test_delong_agrees_with_the_bootstrap():
    outcome, first, second = drawn(1, 300, tied=False, strength=1.3)
    delong = paired.delong_test(outcome, first, second)
    drawn_again = paired.paired_bootstrap(
        lambda counts: ranking.binary_auroc(outcome, first, counts),
        lambda counts: ranking.binary_auroc(outcome, second, counts),
        np.arange(300),
        resamples=5000,
    )
    assert drawn_again.difference == pytest.approx(delong.difference, abs=1e-12)
    assert drawn_again.low == pytest.approx(delong.low, abs=0.006)
    assert drawn_again.high == pytest.approx(delong.high, abs=0.006)
    assert drawn_again.p_value == pytest.approx(delong.p_value, abs=0.02)


def test_delong_agrees_with_swapping_the_models_at_random():
    outcome, first, second = drawn(2, 120, tied=False, strength=1.5)
    first, second = stats.rankdata(first), stats.rankdata(second)
    found = paired.delong_test(outcome, first, second)
    random = np.random.default_rng(0)
    differences = []
    for _ in range(2000):
        swapped = random.random(len(outcome)) < 0.5
        one, other = np.where(swapped, second, first), np.where(swapped, first, second)
        differences.append(
            ranking.binary_auroc(outcome, one) - ranking.binary_auroc(outcome, other)
        )
    share = np.mean(np.abs(differences) >= abs(found.difference))
    assert found.p_value == pytest.approx(share, abs=0.03)


def test_delong_holds_its_level_and_finds_what_is_there():
    def share_rejected(strength):
        found = [paired.delong_test(*drawn(s, 100, strength=strength)) for s in range(400)]
        return np.mean([one.p_value < 0.05 for one in found])

    assert 0.025 <= share_rejected(1.0) <= 0.08
    assert share_rejected(2.0) > 0.6


def test_delong_interval_covers():
    inside = 0
    for seed in range(400):
        outcome, first, _ = drawn(seed, 100, strength=1.5, tied=False)
        found = paired.delong_interval(outcome, first)
        inside += found.low <= stats.norm.cdf(1.5 / 2) <= found.high
        assert found.value == pytest.approx(ranking.binary_auroc(outcome, first), abs=1e-12)
    assert 0.92 <= inside / 400 <= 0.98


def test_delong_interval_stays_in_range():
    outcome = np.array([0, 0, 0, 1, 1, 1])
    perfect = paired.delong_interval(outcome, outcome)
    assert (perfect.value, perfect.low, perfect.high) == (1, 1, 1)
    nearly = paired.delong_interval(outcome, [0, 1, 3, 2, 4, 5])
    assert nearly.low < nearly.value < nearly.high == 1


def test_the_same_order_does_not_differ_and_no_variance_has_no_p_value():
    outcome, first, _ = drawn(0)
    same = paired.delong_test(outcome, first, np.exp(first))
    assert (same.difference, same.statistic, same.p_value) == (0, 0, 1)
    perfect = paired.delong_test(outcome, outcome, np.zeros(len(outcome)))
    assert perfect.difference == 0.5
    assert np.isnan([perfect.p_value, perfect.statistic]).all()


@pytest.mark.parametrize(
    ("outcome", "first", "second", "message"),
    [
        ([0, 0, 1], [1, 2, 3], [1, 2, 3], "two cases of each outcome, not 1 positive and 2 neg"),
        ([0, 0, 0], [1, 2, 3], [1, 2, 3], "not 0 positive and 3 negative"),
        ([0, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3], "first has 4 scores and second 3"),
        ([0, 0, 1], [1, 2, 3, 4], [1, 2, 3, 4], "outcome has 3 values for 4 cases"),
        ([0, 0, 1, 1], [1, 2, 3, np.nan], [1, 2, 3, 4], "first holds nan at position 3"),
    ],
)
def test_delong_refuses_bad_input(outcome, first, second, message):
    with pytest.raises(ValueError, match=message):
        paired.delong_test(outcome, first, second)


def error_of(values):
    return lambda counts: regression.mae(np.zeros(len(values)), values, counts)


def test_paired_bootstrap_holds_its_level_under_clusters():
    random = np.random.default_rng(5)
    patients = np.repeat(np.arange(40), 4)
    rejected = {"patient": 0, "slide": 0}
    for _ in range(300):
        one, other = (random.normal(size=(2, 40))[:, patients] + 5).clip(0)
        for unit, groups in {"patient": patients, "slide": np.arange(160)}.items():
            found = paired.paired_bootstrap(error_of(one), error_of(other), groups, resamples=200)
            rejected[unit] += found.p_value < 0.05
    assert 0.02 <= rejected["patient"] / 300 <= 0.10
    assert rejected["slide"] / 300 > 0.2


def test_paired_bootstrap_is_exact_about_its_share():
    # Nothing but −1 and 1: the difference of means is 0 or below in a countable share.
    values = np.array([1.0, 1.0, 1.0, -1.0])
    found = paired.paired_bootstrap(
        lambda counts: counts @ values / counts.sum(axis=1),
        lambda counts: 0 * counts[:, 0],
        np.arange(4),
        resamples=40_000,
    )
    wanted = 2 * stats.binom.sf(1, 4, 0.25)
    assert found.p_value == pytest.approx(wanted, abs=0.02)
    assert (found.first, found.second, found.difference) == (0.5, 0, 0.5)


def test_equal_models_have_a_p_value_of_one():
    values = np.random.default_rng(0).random(30)
    found = paired.paired_bootstrap(
        error_of(values), error_of(values), np.arange(30), resamples=100
    )
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_the_smallest_p_value_is_what_the_resamples_can_tell():
    values = np.random.default_rng(0).random(30)
    found = paired.paired_bootstrap(
        error_of(values + 9), error_of(values), np.arange(30), resamples=199
    )
    assert found.p_value == 2 / 200


def test_undefined_differences_are_counted():
    outcome = np.r_[1, np.zeros(10)]
    found = paired.paired_bootstrap(
        lambda counts: ranking.binary_auroc(outcome, np.arange(11), counts),
        lambda counts: ranking.binary_auroc(outcome, -np.arange(11), counts),
        np.arange(11),
        resamples=200,
    )
    assert found.difference == -1
    assert found.undefined > 50
    assert np.isnan([found.low, found.high, found.p_value]).all()
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (record["difference"], record["low"], record["p_value"]) == (-1, None, None)
    assert (record["method"], record["undefined"]) == ("paired bootstrap", found.undefined)
    one = paired.paired_bootstrap(
        error_of(np.ones(3)), error_of(np.ones(3)), ["a", "a", "a"], resamples=10
    )
    assert np.isnan([one.low, one.high, one.p_value]).all()


def test_corrected_t_test_by_hand():
    # Differences .02 .04 .06 .00: mean .03, s² = .0020 / 3; raised by 1/4 + 1/9.
    found = paired.corrected_resampled_t_test(
        [0.82, 0.84, 0.86, 0.8], [0.8, 0.8, 0.8, 0.8], train_cases=90, test_cases=10
    )
    t = 0.03 / np.sqrt(0.002 / 3 * (1 / 4 + 1 / 9))
    assert found.statistic == pytest.approx(t)
    assert found.p_value == pytest.approx(2 * stats.t.sf(t, 3))
    assert (found.low + found.high) / 2 == pytest.approx(0.03)
    assert (found.low < 0) == (found.p_value > 0.05)


def test_corrected_t_test_without_overlap_is_the_plain_one():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 12))
    plain = stats.ttest_rel(one, other)
    found = paired.corrected_resampled_t_test(one, other, train_cases=1e12, test_cases=1)
    assert found.p_value == pytest.approx(plain.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(plain.confidence_interval()), rel=1e-6)


def test_corrected_t_test_is_not_too_sure_of_repeated_splits():
    random = np.random.default_rng(1)
    plain, corrected = 0, 0
    for _ in range(300):
        # Per-case advantages that are none; each split averages a random tenth.
        advantage = random.normal(size=100)
        splits = np.stack([random.permutation(100)[:20] for _ in range(30)])
        values = advantage[splits].mean(axis=1)
        plain += stats.ttest_1samp(values, 0).pvalue < 0.05
        found = paired.corrected_resampled_t_test(
            values, np.zeros(30), train_cases=80, test_cases=20
        )
        corrected += found.p_value < 0.05
    assert plain / 300 > 0.3
    assert corrected / 300 < 0.1


@pytest.mark.parametrize(
    ("first", "second", "p_value"), [([1, 1], [1, 1], 1.0), ([1, 1], [0, 0], np.nan)]
)
def test_folds_that_all_differ_alike_have_no_t(first, second, p_value):
    found = paired.corrected_resampled_t_test(first, second, train_cases=2, test_cases=1)
    np.testing.assert_equal(found.p_value, p_value)


@pytest.mark.parametrize(
    ("first", "second", "train", "message"),
    [
        ([1], [1], 10, "first has 1 folds and second 1"),
        ([1, 2], [1, 2, 3], 10, "first has 2 folds and second 3"),
        ([1, 2], [1, 2], 0, "folds train on 0 cases and test on 5"),
        ([1, np.nan], [1, 2], 10, "first holds nan at position 1"),
    ],
)
def test_bad_folds_are_refused(first, second, train, message):
    with pytest.raises(ValueError, match=message):
        paired.corrected_resampled_t_test(first, second, train_cases=train, test_cases=5)


def brute_holm(p_values):
    """Reject step by step: the adjusted value is the smallest level that rejects."""
    adjusted = []
    for p in p_values:
        smaller = [q for q in p_values if q <= p]
        worst = max(q * (len(p_values) - sum(other < q for other in p_values)) for q in smaller)
        adjusted.append(min(1.0, worst))
    return adjusted


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_step_down_rule(seed):
    p_values = np.random.default_rng(seed).random(9).round(2) ** 2
    np.testing.assert_allclose(paired.holm(p_values), brute_holm(list(p_values)), atol=1e-12)


def test_holm_by_hand_and_without_the_unknown():
    np.testing.assert_allclose(paired.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(paired.holm([np.nan, 0.04, 0.01]), [np.nan, 0.04, 0.02])
    assert len(paired.holm([])) == 0
    with pytest.raises(ValueError, match="p-values are"):
        paired.holm([0.5, 1.5])
