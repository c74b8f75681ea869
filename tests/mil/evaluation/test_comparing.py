from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bagscope.errors import ConfigError
from bagscope.mil.evaluation.answers import Answers
from bagscope.mil.evaluation.comparing import compare
from bagscope.mil.evaluation.paired import corrected_resampled_t_test, delong_test, holm
from bagscope.mil.targets import TargetSpec

LABEL = TargetSpec(column="label", classes=("no", "yes"))
PATIENTS = 60


def answers(noise: float, seed: int, *, folds: int = 1, repeats: int = 1) -> Answers:
    """Return what a model says that sees the label through noise."""
    random = np.random.default_rng(seed)
    case = np.tile([f"c{place:02d}" for place in range(PATIENTS)], repeats)
    truth = np.tile(np.arange(PATIENTS) % 2, repeats).astype(float)
    chance = 1 / (1 + np.exp(-(truth - 0.5 + random.normal(0, noise, len(truth)))))
    return Answers(
        target=LABEL,
        case=case,
        patient=np.char.replace(case, "c", "p"),
        site=np.full(len(case), ""),
        repeat=np.repeat(np.arange(repeats), PATIENTS),
        fold=np.tile((np.arange(PATIENTS) // 2) % folds, repeats),
        truth=truth[:, None],
        predicted=np.stack([1 - chance, chance], axis=1),
        called=(chance >= 0.5).astype(np.int64),
    )


def test_one_held_out_set_is_judged_by_delong() -> None:
    good, bad = answers(0.5, 1), answers(3.0, 2)
    (pair,) = compare({"g": good, "b": bad}, train_patients=100, resamples=300).pairs
    expected = delong_test(good.truth[:, 0], good.predicted[:, 1], bad.predicted[:, 1])
    assert pair.judged_by.method == "DeLong"
    assert pair.judged_by.p_value == pytest.approx(expected.p_value)
    assert [test.method for test in pair.tests] == ["DeLong", "paired bootstrap"]


def test_slides_of_one_patient_keep_delong_away() -> None:
    shared = {
        name: dataclasses.replace(one, patient=np.array([f"p{k // 2}" for k in range(PATIENTS)]))
        for name, one in (("g", answers(0.5, 1)), ("b", answers(3.0, 2)))
    }
    found = compare(shared, train_patients=100, resamples=300)
    assert found.pairs[0].judged_by.method == "paired bootstrap"
    assert (found.patients, found.cases) == (30, 60)


def test_folds_are_judged_by_a_bootstrap_of_the_same_patients() -> None:
    good, bad = answers(0.5, 1, folds=3), answers(3.0, 2, folds=3)
    found = compare({"g": good, "b": bad}, train_patients=40, resamples=500)
    (pair,) = found.pairs
    assert [test.method for test in pair.tests] == ["paired bootstrap"]
    areas = [roc_auc_score(one.truth[:, 0], one.predicted[:, 1]) for one in (good, bad)]
    assert pair.judged_by.difference == pytest.approx(areas[0] - areas[1])
    assert pair.judged_by.low > 0


def test_repeated_folds_are_judged_by_the_corrected_test() -> None:
    good = answers(0.5, 1, folds=3, repeats=4)
    bad = answers(3.0, 2, folds=3, repeats=4)
    found = compare({"g": good, "b": bad}, train_patients=40, resamples=200)
    (pair,) = found.pairs
    assert "is the mean over folds" in found.notes[0]
    values = [
        [roc_auc_score(one.truth[rows, 0], one.predicted[rows, 1]) for rows in one.fold_rows]
        for one in (good, bad)
    ]
    expected = corrected_resampled_t_test(*values, train_cases=40, test_cases=20)
    assert [test.method for test in pair.tests] == ["corrected resampled t", "paired bootstrap"]
    assert pair.judged_by.p_value == pytest.approx(expected.p_value)


def test_p_values_are_raised_for_all_pairs() -> None:
    models = {str(noise): answers(noise, seed) for seed, noise in enumerate((0.5, 1.5, 4.0))}
    found = compare(models, train_patients=40, resamples=200)
    assert [(pair.first, pair.second) for pair in found.pairs] == [
        ("0.5", "1.5"), ("0.5", "4.0"), ("1.5", "4.0"),
    ]  # fmt: skip
    expected = holm([pair.judged_by.p_value for pair in found.pairs])
    assert [pair.holm_p for pair in found.pairs] == pytest.approx(expected.tolist())


def test_other_folds_are_compared_with_a_word() -> None:
    found = compare(
        {"a": answers(1.0, 1, folds=3), "b": answers(1.0, 2, folds=4)},
        train_patients=40,
        resamples=200,
    )
    assert "not trained on the same folds" in found.notes[0]
    same = compare(
        {"a": answers(1.0, 1, folds=3), "b": answers(1.0, 1, folds=3)},
        train_patients=40,
        resamples=200,
    )
    assert same.notes == ()
    assert same.pairs[0].judged_by.difference == 0
    assert same.pairs[0].judged_by.p_value == 1


def test_other_patients_or_labels_are_refused_by_name() -> None:
    one = answers(1.0, 1)
    fewer = one.of_rows(np.arange(3, PATIENTS))
    with pytest.raises(ConfigError, match=r"b lacks c00, c01, c02 \(3 in all\)"):
        compare({"a": one, "b": fewer}, train_patients=1, resamples=100)
    with pytest.raises(ConfigError, match=r"a lacks|b lacks"):
        compare({"b": fewer, "a": one}, train_patients=1, resamples=100)
    turned = one.truth.copy()
    turned[7] = 1 - turned[7]
    with pytest.raises(ConfigError, match=r"other patients or labels for c07 \(1 in all\)"):
        compare(
            {"a": one, "b": dataclasses.replace(one, truth=turned)},
            train_patients=1,
            resamples=100,
        )
    other = TargetSpec(column="label", classes=("no", "maybe"))
    with pytest.raises(ConfigError, match="predict different things"):
        compare(
            {"a": one, "b": dataclasses.replace(one, target=other)},
            train_patients=1,
            resamples=100,
        )
