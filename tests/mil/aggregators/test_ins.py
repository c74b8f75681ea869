"""INS: its losses against a plain transcription in float64, its memory, its refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.ins import INS, INSOptions, mean_logits
from bagscope.mil.aggregators.ins_memory import NO_CLASS, kept_share
from bagscope.mil.bags import Bags
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.trainer import Trainer
from tests.kernels.packed import normal
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_source

SMALL: dict[str, Any] = {"hidden": 8, "embedding": 5, "queue": 20, "view_dropout": 0.0}
LENGTHS = (6, 1, 4, 9)
CLASSES = (0, 1, 1, math.nan)


def model_of(**options: Any) -> INS:
    torch.manual_seed(0)
    model = INS(DIMENSION, 2, INSOptions.model_validate({**SMALL, **options})).double()
    with torch.no_grad():
        for parameter in model._second_weights():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.train()


def bags_of(progress: float, step: int = 0) -> Bags:
    features = [normal(n, DIMENSION, seed=place).double() for place, n in enumerate(LENGTHS)]
    labels = torch.tensor(CLASSES, dtype=torch.float64)[:, None]
    bags = Bags.of(features, targets={"label": labels}, seed=7, step=step)
    return replace(bags, progress=progress)


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def embedded(x: Tensor, encode: Any, project: Any) -> Tensor:
    h = (x @ encode.weight.T + encode.bias).clamp(min=0)
    inner = (h @ project[0].weight.T + project[0].bias).clamp(min=0)
    return unit(inner @ project[2].weight.T + project[2].bias)


class Plain:
    """The published step, tile by tile, on the model's own weights."""

    def __init__(self, model: INS) -> None:
        memory = model.memory
        self.model = model
        self.queue = [row.clone() for row in memory.queue]
        self.classes = memory.queue_class.tolist()
        self.prototypes = [row.clone() for row in memory.prototypes]

    def losses(self, x: Tensor, label: int, progress: float) -> tuple[Tensor, Tensor]:
        model, options = self.model, self.model.options
        q = embedded(x, model.projection, model.projector)
        k = embedded(x, model.second_projection, model.second_projector)
        h = (x @ model.projection.weight.T + model.projection.bias).clamp(min=0)
        p = torch.softmax(h @ model.instance.weight.T + model.instance.bias, 1)
        candidates = [1.0, 0.0] if label == 0 else [1.0, 1.0]
        taken = [int(torch.tensor(candidates).mul(row).argmax()) for row in p.detach()]
        cls, con = [], []
        for i in range(len(x)):
            likeness = torch.stack([q[i] @ mu for mu in self.prototypes]).softmax(0)
            vote = int((likeness * torch.tensor(candidates)).argmax())
            soft = torch.tensor(candidates, dtype=torch.float64) / sum(candidates)
            for epoch in range(options.target_epochs):
                if options.warm_up <= epoch / options.target_epochs <= progress:
                    first, last = options.target_momentum
                    phi = first + (last - first) * epoch / options.target_epochs
                    soft = phi * soft
                    soft[vote] += 1 - phi
            cls.append(-(soft * p[i].log()).sum())
            others = [(row, c) for row, c in zip(self.queue, self.classes, strict=True)]
            if progress < options.warm_up:
                top = (q[i] @ k[i] / options.temperature).exp()
                rest = sum((q[i] @ row / options.temperature).exp() for row, _ in others)
                con.append(-(top / (top + rest)).log())
                continue
            others += [(q[j], taken[j]) for j in range(len(x)) if j != i]
            others += [(k[j], taken[j]) for j in range(len(x))]
            values = [(q[i] @ row / options.temperature).exp() for row, _ in others]
            total = torch.stack(values).sum()
            alike = [
                (value / total).log()
                for value, (_, c) in zip(values, others, strict=True)
                if c == taken[i]
            ]
            con.append(-torch.stack(alike).mean())
        self.taken = (q.detach(), k.detach(), taken)
        return torch.stack(cls).mean(), torch.stack(con).mean()


def filled(model: INS) -> INS:
    """Give the memory something to remember, as after some steps."""
    torch.manual_seed(3)
    memory = model.memory
    memory.queue_class.copy_(torch.randint(-1, 2, memory.queue_class.shape))
    memory.prototypes.copy_(unit(torch.randn(2, 5, dtype=torch.float64)))
    return model


OTHER: dict[str, Any] = {"target_momentum": (0.6, 0.2), "target_epochs": 10, "temperature": 0.2}


