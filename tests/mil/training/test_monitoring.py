from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score
from sksurv.metrics import concordance_index_censored

from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.monitoring import METRICS, metric_of

COUNT = 40


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def column(values: np.ndarray) -> np.ndarray:
    """Return labels (n, 1), the first of them missing."""
    rows = values.astype(float)[:, None].copy()
    rows[0] = math.nan
    return rows


def test_two_classes_are_watched_by_auroc(generator: np.random.Generator) -> None:
    target = TargetSpec(column="y", classes=("a", "b"))
    labels, score = generator.integers(0, 2, COUNT), generator.random(COUNT).round(1)
    found = metric_of(target, column(labels), np.stack([1 - score, score], axis=1))
    assert found == pytest.approx(roc_auc_score(labels[1:], score[1:]))


def test_several_classes_by_the_mean_of_one_against_the_rest(
    generator: np.random.Generator,
) -> None:
    target = TargetSpec(column="y", classes=("a", "b", "c"))
    labels = generator.integers(0, 3, COUNT)
    scores = generator.dirichlet(np.ones(3), COUNT)
    found = metric_of(target, column(labels), scores)
    expected = roc_auc_score(labels[1:], scores[1:], multi_class="ovr", average="macro")
    assert found == pytest.approx(expected)


def test_ordinal_by_quadratic_kappa(generator: np.random.Generator) -> None:
    target = TargetSpec(column="y", task="ordinal", classes=("0", "1", "2"))
    labels, scores = generator.integers(0, 3, COUNT), generator.dirichlet(np.ones(3), COUNT)
    found = metric_of(target, column(labels), scores)
    expected = cohen_kappa_score(labels[1:], scores[1:].argmax(1), weights="quadratic")
    assert found == pytest.approx(expected)


def test_multilabel_by_the_mean_over_labels(generator: np.random.Generator) -> None:
    target = TargetSpec(column="y", task="multilabel", classes=("a", "b"))
    labels = generator.integers(0, 2, (COUNT, 2)).astype(float)
    scores = generator.random((COUNT, 2))
    found = metric_of(target, labels, scores)
    assert found == pytest.approx(roc_auc_score(labels, scores, average="macro"))


def test_numbers_by_r2(generator: np.random.Generator) -> None:
    target = TargetSpec(column="y", task="regression")
    labels = generator.normal(size=COUNT)
    predicted = labels + generator.normal(size=COUNT)
    found = metric_of(target, column(labels), predicted)
    assert found == pytest.approx(r2_score(labels[1:], predicted[1:]))


def test_survival_by_the_c_index(generator: np.random.Generator) -> None:
    target = TargetSpec(task="survival", time="t", event="e")
    times, events = generator.random(COUNT), generator.integers(0, 2, COUNT)
    risk = generator.random(COUNT)
    found = metric_of(target, np.stack([times, events], axis=1), risk[:, None])
    expected = concordance_index_censored(events.astype(bool), times, risk)[0]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("task", METRICS)
def test_labels_that_define_no_metric_give_nan(task: str) -> None:
    options: dict[str, object] = {"column": "y", "task": task}
    if task == "survival":
        options |= {"time": "t", "event": "e"}
    elif task != "regression":
        options["classes"] = ("a", "b")
    target = TargetSpec.model_validate(options)
    width = {"survival": 2, "multilabel": 2}.get(task, 1)
    values = np.zeros((3, width))  # one class alone, no event, one value
    predicted = np.full((3, 2), 0.5) if task != "regression" else np.full(3, 0.5)
    assert math.isnan(metric_of(target, values, predicted))
    assert math.isnan(metric_of(target, np.full((3, width), math.nan), predicted))
