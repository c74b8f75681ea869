from __future__ import annotations

import json
from time import process_time

import numpy as np
import pytest

from bagscope.mil.evaluation import (
    bootstrap,
    decisions,
    probabilities,
    ranking,
    regression,
    survival,
)


def whole(groups, **options):
    return np.concatenate(list(bootstrap.resample_counts(groups, **options)))


def mean_of(values):
    return lambda counts: counts @ values / counts.sum(axis=1)


def test_rows_of_a_patient_come_and_go_together():
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    counts = whole(groups, resamples=200, seed=3)
    assert counts.shape == (200, 6)
    np.testing.assert_array_equal(counts[:, 0], counts[:, 2])
    np.testing.assert_array_equal(counts[:, 0], counts[:, 5])
    np.testing.assert_array_equal(counts[:, 1], counts[:, 4])
    np.testing.assert_array_equal(counts[:, [0, 1, 3]].sum(axis=1), np.full(200, 3))


def test_every_patient_is_drawn_as_often():
    counts = whole(np.arange(20), resamples=20_000, seed=0)
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.04)
    np.testing.assert_allclose(counts.var(axis=0), 1 - 1 / 20, atol=0.05)
    assert np.corrcoef(counts[:, 0], counts[:, 1])[0, 1] == pytest.approx(-1 / 19, abs=0.03)


def test_pieces_do_not_change_the_draws(monkeypatch):
    groups = np.arange(30) // 2
    for strata in (None, np.arange(30) // 6):
        once = whole(groups, resamples=50, seed=1, strata=strata)
        again = whole(groups, resamples=50, seed=1, strata=strata)
        np.testing.assert_array_equal(once, again)
        assert (whole(groups, resamples=50, seed=2, strata=strata) != once).any()
    monkeypatch.setattr(bootstrap, "_COUNTS_AT_ONCE", 7 * 30)
    pieces = list(bootstrap.resample_counts(groups, resamples=50, seed=1))
    assert [len(piece) for piece in pieces] == [7] * 7 + [1]
    monkeypatch.undo()
    np.testing.assert_array_equal(np.concatenate(pieces), whole(groups, resamples=50, seed=1))


def test_strata_keep_their_patients():
    groups = np.array([0, 0, 1, 2, 3, 3, 4, 5])
    strata = np.array([0, 1, 0, 0, 1, 1, 1, 1])
    counts = whole(groups, resamples=100, seed=0, strata=strata)
    # Patient 0 lies in both and is a stratum of its own.
    np.testing.assert_array_equal(counts[:, :2], np.ones((100, 2)))
    np.testing.assert_array_equal(counts[:, 2:4].sum(axis=1), np.full(100, 2))
    np.testing.assert_array_equal(counts[:, [4, 6, 7]].sum(axis=1), np.full(100, 3))
    assert counts[:, 2].std() > 0


def test_interval_holds_value_ends_and_numbers():
    values = np.random.default_rng(0).normal(5, 1, 400)
    found = bootstrap.interval(mean_of(values), np.arange(400), resamples=4000, seed=1)
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.006)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.006)
    assert (found.level, found.resamples, found.undefined, found.note) == (0.95, 4000, 0, "")
    narrow = bootstrap.interval(mean_of(values), np.arange(400), resamples=4000, level=0.5)
    assert narrow.high - narrow.low < 0.4 * (found.high - found.low)


def test_many_statistics_share_the_resamples():
    values = np.random.default_rng(0).normal(size=(2, 50))
    together = bootstrap.intervals(
        {"a": mean_of(values[0]), "b": mean_of(values[1])}, np.arange(50), resamples=300, seed=5
    )
    for name, row in zip("ab", values, strict=True):
        alone = bootstrap.interval(mean_of(row), np.arange(50), resamples=300, seed=5)
        assert together[name] == alone


def test_undefined_resamples_are_counted_and_left_out():
    random = np.random.default_rng(0)
    outcome = np.r_[np.ones(4), np.zeros(30)]
    score = outcome + random.normal(size=34)
    found = bootstrap.interval(
        lambda counts: ranking.binary_auroc(outcome, score, counts), np.arange(34), resamples=3000
    )
    # No positive is drawn with probability (30 / 34)^34.
    assert found.undefined / 3000 == pytest.approx((30 / 34) ** 34, abs=0.006)
    assert found.low < found.value < found.high
    assert found.note == (
        f"undefined in {found.undefined} of 3000 resamples, which the interval leaves out"
    )


def test_too_many_undefined_resamples_leave_no_interval():
    outcome = np.r_[1, np.zeros(10)]
    score = np.arange(11.0)
    found = bootstrap.interval(
        lambda counts: ranking.binary_auroc(outcome, score, counts), np.arange(11), resamples=500
    )
    assert found.value == 0
    assert np.isnan([found.low, found.high]).all()
    assert 100 < found.undefined < 300
    assert found.note.endswith("too many for an interval")
    stratified = bootstrap.interval(
        lambda counts: ranking.binary_auroc(outcome, score, counts),
        np.arange(11),
        resamples=500,
        strata=outcome,
    )
    assert stratified.undefined == 0
    assert stratified.high == 0