@pytest.mark.parametrize(
    ("progress", "options"),
    [*((progress, {}) for progress in (0.0, 0.02, 0.03, 0.5, 1.0)), (0.03, OTHER), (0.35, OTHER)],
)
def test_losses_are_those_of_the_formulas(progress: float, options: dict[str, Any]) -> None:
    model, bags = filled(model_of(**options)), bags_of(progress)
    found = model(bags).losses
    for bag, label in enumerate((0, 1, 1)):
        wanted = Plain(model).losses(bags.one(bag).features, label, progress)
        torch.testing.assert_close(found["instance"][bag], wanted[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(found["contrast"][bag], wanted[1], rtol=1e-9, atol=0)
    assert all(float(loss[3].detach()) == 0 for loss in found.values()), "it has no class"
    assert bool(found["warm_up"].any()) == (progress < 0.025)


def test_a_packed_batch_costs_what_its_bags_cost() -> None:
    model, bags = filled(model_of(tiles=3)), bags_of(0.6)
    packed = model(bags).losses
    for name, values in packed.items():
        alone = torch.cat([model(bags.one(bag)).losses[name] for bag in range(len(bags))])
        torch.testing.assert_close(values, alone, rtol=1e-9, atol=1e-12)


def test_the_memory_follows_tile_by_tile() -> None:
    model = filled(model_of(queue=8, prototype_momentum=0.7, encoder_momentum=0.75))
    before = [weight.clone() for weight in model._second_weights()]
    mu = [row.clone() for row in model.memory.prototypes]
    queue, classes = model.memory.queue.clone(), model.memory.queue_class.clone()
    place = 0
    for step in range(2):
        bags = bags_of(0.4, step)
        order = []
        for bag, label in ((0, 0), (1, 1), (2, 1)):
            plain = Plain(model)
            plain.losses(bags.one(bag).features, label, 0.4)
            order.append(plain.taken)
        model(bags)
        model._seen = [  # bags in order, where the step deals their tiles by chance
            tuple(torch.as_tensor(part) for part in one)  # type: ignore[misc]
            for one in order
        ]
        model.after_step()
        for slow, old, new in zip(
            model._second_weights(), before, model._first_weights(), strict=True
        ):
            torch.testing.assert_close(slow.detach(), 0.75 * old + 0.25 * new.detach())
        before = [weight.clone() for weight in model._second_weights()]
        for q, k, taken in order:
            for i, c in enumerate(taken):
                mu[c] = 0.7 * mu[c] + 0.3 * q[i]
                queue[place], classes[place], place = k[i], c, (place + 1) % 8
        mu = [unit(row) for row in mu]
        torch.testing.assert_close(model.memory.prototypes, torch.stack(mu))
        torch.testing.assert_close(model.memory.queue, queue)
        assert torch.equal(model.memory.queue_class, classes)
        assert int(model.memory.place) == place


def test_batches_of_a_step_are_remembered_together() -> None:
    whole, parts = filled(model_of()), filled(model_of())
    bags = bags_of(0.4)
    whole(bags)
    for bag in range(len(bags)):
        parts(bags.one(bag))
    whole.after_step()
    parts.after_step()
    torch.testing.assert_close(parts.memory.queue, whole.memory.queue)
    torch.testing.assert_close(parts.memory.prototypes, whole.memory.prototypes)
    # What a step that never came to its end has seen is forgotten with the next one.
    parts(bags_of(0.4, step=5))
    parts(bags_of(0.4, step=6))
    assert len(parts._seen) == 1


def test_the_queue_starts_with_rows_of_length_one() -> None:
    right, wrong = model_of().memory, model_of(faithful_queue=True).memory
    ones = torch.ones(20, dtype=torch.float64)
    torch.testing.assert_close(right.queue.norm(dim=1), ones, rtol=1e-6, atol=0)
    torch.testing.assert_close(wrong.queue.norm(dim=0), ones[:5], rtol=1e-6, atol=0)
    assert bool((right.queue_class == NO_CLASS).all())


def test_soft_targets_keep_less_and_less() -> None:
    # Nothing moves in the first of 40 epochs; in the second by 1 - (0.95 - 0.15 / 40).
    assert kept_share(0.0, 0.025, 40, 0.95, 0.8) == 1.0
    assert kept_share(0.03, 0.025, 40, 0.95, 0.8) == pytest.approx(0.95 - 0.15 / 40)
    shares = [kept_share(at / 100, 0.025, 40, 0.95, 0.8) for at in range(101)]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.01


def test_a_bag_answers_with_the_mean_of_its_tiles() -> None:
    model, bags = model_of().eval(), bags_of(0.0)
    found = model(bags)
    for bag in range(len(bags)):
        start, stop = bags.cu_seqlens[bag : bag + 2].tolist()
        mean = found.scores[start:stop].softmax(1).mean(0)
        torch.testing.assert_close(found.logits[bag].softmax(0), mean)
    # Also where every probability rounds to 0 or 1.
    sure = torch.tensor([[0.0, 300.0], [0.0, 200.0]])
    borders = torch.tensor([0, 2], dtype=torch.int32)
    wanted = torch.tensor([[math.log(0.5) - 200.0, 0.0]])
    torch.testing.assert_close(mean_logits(sure, borders), wanted)
    single = mean_logits(torch.tensor([[1.0], [-2.0]]), borders)
    wanted = torch.sigmoid(torch.tensor([1.0, -2.0])).mean().logit()
    torch.testing.assert_close(single[0, 0], wanted)


def test_a_killed_training_ends_at_the_same_bits(tmp_path: Path) -> None:
    recipe = made_recipe(
        aggregator={
            "name": "ins",
            "options": {
                "hidden": 8,
                "queue": 32,
                "embedding": 4,
                "warm_up": 0.3,
            },
        },
        training={"epochs": 3},
    ).model_dump()
    del recipe["aggregator"]["options"]["attention"]

    def trainer(folder: Path | None, stop_after: int | None = None) -> Trainer:
        return Trainer(
            type(made_recipe()).model_validate(recipe),
            [TARGET],
            made_source(12),
            made_source(6, seed=1),
            seed=3,
            folder=folder,
            stop_after=stop_after,
        )

    whole = trainer(None).run()
    trainer(tmp_path, stop_after=1).run()
    again = trainer(tmp_path).run()
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)
    assert {"memory.queue", "memory.prototypes", "memory.place"} <= set(whole.weights)
    assert int(whole.weights["memory.place"]) > 0, "it remembers"


@pytest.mark.parametrize(
    "targets",
    [
        [TargetSpec(column="label", classes=("a", "b", "c"))],
        [TargetSpec(column="age", task="regression")],
        [TARGET, TargetSpec(column="other", classes=("no", "yes"))],
    ],
)
def test_other_than_two_classes_are_refused(targets: list[TargetSpec]) -> None:
    with pytest.raises(ConfigError, match=r"ins learns from negative and positive bags.*given"):
        INS.refuse(made_recipe(), targets)
    INS.refuse(made_recipe(), [TARGET])
