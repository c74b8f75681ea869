"""Attributions are what they are defined to be: differences, gradients, sums that add up."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from bagscope.mil.bags import Bags
from bagscope.mil.explain.attribution import (
    gradient_times_input,
    integrated_gradients,
    leave_one_out,
    log_odds,
)
from bagscope.mil.explain.pools import pool_of
from tests.kernels.packed import normal
from tests.mil.explain.made_models import EVERY, FEATURES, QUESTION, asked, bags, model

MADE = bags(9, 1, 4)


@pytest.mark.parametrize("kind", ["clam_mb", "max"])
def test_leave_one_out(kind: str) -> None:
    aggregator = model(kind)
    found = leave_one_out(pool_of(aggregator, MADE, QUESTION), np.arange(9))
    rows = np.arange(9)
    wanted = asked(aggregator, MADE, [rows, *(np.delete(rows, place) for place in rows)])
    np.testing.assert_allclose(found, wanted[0] - wanted[1:], atol=1e-6)


def test_leave_one_out_of_a_single_tile_is_unknown() -> None:
    found = leave_one_out(pool_of(model("abmil"), MADE, QUESTION), np.array([9]))
    assert found.shape == (1, 3) and np.isnan(found).all()


@pytest.mark.parametrize("kind", EVERY)
def test_gradient_times_input_is_autograd_s(kind: str) -> None:
    aggregator = model(kind).train()
    found = gradient_times_input(aggregator, MADE, log_odds(1))
    assert aggregator.training
    precise = copy.deepcopy(aggregator).double().eval()
    for bag, (start, stop) in enumerate([(0, 9), (9, 10), (10, 14)]):
        x = MADE.one(bag).features.double().clone().requires_grad_()
        p = precise(Bags.of([x])).logits.softmax(1)[0, 1]
        (p / (1 - p)).log().backward()
        assert x.grad is not None
        wanted = (x.grad * x).sum(1).detach().numpy()
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found[start:stop], wanted, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("kind", "has_baseline"), [("gated", False), ("clam_mb", True), ("max", False)]
)
def test_integrated_gradients_add_up(kind: str, has_baseline: bool) -> None:
    aggregator = model(kind).double()
    made = replace(MADE, features=MADE.features.double())
    baseline = normal(FEATURES, seed=9).double() if has_baseline else torch.zeros(FEATURES).double()
    start = replace(made, features=baseline.expand_as(made.features))
    target = log_odds(2)
    with torch.no_grad():
        wanted = (target(aggregator(made).logits) - target(aggregator(start).logits)).numpy()
    found = integrated_gradients(
        aggregator, made, target, baseline=baseline if has_baseline else None, steps=48
    )
    sums = np.add.reduceat(found, [0, 9, 10])
    # Gradients jump where a rectifier turns, and no rule of quadrature likes that.
    np.testing.assert_allclose(sums, wanted, atol=0.03 * np.abs(wanted).max())


def test_integrated_gradients_are_the_mean_gradient_on_the_way() -> None:
    aggregator = model("gated").double()
    x = MADE.one(0).features.double()
    baseline = normal(FEATURES, seed=9).double()
    target = log_odds(0)
    total = torch.zeros(9, dtype=torch.float64)
    midpoints = (torch.arange(60) + 0.5) / 60
    for share in midpoints.tolist():
        point = (baseline + share * (x - baseline)).requires_grad_()
        target(aggregator(Bags.of([point])).logits).sum().backward()
        assert point.grad is not None
        total += (point.grad * (x - baseline)).sum(1) / 60
    found = integrated_gradients(
        aggregator, Bags.of([x]), target, baseline=baseline, steps=24, budget_tiles=60
    )
    np.testing.assert_allclose(found, total.numpy(), atol=2e-2 * float(total.abs().max()))


def test_a_linear_model_s_attributions_are_its_terms() -> None:
    aggregator = model("mean").double()
    with torch.no_grad():
        # All rectifiers open: a tile's logits are linear in its features.
        aggregator.network.projection.bias.fill_(100.0)
    made = replace(MADE, features=MADE.features.double())
    weight = aggregator.network.classifier.weight @ aggregator.network.projection.weight
    wanted = np.concatenate(
        [
            (made.one(bag).features @ weight[1] / n).detach().numpy()
            for bag, n in enumerate((9, 1, 4))
        ]
    )

    def logit(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 1]

    np.testing.assert_allclose(gradient_times_input(aggregator, made, logit), wanted, rtol=1e-9)
    for budget in (1, 1 << 16):
        found = integrated_gradients(aggregator, made, logit, steps=3, budget_tiles=budget)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_features_from_inference_mode_can_be_asked() -> None:
    aggregator = model("abmil")
    with torch.inference_mode():
        made = Bags.of([MADE.features.clone()])
        inside = gradient_times_input(aggregator, made, log_odds(0))
    outside = gradient_times_input(aggregator, made, log_odds(0))
    np.testing.assert_array_equal(inside, outside)


def test_log_odds() -> None:
    logits = normal(4, 3, dtype=torch.float64)
    p = logits.softmax(1)[:, 2]
    torch.testing.assert_close(log_odds(2)(logits), (p / (1 - p)).log())
    torch.testing.assert_close(log_odds(0)(logits[:, :1]), logits[:, 0])
