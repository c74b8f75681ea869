from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from bagscope.errors import CohortError
from bagscope.mil.objectives.discrete_time import (
    DiscreteTimeCriterion,
    bin_edges,
    discrete_time_ce,
    discrete_time_nll,
    time_bins,
)
from tests.kernels.packed import assert_close_to_float64, vectors
from tests.mil.objectives.made import SURVIVAL, Rows, fitted, labels, normal, per_bag, tensors

ROWS: Rows = {"os": labels(seed=6)["os"]}
ALPHAS = (0.0, 0.15, 0.4)
LOSSES = {"nll": discrete_time_nll, "ce_surv": discrete_time_ce}


def recorded() -> dict[str, Tensor]:
    return vectors("survival_losses_A")[0]


def by_hand(logits: list[float], y: int, event: int, alpha: float, form: str) -> float:
    """Compute the loss of one bag from products of hazards, to 400 digits."""
    with localcontext() as context:
        context.prec = 400
        hazard = [1 / (1 + (-Decimal(z)).exp()) for z in logits]
        survival = [Decimal(1)]
        for h in hazard:
            survival.append(survival[-1] * (1 - h))
        observed = -event * (survival[y].ln() + hazard[y].ln())
        censored = -(1 - event) * survival[y + 1].ln()
        dead = observed if form == "nll" else -event * (1 - survival[y + 1]).ln()
        share = Decimal(alpha)
        return float((1 - share) * (dead + censored) + share * observed)


def test_bins_are_the_recorded_ones() -> None:
    found, meta = vectors("survival_bins_A")
    times = found["input/times"].double().numpy()
    edges = bin_edges(times, 1 - found["input/censored"].numpy(), meta["config"]["bins"])
    np.testing.assert_allclose(edges, found["output/edges"].numpy(), rtol=1e-6)
    assert edges[0] < times.min() and edges[-1] > times.max()
    recorded, ours = found["output/bin"].numpy(), time_bins(times, edges)
    # The original loses the last time: in its float32 the last edge is that time, and not beyond.
    lost = recorded < 0
    assert times[lost].tolist() == [times.max()] and ours[lost].tolist() == [3]
    np.testing.assert_array_equal(ours[~lost], recorded[~lost])


