"""What is judged of each kind of target and model, at which cost, and what is left unjudged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bagscope.artifacts import canonical_json
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.cases import Case
from bagscope.mil.explain.faithfulness import faithfulness
from bagscope.mil.member import Member
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.prediction import Answer, Panel
from bagscope.mil.sources import ArraySource
from bagscope.mil.statistics import FeatureStatistics
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.judging import PASSES, judged
from tests.mil.made_bags import DIMENSION, made_recipe

CLASSES = TargetSpec(column="label", classes=("a", "b", "c"))
SIZE = TargetSpec(column="size", task="regression")
MANY = TargetSpec(column="many", task="multilabel", classes=("u", "v"))
GRADE = TargetSpec(column="grade", task="ordinal", classes=("1", "2", "3"))
TIME = TargetSpec(task="survival", time="time", event="event")
LABELS: dict[str, Any] = {
    "label": np.array([[0.0], [1.0], [2.0]]),
    "size": np.array([[10.0], [20.0], [30.0]]),
    "many": np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]),
    "grade": np.array([[0.0], [1.0], [2.0]]),
    "survival": np.c_[np.arange(1.0, 21.0), np.ones(20)],
}
NOTHING = np.zeros(DIMENSION)
TILES = 25


def answered(
    *targets: TargetSpec, aggregator: str = "abmil", seeds: tuple[int, ...] = (0,)
) -> tuple[Answer, list[Member]]:
    """Ask members with random weights about one bag."""
    members = []
    options: dict[str, Any] = {"hidden": 8} | ({"attention": 4} if aggregator == "abmil" else {})
    for seed in seeds:
        objective = build_objective(targets, ObjectiveSpec()).fit(
            {target.name: LABELS[target.name] for target in targets}
        )
        torch.manual_seed(seed)
        model = build_aggregator(aggregator, DIMENSION, objective.outputs, options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.4)
        recipe = made_recipe().model_dump()
        recipe["aggregator"] = {"name": aggregator, "options": options}
        members.append(
            Member(
                recipe=type(made_recipe()).model_validate(recipe),
                targets=tuple(objective.targets),
                objective=objective,
                weights=model.state_dict(),
                statistics=FeatureStatistics(
                    mean=NOTHING, std=NOTHING + 1, bag_mean=NOTHING, bag_std=NOTHING + 1
                ),
            )
        )
    bag = np.random.default_rng(0).normal(size=(TILES, DIMENSION)).astype(np.float32)
    case = Case(case_id="c", patient_id="c", slide_ids=("c",))
    return Panel(members).ask(ArraySource([bag], [case])), members


def test_without_a_closed_form_it_costs_at_most_so_many_passes() -> None:
    answer, members = answered(CLASSES, aggregator="max")
    seen = []
    model = answer.pool._model  # type: ignore[union-attr]
    model.register_forward_pre_hook(lambda _, bags: seen.append(len(bags[0].features)))
    told = judged(answer, members)
    (entry,) = told["judged"]
    assert entry["basis"] == "scores" and entry["score"] is not None
    assert sum(seen) <= PASSES * TILES
    assert told["forward_passes"] == PASSES == 62
    assert answer.contributions is None


@pytest.mark.parametrize("seed", range(4))
def test_a_number_is_explained_towards_where_it_lies(seed: int) -> None:
    answer, members = answered(SIZE, seeds=(seed,))
    attention, added = judged(answer, members)["judged"]
    pool, rows = answer.pool, np.arange(TILES)
    assert pool is not None
    # In standard deviations of the training labels 10, 20, 30; low numbers the other way round.
    low = pool.answers([rows])[0, 0] < 20
    found = faithfulness(pool, rows, answer.scores[:, 0], unit=np.sqrt(200 / 3))
    assert attention["score"] == pytest.approx(-found.score if low else found.score, rel=1e-4)
    assert added["score"] > 0 and added["answer"] == "predicted size"
    assert (attention["column"], added["column"]) == ("", "")


def test_each_class_is_judged_against_its_own_answer() -> None:
    for target in (CLASSES, MANY):
        answer, members = answered(target, seeds=(0, 1))
        told = judged(answer, members)
        added = told["judged"][1:]
        assert [entry["column"] for entry in added] == list(target.classes)
        assert [entry["class"] for entry in added] == list(target.classes)
        assert told["agreement"]["top_tiles"] == 2
        assert canonical_json(told)  # JSON, without NaN
    # The steps between grades are no answers: attention alone is judged.
    answer, members = answered(GRADE)
    assert [entry["basis"] for entry in judged(answer, members)["judged"]] == ["scores"]
    assert answer.contributions is not None and answer.contributions.shape == (TILES, 2)


def test_a_member_alone_is_compared_with_the_other_folds_and_several_with_each_other() -> None:
    answer, members = answered(CLASSES)
    scores = answer.member_scores[0].astype(float)
    told = judged(answer, members, [scores + 3, -scores])["agreement"]
    # Log weights are of no unit: a constant changes nothing. Pairs: 1, -1 and -1.
    assert told["rank_correlation"] == pytest.approx(-1 / 3)
    assert told["lowest_correlation"] == pytest.approx(-1)
    assert (told["models"], told["saw_the_case"]) == (3, 2)
    assert judged(answer, members)["agreement"] is None
    both, members = answered(CLASSES, seeds=(0, 1))
    told = judged(both, members, [scores])["agreement"]
    assert (told["models"], told["saw_the_case"]) == (2, 0)


def test_what_is_not_judged_says_why() -> None:
    for targets, why in (((TIME,), "a risk has no unit"), ((SIZE, GRADE), "several targets")):
        answer, members = answered(*targets)
        told = judged(answer, members)
        assert told["judged"] == [] and why in told["unjudged"]
        assert told["agreement"] is None
