"""One task after the other, in one of two ways: with adapters, or plain fine-tuning.

Each task is a training of its own, by the same trainer and under the same rules: it sees its own
training and inner-validation cases and nothing of any other task. What passes on is weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bagscope.errors import ConfigError
from bagscope.mil.continual.adapters import plain_weights, with_first_directions
from bagscope.mil.continual.owlora import NAME, OWLoRA, heads_of
from bagscope.mil.recipe import FULL, RegimeSpec, TrainSpec
from bagscope.mil.regimes.registry import build_model
from bagscope.mil.sources import BagSource
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.history import Epoch
from bagscope.mil.training.optimisation import Weights, copied
from bagscope.mil.training.trainer import Trained, Trainer

Way = Literal["owlora", "finetune"]
"""With adapters, or with all weights free in every task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """A task, learnt after those before it.

    Attributes:
        trained: as any training ends.
        weights: of the plain aggregator, adapters added in: it answers for this task.
        carried: what the next task begins from.
    """

    trained: Trained
    weights: Weights
    carried: Weights


def learn_task(
    recipe: TrainSpec,
    target: TargetSpec,
    train: BagSource,
    inner: BagSource | None,
    *,
    way: Way,
    number: int,
    before: Weights | None,
    rank: int = 8,
    penalty: float = 10.0,
    seed: int = 0,
    device: str = "cpu",
    folder: Path | None = None,
    fingerprint: str = "",
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> Learnt:
    """Train one task of a sequence; goes on where a killed training of it stopped.

    Args:
        recipe: of all tasks, under the plain regime.
        target: of this task, with its classes.
        train: its cases to learn from.
        inner: its cases to choose by.
        way: of learning.
        number: of the task, from 0.
        before: what the task before passed on (`Learnt.carried`); None for the first one.
        rank: of adapters.
        penalty: weight of their orthogonality.
        seed: of weights, order and draws.
        device: to train on.
        folder: of the state of a training; nowhere if None.
        fingerprint: of all that the training depends on.
        on_epoch: is told of every epoch.

    Raises:
        ConfigError: a recipe with a regime of its own.
    """
    require_plain(recipe)
    options = {"earlier": number, "rank": rank, "penalty": penalty}
    adapted = recipe.model_copy(update={"regime": RegimeSpec(name=NAME, options=options)})
    trainer = Trainer(
        adapted if way == "owlora" else recipe,
        [target],
        train,
        inner,
        seed=seed,
        device=device,
        folder=folder,
        fingerprint=fingerprint,
        on_epoch=on_epoch,
    )
    model = trainer.model
    if before is not None and isinstance(model, OWLoRA):
        model.begin_from(before)
    elif before is not None:
        own = model.state_dict()
        heads = heads_of_recipe(recipe, train.dimension, trainer.objective.outputs)
        model.load_state_dict(own | {name: before[name] for name in own if name not in heads})
    began_with = copied(model)
    trained = trainer.run()
    if not isinstance(model, OWLoRA):
        return Learnt(trained=trained, weights=trained.weights, carried=trained.weights)
    carried = trained.weights
    if not number:
        carried = with_first_directions(carried, began_with)
    return Learnt(trained=trained, weights=plain_weights(model.inner), carried=carried)


def heads_of_recipe(recipe: TrainSpec, features: int, outputs: int) -> frozenset[str]:
    """Return the names of the weights that every task has for itself."""
    return heads_of(
        build_model(recipe, features, outputs), build_model(recipe, features, outputs + 1)
    )


def with_body_of(own: Weights, later: Weights, heads: frozenset[str]) -> Weights:
    """Return a task's head on the body that a later task left.

    Args:
        own: plain weights after the task itself.
        later: plain weights after the later task.
        heads: names of the weights that are each task's own.
    """
    return {name: own[name] if name in heads else later[name] for name in own}


def require_plain(recipe: TrainSpec) -> None:
    """Refuse a recipe with a regime of its own.

    Raises:
        ConfigError: names it.
    """
    if recipe.regime.name != FULL:
        raise ConfigError(
            f"regime {recipe.regime.name} and tasks in sequence do not go together, which are a "
            "regime of their own; leave one of the two out"
        )


def require_sequence(names: Sequence[str]) -> None:
    """Refuse fewer than two tasks, or a name that comes twice.

    Raises:
        ConfigError: says which.
    """
    if len(names) < 2:
        raise ConfigError(
            f"tasks are {', '.join(names) or 'none'}; a sequence has at least two tasks"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"tasks: {', '.join(twice)} comes twice; name each task once")
