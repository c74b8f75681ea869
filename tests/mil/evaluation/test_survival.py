from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagscope.mil.evaluation import survival


def drawn(seed: int, cases: int = 50, *, tied: bool = True):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=cases)
    time = random.exponential(np.exp(-hidden)) * 10
    censored = random.exponential(12, cases)
    event = time <= censored
    time = np.minimum(time, censored)
    risk = hidden + random.normal(size=cases)
    if tied:
        time, risk = np.ceil(time), risk.round()
    return time, event, risk


def brute_concordance(time, event, risk):
    """Loop over ordered pairs."""
    won = comparable = 0.0
    for i in range(len(time)):
        for j in range(len(time)):
            later = time[i] < time[j] or (time[i] == time[j] and not event[j])
            if event[i] and later:
                comparable += 1
                if abs(risk[i] - risk[j]) <= 1e-8:
                    won += 0.5
                elif risk[i] > risk[j]:
                    won += 1
    return won / comparable


def brute_auc(time, event, risk, at):
    """Loop over cases and controls, with the censoring curve made step by step."""
    won = total = 0.0
    for i in range(len(time)):
        if not (event[i] and time[i] <= at):
            continue
        followed = 1.0
        for moment in sorted(set(time[time < time[i]])):
            gone = np.sum((time == moment) & ~event)
            followed *= 1 - gone / (np.sum(time >= moment) - np.sum((time == moment) & event) or 1)
        for j in range(len(time)):
            if time[j] > at:
                total += 1 / followed
                won += ((risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j])) / followed
    return won / total


@pytest.mark.parametrize("seed", range(6))
def test_concordance_is_that_of_all_pairs(seed, monkeypatch):
    monkeypatch.setattr(survival, "_PAIRS_AT_ONCE", 170)
    data = drawn(seed)
    assert survival.concordance(*data) == pytest.approx(brute_concordance(*data), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [False, True])
def test_concordance_is_that_of_scikit_survival(seed, tied):
    sksurv = pytest.importorskip("sksurv.metrics")
    time, event, risk = drawn(seed, 120, tied=tied)
    wanted = sksurv.concordance_index_censored(event, time, risk)[0]
    assert survival.concordance(time, event, risk) == pytest.approx(wanted, abs=1e-12)


def test_equal_times_compare_an_event_with_a_censoring_only():
    assert survival.concordance([3, 3], [1, 0], [2, 1]) == 1
    assert survival.concordance([3, 3], [1, 0], [1, 2]) == 0
    for event in ([1, 1], [0, 0]):
        with pytest.raises(ValueError, match="no pair can be compared"):
            survival.concordance([3, 3], event, [1, 2])


def test_risks_a_hair_apart_are_equal():
    assert survival.concordance([1, 2], [1, 1], [0.5 + 1e-9, 0.5]) == 0.5
    assert survival.concordance([1, 2], [1, 1], [0.5 + 1e-7, 0.5]) == 1


@pytest.mark.parametrize("event", [[0, 0, 0], [0, 0, 1]])
def test_concordance_without_a_pair_is_undefined(event):
    with pytest.raises(ValueError, match="the C-index is undefined: no pair can be compared"):
        survival.concordance([1, 2, 3], event, [3, 2, 1])
    assert np.isnan(survival.concordance([1, 2, 3], event, [3, 2, 1], np.ones((2, 3)))).all()


@given(st.integers(0, 2**16))
@settings(max_examples=40)
def test_concordance_knows_the_order_alone_and_turns_with_it(seed):
    time, event, risk = drawn(seed, 25)
    event[np.argmin(time)] = True
    if not (time > time.min()).any():
        return
    value = survival.concordance(time, event, risk)
    turned = survival.concordance(time, event, -risk)
    assert survival.concordance(time**2, event, np.exp(risk)) == pytest.approx(value, abs=1e-12)
    assert turned == pytest.approx(1 - value, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("at", [3.0, 7.5])
def test_auc_at_a_time_is_that_of_all_cases_and_controls(seed, tied, at):
    data = drawn(seed, tied=tied)
    assert survival.auc_at(*data, at=at) == pytest.approx(brute_auc(*data, at), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_auc_at_a_time_is_that_of_scikit_survival(seed):
    sksurv = pytest.importorskip("sksurv.metrics")
    util = pytest.importorskip("sksurv.util")
    time, event, risk = drawn(seed, 150, tied=False)
    truth = util.Surv.from_arrays(event, time)
    times = np.array([2.0, 5.0, 8.0])
    wanted, _ = sksurv.cumulative_dynamic_auc(truth, truth, risk.round(1), times)
    found = [survival.auc_at(time, event, risk.round(1), at=at) for at in times]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_weighting_undoes_censoring():
    random = np.random.default_rng(0)
    cases = 4000
    hidden = random.normal(size=cases)
    time = random.exponential(np.exp(-hidden))
    # Censoring by chance hides late events; the weights give them back.
    censored = random.exponential(1.0, cases)
    full = survival.auc_at(time, np.ones(cases), hidden, at=1.0)
    seen = survival.auc_at(np.minimum(time, censored), time <= censored, hidden, at=1.0)
    assert seen == pytest.approx(full, abs=0.02)


@pytest.mark.parametrize("at", [0.5, 100.0])
def test_auc_without_cases_or_controls_is_undefined(at):
    with pytest.raises(ValueError, match=f"the AUC at time {at:g} is undefined"):
        survival.auc_at(*drawn(0), at=at)


def test_nobody_is_censored_before_the_first_censoring():
    times = np.array([1.0, 2.0, 2.0, 3.0, 4.0])
    events = np.array([True, True, False, True, False])
    chance = survival.uncensored_before(times, events, np.ones((1, 5)))
    # At time 2 the event goes first and leaves three, one of which is censored.
    np.testing.assert_allclose(chance, [[1, 1, 1, 2 / 3, 2 / 3]])


@pytest.mark.parametrize(
    ("time", "event", "message"),
    [
        ([1, -2], [0, 1], "time holds -2 at position 1; follow-up cannot be negative"),
        ([1, np.inf], [0, 1], "time holds inf at position 1"),
        ([1, 2], [0, 2], "event holds 2 at position 1; give 0 or 1"),
        ([1, 2], [0], "event has 1 values for 2 cases"),
    ],
)
def test_bad_follow_up_is_refused(time, event, message):
    with pytest.raises(ValueError, match=message):
        survival.concordance(time, event, [1, 2])
