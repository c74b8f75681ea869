from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from bagscope.errors import SchemaError
from bagscope.mil.evaluation.answers import (
    Answers,
    PredictionTable,
    answers_of,
    mean_answers,
)
from bagscope.mil.evaluation.metric_list import metrics_of
from bagscope.mil.evaluation.scoring import score, subgroups
from bagscope.mil.targets import TargetSpec

RANDOM = np.random.default_rng(0)
THREE = TargetSpec(column="grade", classes=("a", "b", "c"), task="ordinal")
TWO = TargetSpec(column="label", classes=("no", "yes"))


def answers(target: TargetSpec, rows: int, *, repeats: int = 1, folds: int = 3) -> Answers:
    classes = len(target.classes)
    truth = RANDOM.integers(0, classes, rows * repeats)
    logits = RANDOM.normal(size=(rows * repeats, classes)) + np.eye(classes)[truth]
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    case = np.tile([f"c{row:03d}" for row in range(rows)], repeats)
    return Answers(
        target=target,
        case=case,
        patient=case,
        site=np.full(len(case), ""),
        repeat=np.repeat(np.arange(repeats), rows),
        fold=np.tile(np.arange(rows) % folds, repeats),
        truth=truth[:, None].astype(float),
        predicted=chances,
        called=chances.argmax(axis=1),
    )


def test_several_classes_equal_scikit_learn() -> None:
    given = answers(THREE, 60)
    found = score(given, resamples=100)
    truth = given.truth[:, 0]
    auroc = roc_auc_score(truth, given.predicted, multi_class="ovr")
    kappa = cohen_kappa_score(truth, given.called, weights="quadratic")
    assert found.headline.name == "quadratic_kappa"
    assert found.pooled["auroc"].value == pytest.approx(auroc)
    assert found.pooled["quadratic_kappa"].value == pytest.approx(kappa)


def test_pooled_is_the_mean_over_rounds_and_patients_are_drawn_once_for_all() -> None:
    given = answers(TWO, 50, repeats=3)
    found = score(given, resamples=200)
    rounds = [
        roc_auc_score(given.truth[rows, 0], given.predicted[rows, 1]) for rows in given.repeat_rows
    ]
    assert found.pooled["auroc"].value == pytest.approx(np.mean(rounds))
    folds = [
        roc_auc_score(given.truth[rows, 0], given.predicted[rows, 1]) for rows in given.fold_rows
    ]
    assert len(folds) == 9
    assert found.over_folds["auroc"].value == pytest.approx(np.mean(folds))
    # The same rows three times over tell no more than once: intervals keep their width.
    once = given.of_rows(given.repeat_rows[0])
    thrice = dataclasses.replace(
        given,
        truth=np.tile(once.truth, (3, 1)),
        predicted=np.tile(once.predicted, (3, 1)),
        called=np.tile(once.called, 3),
    )
    one, three = (score(x, resamples=200).pooled["auroc"] for x in (once, thrice))
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_fold_of_one_class_is_left_out_of_the_mean() -> None:
    given = answers(TWO, 30)
    truth = given.truth.copy()
    truth[given.fold == 1] = 1
    found = score(dataclasses.replace(given, truth=truth), resamples=100)
    others = [
        roc_auc_score(truth[rows, 0], given.predicted[rows, 1])
        for rows in (given.fold_rows[0], given.fold_rows[2])
    ]
    assert found.over_folds["auroc"].value == pytest.approx(np.mean(others))
    assert "auroc" not in found.by_fold[1].values
    assert "same outcome" in found.by_fold[1].undefined["auroc"]
    assert "accuracy" in found.by_fold[1].values


def test_subgroups_are_cells_or_halves_of_numbers() -> None:
    given = answers(TWO, 40)
    ages = {case: str(30 + row) for row, case in enumerate(given.case.tolist())}
    halves = subgroups(given, "age", ages, resamples=100)
    assert [one.value for one in halves] == ["≤ 49.5", "> 49.5"]
    rows = np.arange(20)
    assert halves[0].estimate is not None
    assert halves[0].estimate.value == pytest.approx(
        roc_auc_score(given.truth[rows, 0], given.predicted[rows, 1])
    )
    named = {case: ("x", "y", "")[row % 3] for row, case in enumerate(given.case.tolist())}
    cells = subgroups(given, "scanner", named, resamples=100)
    assert [(one.value, one.patients) for one in cells] == [
        ("x", 14), ("y", 13), ("not stated", 13),
    ]  # fmt: skip
    alone = {given.case[0]: "x"} | dict.fromkeys(given.case[1:].tolist(), "y")
    (lonely, _) = subgroups(given, "scanner", alone, resamples=100)
    assert lonely.estimate is None and "same outcome" in lonely.undefined


def test_mean_over_seeds_keeps_cases_together_and_means_the_thresholds() -> None:
    first = answers(TWO, 20)
    order = RANDOM.permutation(20)
    second = dataclasses.replace(first, predicted=RANDOM.dirichlet([1, 1], 20))
    mean = mean_answers([first, second.of_rows(order)], {(0, 0): 0.9, (0, 1): 0.1})
    assert mean.predicted == pytest.approx((first.predicted + second.predicted) / 2)
    limits = np.select([first.fold == 0, first.fold == 1], [0.9, 0.1], 0.5)
    assert (mean.called == (mean.predicted[:, 1] >= limits)).all()
    assert mean_answers([first]) is first


def table(**changes: list[str]) -> PredictionTable:
    columns = {
        "case_id": ["a", "b"], "patient_id": ["p", "q"], "site": ["", ""], "repeat": ["0", "0"],
        "fold": ["0", "1"], "seed": ["0", "0"], "label": ["no", ""],
        "label_predicted": ["yes", "no"], "label_p_no": ["0.2", "0.7"],
        "label_p_yes": ["0.8", "0.3"],
    }  # fmt: skip
    return PredictionTable(columns={**columns, **changes}, source="predictions.csv")


def test_cases_without_the_label_are_left_out() -> None:
    found = answers_of(table(), TWO)
    assert found.case.tolist() == ["a"]
    assert (found.truth[0, 0], found.called[0]) == (0, 1)


def test_cells_that_are_none_are_refused() -> None:
    with pytest.raises(SchemaError, match="'maybe' is none of the classes no, yes"):
        answers_of(table(label=["maybe", ""]), TWO)
    with pytest.raises(SchemaError, match="label_p_yes holds what is no number"):
        answers_of(table(label_p_yes=["high", "0.3"]), TWO)
    with pytest.raises(SchemaError, match="case a has a label of label and no prediction"):
        answers_of(table(label_p_yes=["", "0.3"]), TWO)
    with pytest.raises(SchemaError, match="has no column 'grade_p_a'"):
        answers_of(table(), THREE)


def test_metrics_of_the_positive_class_name_it() -> None:
    labels = {metric.name: metric.label for metric in metrics_of(answers(TWO, 20))}
    for name in ("auprc", "sensitivity", "f1", "sensitivity_at_specificity"):
        assert "yes" in labels[name].split()
    numbered = dataclasses.replace(
        answers(TWO, 20), target=TargetSpec(column="y", classes=("0", "1"))
    )
    (label,) = (metric.label for metric in metrics_of(numbered) if metric.name == "f1")
    assert label == "F1 of class 1"
