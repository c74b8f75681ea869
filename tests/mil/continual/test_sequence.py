"""Two planted tasks in sequence: what the first one loses, with adapters and without."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bagscope.mil.cases import Case
from bagscope.mil.continual.metrics import accuracy, kept
from bagscope.mil.continual.sequence import Way, heads_of_recipe, learn_task, with_body_of
from bagscope.mil.inference import infer
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.registry import build_model
from bagscope.mil.sources import ArraySource
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.optimisation import Weights
from bagscope.testing import planted_bags
from tests.mil.made_bags import TARGET, made_recipe, made_source

WIDTH, LEARNT = 16, 48
RECIPE = TrainSpec.model_validate(
    {
        "aggregator": {"name": "abmil", "options": {"hidden": 16, "attention": 8}},
        "optimiser": {"lr": 1e-2},
        "bags": {"bags_per_step": 4},
        "training": {"epochs": 20, "patience": None, "checkpoint": "last"},
    }
)
LABEL = TargetSpec(column="y", classes=("n", "p"))


def planted(task: int) -> tuple[ArraySource, ArraySource, NDArray[np.int64]]:
    """Return training and test bags of a task with a direction of its own, and the test labels."""
    made = planted_bags(80, dimension=WIDTH, tiles=(20, 40), share=0.2, shift=5.0, seed=10 + task)
    cases = [
        Case(case_id=f"{i}", patient_id=f"{i}", slide_ids=(f"{i}",), targets={"y": (float(y),)})
        for i, y in enumerate(made.labels)
    ]
    learnt = ArraySource(made.bags[:LEARNT], cases[:LEARNT])
    return learnt, ArraySource(made.bags[LEARNT:], cases[LEARNT:]), made.labels[LEARNT:]


def matrix_of(way: Way) -> NDArray[np.float64]:
    tasks = [planted(0), planted(1)]
    heads = heads_of_recipe(RECIPE, WIDTH, 2)
    found: NDArray[np.float64] = np.full((2, 2), np.nan)
    before, own = None, []
    for number, (train, _, _) in enumerate(tasks):
        learnt = learn_task(RECIPE, LABEL, train, None, way=way, number=number, before=before)
        before = learnt.carried
        own.append(learnt.weights)
        for earlier in range(number + 1):
            model = build_model(RECIPE, WIDTH, 2)
            model.load_state_dict(with_body_of(own[earlier], learnt.weights, heads))
            _, test, labels = tasks[earlier]
            found[number, earlier] = accuracy(infer(model, test, RECIPE.bags).logits, labels)
    return found


@pytest.mark.slow
def test_adapters_keep_what_plain_fine_tuning_forgets() -> None:
    adapted, plain = matrix_of("owlora"), matrix_of("finetune")
    # Both ways learn both tasks ...
    assert np.diagonal(adapted).min() >= 0.9 and np.diagonal(plain).min() >= 0.9
    # ... and the first one is lost by the one and kept, most of it, by the other.
    assert kept(plain).forgetting >= 0.15
    assert kept(adapted).forgetting <= 0.6 * kept(plain).forgetting


@pytest.mark.parametrize("way", get_args(Way))
def test_a_killed_task_ends_at_the_same_bits(way: Way, tmp_path: Path) -> None:
    recipe = made_recipe(training={"epochs": 3})
    train, inner = made_source(12), made_source(6, seed=1)

    def learn(number: int, before: Weights | None, folder: Path | None, epochs: int) -> Weights:
        from bagscope.mil.training import trainer

        class Stopping(trainer.Trainer):
            def __init__(self, *given: object, **named: object) -> None:
                super().__init__(*given, **{**named, "stop_after": epochs})  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bagscope.mil.continual.sequence.Trainer", Stopping)
            found = learn_task(
                recipe,
                TARGET,
                train,
                inner,
                way=way,
                number=number,
                before=before,
                rank=2,
                seed=3,
                folder=folder,
            )
        return found.carried if not number else found.weights

    first = learn(0, None, None, 3)
    whole = learn(1, first, None, 3)
    learn(1, first, tmp_path, 1)
    again = learn(1, first, tmp_path, 3)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