def test_an_undefined_value_is_nan_throughout_and_null_in_json():
    found = bootstrap.interval(
        lambda counts: ranking.binary_auroc(np.ones(5), np.arange(5), counts),
        np.arange(5),
        resamples=20,
    )
    assert np.isnan([found.value, found.low, found.high]).all()
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record == {
        "value": None,
        "low": None,
        "high": None,
        "level": 0.95,
        "resamples": 20,
        "undefined": 20,
    }


def test_one_patient_has_a_value_and_no_interval():
    found = bootstrap.interval(mean_of(np.arange(4.0)), ["a"] * 4, resamples=10)
    assert found.value == 1.5
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.slow
def test_a_whole_table_takes_seconds():
    random = np.random.default_rng(0)
    y = random.integers(0, 4, 1000)
    p = random.dirichlet(np.ones(4), 1000)
    guess = decisions.decide(p)
    time, event, risk = random.exponential(size=1000), y > 1, random.normal(size=1000)
    table = {
        "auroc": lambda counts: ranking.auroc(y, p, counts),
        "auprc": lambda counts: ranking.auprc(y, p, counts),
        "accuracy": lambda counts: decisions.accuracy(y, guess, counts),
        "balanced": lambda counts: decisions.balanced_accuracy(y, guess, counts),
        "f1": lambda counts: decisions.macro_f1(y, guess, counts),
        "kappa": lambda counts: decisions.quadratic_kappa(y, guess, counts),
        "brier": lambda counts: probabilities.brier(y, p, counts),
        "ece": lambda counts: probabilities.ece(y, p, counts, binning="mass"),
        "concordance": lambda counts: survival.concordance(time, event, risk, counts),
        "auc_at": lambda counts: survival.auc_at(time, event, risk, counts, at=1.0),
        "spearman": lambda counts: regression.spearman(time, risk, counts),
    }
    started = process_time()
    found = bootstrap.intervals(table, random.integers(0, 700, 1000))
    # About 8 s of work; a loop over resamples would take many minutes.
    assert process_time() - started < 60
    assert all(one.low < one.value < one.high for one in found.values())


def coverage(intervals, truth):
    ends = np.array([(found.low, found.high) for found in intervals])
    return np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))


def test_coverage_of_auroc_is_nominal():
    random = np.random.default_rng(11)
    found = []
    for _ in range(400):
        outcome = random.permutation(np.arange(80) % 2)
        score = outcome * 1.0 + random.normal(size=80)
        found.append(
            bootstrap.interval(
                lambda counts, o=outcome, s=score: ranking.binary_auroc(o, s, counts),
                np.arange(80),
                resamples=400,
            )
        )
    # Φ(1 / √2); four standard errors of a share of 400 are 0.044.
    assert 0.905 <= coverage(found, 0.76024994) <= 0.985


def test_drawing_patients_covers_where_drawing_slides_does_not():
    random = np.random.default_rng(12)
    by_patient, by_slide = [], []
    patients = np.repeat(np.arange(40), 6)
    for _ in range(300):
        error = (random.normal(size=40)[patients] + 0.5 * random.normal(size=240)) ** 2

        def statistic(counts, error=error):
            return regression.mae(np.zeros(240), error, counts)

        by_patient.append(bootstrap.interval(statistic, patients, resamples=300))
        by_slide.append(bootstrap.interval(statistic, np.arange(240), resamples=300))
    assert 0.88 <= coverage(by_patient, 1.25) <= 0.98
    assert coverage(by_slide, 1.25) < 0.75


def test_the_mean_over_folds_is_that_of_each_by_itself():
    random = np.random.default_rng(0)
    folds = np.array(["a", "b", "c"])[np.arange(60) % 3]
    outcome = random.integers(0, 2, 60)
    # Each fold's model has a scale of its own, which ruins the pooled value.
    score = outcome + random.normal(size=60) + 50 * (folds == "b")
    statistic = bootstrap.fold_mean(
        lambda rows, counts: ranking.binary_auroc(outcome[rows], score[rows], counts), folds
    )
    wanted = np.mean([ranking.binary_auroc(outcome[folds == k], score[folds == k]) for k in "abc"])
    found = bootstrap.interval(statistic, np.arange(60), resamples=300)
    assert found.value == pytest.approx(wanted)
    assert found.low < wanted < found.high
    one_class = np.where(folds == "c", 0, outcome)
    lacking = bootstrap.fold_mean(
        lambda rows, counts: ranking.binary_auroc(one_class[rows], score[rows], counts), folds
    )
    assert np.isnan(lacking(np.ones((1, 60)))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": []}, "groups have shape"),
        ({"groups": np.zeros((2, 2))}, "groups have shape"),
        ({"resamples": 0}, "resamples is 0; give 1 or more"),
        ({"strata": [0, 1]}, "strata have shape"),
        ({"level": 1.0}, "level is 1.0; give a share between 0 and 1"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap.interval(mean_of(np.arange(3.0)), **{"groups": [0, 1, 2], **options})
