"""Trained models can be asked: calibrated, standardised, several together, each target its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from bagscope.errors import ArtifactError
from bagscope.mil.cases import Case
from bagscope.mil.explain.effects import measure, removal
from bagscope.mil.explain.members import member_scores, member_subject
from bagscope.mil.explain.question import (
    NO_DECISION,
    class_question,
    member_question,
    probabilities,
)
from bagscope.mil.member import Member
from bagscope.mil.prediction import Panel, combine, mean_scores
from bagscope.mil.sources import ArraySource
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from tests.mil.made_bags import TARGET, made_recipe, made_source

SOURCE = made_source(4, seed=4)
ROOMY = [place for place in range(4) if SOURCE.lengths[place] > 3]


@pytest.fixture(scope="module")
def members() -> list[Member]:
    recipe = made_recipe(training={"epochs": 2}, bags={"standardise": True})
    train, inner = made_source(8, seed=1), made_source(4, seed=2)
    found = []
    for seed, threshold in ((0, 0.2), (1, 0.6)):
        trained = Trainer(recipe, [TARGET], train, inner, seed=seed).run()
        made = finish(trained, recipe, inner, seed=seed, fields={})
        found.append(
            dataclasses.replace(made, temperatures={"label": 0.5}, thresholds={"label": threshold})
        )
    return found


def told(members: Sequence[Member], source: ArraySource) -> np.ndarray:
    logits = np.stack([member.infer(source).logits for member in members])
    return combine(members, logits).values["label"]


def test_a_subject_answers_as_the_ensemble_predicts(members: list[Member]) -> None:
    case, donor = ROOMY[:2]
    subject = member_subject(members, SOURCE, case, donors=[donor], model_id="ensemble")
    rows = [subject.rows, subject.rows_of(1)]
    np.testing.assert_allclose(
        subject.pool.answers(rows), told(members, SOURCE)[[case, donor]], atol=1e-6
    )
    (effect,) = measure(subject, [removal(np.array([0, 2]))])
    bag = SOURCE.read(case)
    edited = ArraySource([np.delete(bag.features, [0, 2], axis=0)], [bag.case])
    np.testing.assert_allclose(effect.after, told(members, edited)[0], atol=1e-6)
    assert effect.columns == ("no", "yes") and effect.slide_id == bag.case.case_id
    # The ensemble's threshold is the mean of its members'.
    assert effect.decision_after == int(effect.after[1] >= 0.4)
    answers = np.array([[0.61, 0.39], [0.59, 0.41]])
    assert subject.pool.question.decided(answers).tolist() == [0, 1]


def test_scores_of_each_are_those_whose_mean_is_predicted(members: list[Member]) -> None:
    bag = SOURCE.read(ROOMY[0])
    alone = ArraySource([bag.features], [bag.case])
    each = member_scores(members, alone, 0)
    answer = Panel(members).ask(alone)
    np.testing.assert_allclose(mean_scores(each, answer.score_kind), answer.scores, rtol=1e-6)
    assert not np.allclose(each[0], each[1])


def test_a_member_decides_by_its_threshold(members: list[Member]) -> None:
    question = member_question(members[0])
    answers = np.array([[0.81, 0.19], [0.79, 0.21]])
    assert question.decided(answers).tolist() == [0, 1]
    with pytest.raises(ValueError, match="no target 'grade'; the model has label"):
        member_question(members[0], "grade")


@pytest.mark.parametrize(
    ("task", "columns", "values"),
    [
        ("survival", ("risk", "survival at 2"), np.array([[0.5, 0.9], [1.5, 0.2]])),
        ("regression", ("t",), np.array([0.5, 1.5])),
    ],
)
def test_nothing_is_decided_of_risks_and_values(
    task: str, columns: tuple[str, ...], values: np.ndarray
) -> None:
    stub = SimpleNamespace(
        targets=(SimpleNamespace(name="t", task=task),),
        thresholds={},
        objective=SimpleNamespace(columns={"t": columns}),
        predictions=lambda logits: {"t": values},
    )
    question = member_question(stub)  # type: ignore[arg-type]
    assert question.columns == columns[:1]
    answers = question.read(np.zeros((2, 4)))
    np.testing.assert_array_equal(answers, [[0.5], [1.5]])
    assert question.decided(answers).tolist() == [NO_DECISION] * 2


def test_features_that_are_no_numbers_are_refused(members: list[Member]) -> None:
    class Spoilt(ArraySource):
        def read(self, index: int, rows: object = None) -> object:  # type: ignore[override]
            bag = super().read(index)
            return dataclasses.replace(bag, features=np.full_like(bag.features, np.nan))

    case = Case(case_id="c1", patient_id="p", slide_ids=("c1",), targets={"label": (1.0,)})
    source = Spoilt([np.zeros((3, 6), np.float32)], [case])
    with pytest.raises(ArtifactError, match="c1: has features that are no finite numbers"):
        member_subject(members, source, 0)


def test_probabilities() -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]])
    np.testing.assert_allclose(probabilities(logits), [[0.25, 0.75], [1.0, 0.0]])
    np.testing.assert_allclose(probabilities(np.array([[np.log(3.0)]])), [[0.25, 0.75]])
    question = class_question(("no", "yes"), threshold=0.8)
    assert question.decided(np.array([[0.25, 0.75]])).tolist() == [0]
