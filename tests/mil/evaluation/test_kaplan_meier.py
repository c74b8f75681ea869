from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats

from bagscope.mil.evaluation.kaplan_meier import kaplan_meier, log_rank


def drawn(seed: int, cases: int = 60, *, tied: bool = True):
    random = np.random.default_rng(seed)
    time, censored = random.exponential(10, cases), random.exponential(15, cases)
    event = time <= censored
    time = np.minimum(time, censored)
    return (np.ceil(time) if tied else time), event


def as_scipy(time, event):
    return stats.CensoredData(uncensored=time[event], right=time[~event])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tied", [False, True])
def test_the_curve_and_its_band_are_those_of_scipy(seed, tied):
    time, event = drawn(seed, tied=tied)
    # An observed end would leave nobody alive, where no band exists; a test of its own has it.
    event[time == time.max()] = False
    curve = kaplan_meier(time, event)
    theirs = stats.ecdf(as_scipy(time, event)).sf
    np.testing.assert_array_equal(curve.time, theirs.quantiles)
    np.testing.assert_allclose(curve.survival, theirs.probabilities, atol=1e-12)
    after = curve.survival < 1
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # Of the times before the first event, where its band is undefined.
        warnings.simplefilter("ignore", RuntimeWarning)
        band = theirs.confidence_interval(method="log-log")
    np.testing.assert_allclose(curve.low[after], band.low.probabilities[after], atol=1e-12)
    np.testing.assert_allclose(curve.high[after], band.high.probabilities[after], atol=1e-12)
    assert (curve.low[~after] == 1).all()
    assert (curve.high[~after] == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_is_that_of_scikit_survival(seed):
    nonparametric = pytest.importorskip("sksurv.nonparametric")
    time, event = drawn(seed)
    curve = kaplan_meier(time, event, level=0.9)
    steps, alive, band = nonparametric.kaplan_meier_estimator(
        event, time, conf_level=0.9, conf_type="log-log"
    )
    np.testing.assert_array_equal(curve.time, steps)
    np.testing.assert_allclose(curve.survival, alive, atol=1e-12)
    inside = (alive > 0) & (alive < 1)
    np.testing.assert_allclose(curve.low[inside], band[0][inside], atol=1e-12)
    np.testing.assert_allclose(curve.high[inside], band[1][inside], atol=1e-12)


def test_a_worked_example():
    # 6-MP arm of Freireich et al. 1963, survival as tabulated in textbooks.
    time = [6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    event = [1] * 9 + [0] * 12
    curve = kaplan_meier(time, event)
    found = curve.survival_at([5, 6, 7, 10, 13, 16, 22, 23])
    wanted = [1, 0.8571, 0.8067, 0.7529, 0.6902, 0.6275, 0.5378, 0.4482]
    np.testing.assert_allclose(found, wanted, atol=5e-5)
    median = curve.median()
    assert (median.value, median.low) == (23, 13)
    assert np.isnan(median.high)
    np.testing.assert_array_equal(curve.at_risk_at([0, 6, 6.5, 35, 36]), [21, 21, 17, 1, 0])
    assert (curve.events.sum(), curve.censored.sum()) == (9, 12)


def test_follow_up_that_ends_censored_tells_nothing_beyond():
    curve = kaplan_meier([1, 2, 3], [1, 1, 0])
    np.testing.assert_allclose(curve.survival_at([0, 1, 2.9, 3]), [1, 2 / 3, 1 / 3, 1 / 3])
    assert np.isnan(curve.survival_at([3.1])).all()
    assert curve.median().value == 2
    extinct = kaplan_meier([1, 2], [1, 1])
    np.testing.assert_array_equal(extinct.survival_at([2, 9]), [0, 0])
    assert np.isnan(extinct.low[-1])
    assert np.isnan(extinct.high[-1])


def test_survival_of_exactly_one_half_is_the_median_despite_rounding():
    curve = kaplan_meier(np.arange(1, 25), np.ones(24))
    # 23/24 · 22/23 · … · 12/13 is a half but for rounding.
    assert 0.5 < curve.survival[11] < 0.5 + 1e-12
    assert curve.median().value == 12


def test_nobody_with_an_event_has_no_median():
    median = kaplan_meier([1, 2], [0, 0]).median()
    assert np.isnan([median.value, median.low, median.high]).all()


def test_the_band_covers():
    random = np.random.default_rng(3)
    inside = 0
    for _ in range(400):
        time, censored = random.exponential(1, 60), random.exponential(2, 60)
        curve = kaplan_meier(np.minimum(time, censored), time <= censored)
        last = np.searchsorted(curve.time, 0.8, side="right") - 1
        inside += curve.low[last] <= np.exp(-0.8) <= curve.high[last]
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tied", [False, True])
def test_log_rank_of_two_is_that_of_scipy(seed, tied):
    time, event = drawn(seed, tied=tied)
    group = np.arange(len(time)) % 3 == 0
    theirs = stats.logrank(
        as_scipy(time[group], event[group]), as_scipy(time[~group], event[~group])
    )
    found = log_rank(time, event, group)
    assert found.statistic == pytest.approx(theirs.statistic**2, rel=1e-9)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    assert found.degrees == 1


@pytest.mark.parametrize("seed", range(5))
def test_log_rank_of_four_is_that_of_scikit_survival(seed):
    compare = pytest.importorskip("sksurv.compare")
    util = pytest.importorskip("sksurv.util")
    time, event = drawn(seed, 120)
    group = np.array(["d", "b", "c", "a"])[np.random.default_rng(seed).integers(0, 4, 120)]
    statistic, p_value, table, _ = compare.compare_survival(
        util.Surv.from_arrays(event, time), group, return_stats=True
    )
    found = log_rank(time, event, group)
    assert found.groups == ("a", "b", "c", "d")
    assert found.degrees == 3
    assert found.statistic == pytest.approx(statistic, rel=1e-9)
    assert found.p_value == pytest.approx(p_value, rel=1e-9)
    np.testing.assert_array_equal(found.cases, table["counts"])
    np.testing.assert_array_equal(found.observed, table["observed"])
    np.testing.assert_allclose(found.expected, table["expected"], rtol=1e-9)


def test_log_rank_holds_its_level():
    random = np.random.default_rng(0)
    p_values = []
    for _ in range(400):
        time, censored = random.exponential(1, 90), random.exponential(2, 90)
        p_values.append(
            log_rank(np.minimum(time, censored), time <= censored, np.arange(90) % 3).p_value
        )
    assert 0.025 <= np.mean(np.array(p_values) < 0.05) <= 0.08


def test_a_group_gone_before_the_first_event_adds_no_degree():
    time = np.array([1, 1, 4, 5, 6, 7, 4, 8])
    event = np.array([0, 0, 1, 1, 0, 1, 1, 1])
    group = np.array(["gone", "gone", "a", "a", "a", "b", "b", "b"])
    found = log_rank(time, event, group)
    without = log_rank(time[2:], event[2:], group[2:])
    assert found.degrees == 1
    assert found.statistic == pytest.approx(without.statistic)
    assert found.expected[found.groups.index("gone")] == 0


@pytest.mark.parametrize(
    ("event", "group", "message"),
    [
        ([1, 1, 0], ["a", "a", "a"], "there is only a"),
        ([0, 0, 0], ["a", "b", "b"], "all cases are censored"),
        ([0, 0, 1], ["a", "a", "b"], "needs two groups at risk at an event"),
        ([1, 1, 0], ["a", "b"], "group has 2 values for 3 cases"),
    ],
)
def test_nothing_to_compare_is_refused(event, group, message):
    with pytest.raises(ValueError, match=message):
        log_rank([1, 2, 3], event, group)


def test_a_level_that_is_none_is_refused():
    with pytest.raises(ValueError, match="level is 95; give a share between 0 and 1"):
        kaplan_meier([1, 2], [1, 0], level=95)
