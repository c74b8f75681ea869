from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from bagscope.mil.recipe import OptimiserSpec
from bagscope.mil.training.optimisation import (
    RunningMean,
    Schedule,
    build_optimiser,
    copied,
    mean_of,
)

LR, FLOOR = 0.3, 0.02


def bare() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)


def rates_of(optimiser: torch.optim.Optimizer, schedule: object, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()  # type: ignore[attr-defined]
    return rates


def test_cosine_is_torch_s() -> None:
    spec = OptimiserSpec(lr=LR, min_lr=FLOOR, schedule="cosine")
    ours = Schedule(spec=spec, steps=40, warmup_steps=0)
    optimiser = bare()
    theirs = rates_of(optimiser, CosineAnnealingLR(optimiser, 40, FLOOR), 40)
    assert [ours.rate(step) for step in range(40)] == pytest.approx(theirs, rel=1e-9)


def test_warm_up_is_torch_s_linear_rise_and_then_cosine() -> None:
    spec = OptimiserSpec(lr=LR, min_lr=FLOOR, schedule="cosine", warmup_epochs=1)
    ours = Schedule(spec=spec, steps=50, warmup_steps=10)
    optimiser = bare()
    parts = [
        LinearLR(optimiser, start_factor=0.1, total_iters=9),
        CosineAnnealingLR(optimiser, 40, FLOOR),
    ]
    theirs = rates_of(optimiser, SequentialLR(optimiser, parts, [10]), 50)
    assert [ours.rate(step) for step in range(50)] == pytest.approx(theirs, rel=1e-9)


def test_plateau_is_torch_s_with_half_the_rate() -> None:
    losses = [1.0, 0.9, 0.95, 0.91, 0.92, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7, *[0.7] * 20]
    spec = OptimiserSpec(lr=LR, min_lr=FLOOR, schedule="plateau", plateau_patience=3)
    ours = Schedule(spec=spec, steps=99, warmup_steps=0)
    optimiser = bare()
    # Torch halves when more than `patience` epochs were bad, ours when as many as it says.
    theirs = ReduceLROnPlateau(
        optimiser, factor=0.5, patience=2, threshold=0.0, min_lr=FLOOR, eps=0.0
    )
    for loss in losses:
        ours.after_epoch(loss)
        theirs.step(loss)
        assert ours.rate(0) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
    assert ours.rate(0) == FLOOR


def test_a_loss_that_is_no_number_is_no_improvement() -> None:
    spec = OptimiserSpec(lr=LR, schedule="plateau", plateau_patience=2)
    schedule = Schedule(spec=spec, steps=9, warmup_steps=0)
    for loss in (1.0, math.nan, math.nan):
        schedule.after_epoch(loss)
    assert schedule.rate(0) == LR / 2


def test_a_schedule_goes_on_where_it_was_left() -> None:
    spec = OptimiserSpec(lr=LR, schedule="plateau", plateau_patience=2)
    one = Schedule(spec=spec, steps=9, warmup_steps=0)
    for loss in (1.0, 2.0):
        one.after_epoch(loss)
    other = Schedule(spec=spec, steps=9, warmup_steps=0)
    other.restore(one.state())
    for schedule in (one, other):
        schedule.after_epoch(3.0)
    assert one.rate(0) == other.rate(0) == LR / 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("radam", torch.optim.RAdam),
        ("sgd", torch.optim.SGD),
    ],
)
def test_an_optimiser_steps_as_torch_s_does_one_by_one(
    name: str, kind: type[torch.optim.Optimizer]
) -> None:
    def model() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(4, 3)

    spec = OptimiserSpec(name=name, lr=0.05, weight_decay=0.1, betas=(0.8, 0.9), momentum=0.7)  # type: ignore[arg-type]
    ours = model()
    ours.bias.requires_grad_(False)
    options = {"momentum": 0.7} if name == "sgd" else {"betas": (0.8, 0.9)}
    theirs = model().double()
    frozen = ours.bias.clone()
    pairs = [
        (ours, build_optimiser(ours, spec)),
        (theirs, kind([theirs.weight], lr=0.05, weight_decay=0.1, foreach=False, **options)),
    ]
    for network, optimiser in pairs:
        for step in range(5):
            optimiser.zero_grad()
            inputs = torch.linspace(-1, 1, 8).reshape(2, 4).to(network.weight.dtype) + step
            network(inputs).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(ours.weight.double(), theirs.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.bias, frozen)


def test_the_running_mean_is_what_a_hand_computes() -> None:
    model = nn.Linear(1, 1, bias=False)
    mean = RunningMean(0.9)
    values = [2.0, 4.0, -1.0, 0.5]
    expected = values[0]
    for count, value in enumerate(values):
        with torch.no_grad():
            model.weight.fill_(value)
        mean.add(model)
        decay = min(0.9, (1 + count) / (10 + count))
        expected = expected * decay + value * (1 - decay)
    assert mean.weights["weight"].item() == pytest.approx(expected, rel=1e-6)
    # Taken up again it goes on alike.
    other = RunningMean(0.9)
    other.restore({"count": mean.count, "weights": copied_of(mean)})
    for one in (mean, other):
        one.add(model)
    assert torch.equal(mean.weights["weight"], other.weights["weight"])


def copied_of(mean: RunningMean) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in mean.weights.items()}


def test_the_running_mean_ends_at_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    mean = RunningMean(0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(30):
        mean.add(model)
    with torch.no_grad():
        model.weight.fill_(0.0)
    mean.add(model)
    assert mean.weights["weight"].item() == pytest.approx(0.5)


def test_counters_are_not_averaged() -> None:
    model = nn.BatchNorm1d(2)
    mean = RunningMean(0.9)
    several = []
    for _ in range(3):
        model(torch.randn(4, 2))
        mean.add(model)
        several.append(copied(model))
    assert mean.weights["num_batches_tracked"].item() == 3
    found = mean_of(several)
    assert found["num_batches_tracked"].item() == 3
    expected = sum(one["running_mean"] for one in several) / 3
    torch.testing.assert_close(found["running_mean"], expected)


def test_a_copy_of_the_weights_does_not_follow_the_model() -> None:
    model = nn.Linear(2, 2)
    kept = copied(model)
    with torch.no_grad():
        model.weight.add_(1)
    assert not torch.equal(kept["weight"], model.weight)