@pytest.mark.parametrize("form", LOSSES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_losses_and_gradients_are_the_recorded_ones(form: str, alpha: float) -> None:
    found = recorded()
    logits = found["input/logits"].requires_grad_()
    # The original ce_surv adds 1e-7 to h and S of the observed part: 2e-4 of a gradient here.
    as_it_is = {"clamp": 1e-7} if form == "ce_surv" else {}
    bins, event = found["input/bin"], 1 - found["input/censored"]
    loss = LOSSES[form](logits, bins, event, alpha=alpha, **as_it_is).mean()
    loss.backward()
    assert logits.grad is not None
    assert_close_to_float64(loss, found[f"output/{form}_alpha{alpha}"])
    assert_close_to_float64(logits.grad, found[f"grad/logits_{form}_alpha{alpha}"])
    ours = LOSSES[form](logits, bins, event, alpha=alpha).mean()
    assert_close_to_float64(ours, found[f"output/{form}_alpha{alpha}"], rtol=1e-5)
    if form == "nll":
        assert_close_to_float64(loss, found[f"output/nll_noclamp_alpha{alpha}"])


def test_extreme_logits_are_the_recorded_ones_with_the_clamp_and_without() -> None:
    found = recorded()
    bins, event = found["input/bin"], 1 - found["input/censored"]
    logits = found["input/logits_extreme"].requires_grad_()
    parts = discrete_time_nll(logits, bins, event, clamp=1e-7)
    parts.mean().backward()
    assert logits.grad is not None
    assert_close_to_float64(parts.mean(), found["output/nll_extreme_clamped"], rtol=1e-3)
    # In the original's float32, 1 - h rounds: whether a bag this near is clamped is its luck.
    distance = (parts + math.log(1e-7)).abs()
    clear = (distance > 0.2) | (distance < 1e-4)
    assert clear.sum() == 38
    recorded_grad = found["grad/logits_extreme_clamped"][clear]
    assert_close_to_float64(logits.grad[clear], recorded_grad, rtol=1e-3)
    free = discrete_time_nll(logits, bins, event).mean()
    assert_close_to_float64(free, found["output/nll_extreme_noclamp"], rtol=1e-5)


def test_survival_and_risk_are_the_recorded_ones() -> None:
    found = recorded()
    criterion = DiscreteTimeCriterion(form="nll", alpha=0, edges=(0.0, 1.0, 2.0, 3.0, 4.0))
    predicted = torch.from_numpy(criterion.predict(found["input/logits"].double().numpy()))
    assert_close_to_float64(predicted[:, 0], found["output/risk"])
    assert_close_to_float64(predicted[:, 1:], found["output/survival"])


@pytest.mark.parametrize("form", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_losses_are_their_formula_to_many_digits(form: str, scale: float) -> None:
    logits = normal(24, 3, scale=scale).detach()
    bins, event = torch.arange(24) % 3, torch.arange(24) // 3 % 2
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        cast = logits.float().to(dtype)
        found = LOSSES[form](cast, bins, event.to(dtype), alpha=0.15)
        for row, y, e, loss in zip(
            cast.tolist(), bins.tolist(), event.tolist(), found, strict=True
        ):
            assert loss.item() == pytest.approx(
                by_hand(row, y, e, 0.15, form), rel=tolerance, abs=tolerance
            )


@pytest.mark.parametrize("form", LOSSES)
def test_gradients_are_right_and_finite_at_any_size(form: str) -> None:
    bins, event = torch.tensor([0, 1, 2, 3, 0, 3]), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    assert torch.autograd.gradcheck(
        lambda z: LOSSES[form](z, bins, event.double(), alpha=0.15), normal(6, 4)
    )
    for size in (-200.0, 200.0):
        logits = torch.full((6, 4), size, requires_grad=True)
        loss = LOSSES[form](logits, bins, event, alpha=0.15)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert logits.grad is not None and logits.grad.isfinite().all()


def test_edges_come_from_the_events_of_training_and_later_times_are_of_the_outer_bins() -> None:
    objective = fitted([SURVIVAL], ROWS, bins=3)
    (criterion,) = objective.criteria
    assert isinstance(criterion, DiscreteTimeCriterion)
    events = ROWS["os"][ROWS["os"][:, 1] == 1, 0]
    np.testing.assert_allclose(criterion.edges[1:3], np.quantile(events, [1 / 3, 2 / 3]))
    logits = normal(2, 3)
    beyond = {"os": np.array([[1e9, 1.0], [0.0, 0.0]])}
    expected = [
        by_hand(logits[0].tolist(), 2, 1, 0, "nll"),
        by_hand(logits[1].tolist(), 0, 0, 0, "nll"),
    ]
    assert per_bag(objective, logits, beyond).tolist() == pytest.approx(expected)


def test_a_time_on_an_edge_is_of_the_later_bin_in_loss_and_in_numpy() -> None:
    criterion = DiscreteTimeCriterion(form="nll", alpha=0, edges=(0.0, 1.0, 2.0, 3.0))
    logits = normal(1, 3)
    for time, y in ((0.0, 0), (1.0, 1), (1.9999, 1), (2.0, 2), (3.0, 2)):
        loss = criterion.loss(logits, torch.tensor([[time, 1.0]]).double(), torch.tensor([True]))
        assert loss.item() == pytest.approx(by_hand(logits[0].tolist(), y, 1, 0, "nll"))
        assert time_bins(np.array([time]), np.array(criterion.edges)) == [y]


def test_columns_name_risk_and_times() -> None:
    objective = fitted([SURVIVAL], ROWS, survival="ce_surv")
    predicted = objective.predictions(normal(40, 4).detach().numpy())["os"]
    assert predicted.shape == (40, 5) and len(objective.columns["os"]) == 5
    assert objective.columns["os"][0] == "risk"
    assert (np.diff(predicted[:, 1:], axis=1) <= 0).all()
    np.testing.assert_allclose(predicted[:, 0], -predicted[:, 1:].sum(1))
    assert np.isfinite(objective.validation_loss(normal(40, 4), tensors(ROWS)))


def test_too_few_events_are_refused() -> None:
    censored = {"os": np.array([[1.0, 0.0], [2.0, 0.0]])}
    for form in ("nll", "ce_surv", "cox"):
        with pytest.raises(CohortError, match="none of the 2 training cases has an event"):
            fitted([SURVIVAL], censored, survival=form)
    tied = {"os": np.array([[5.0, 1.0]] * 6 + [[9.0, 1.0], [1.0, 0.0]])}
    with pytest.raises(CohortError, match=r"7 events .* 2 different times, too few .* 4 bins"):
        fitted([SURVIVAL], tied)
