from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bagscope.mil.objectives import cox
from bagscope.mil.objectives.cox import cox_loss
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.objectives.spec import ObjectiveSpec
from tests.kernels.packed import assert_close_to_float64, vectors
from tests.mil.objectives.made import (
    CLASSES,
    SURVIVAL,
    Rows,
    fitted,
    labels,
    normal,
    per_bag,
    tensors,
    total,
)

ROWS: Rows = {"os": labels(seed=7)["os"]}
TIME, EVENT = torch.from_numpy(ROWS["os"]).unbind(1)
ALL = torch.ones(40, dtype=torch.bool)


@pytest.mark.parametrize("case", ["noties", "ties"])
def test_loss_and_gradient_are_the_recorded_ones(case: str) -> None:
    found = vectors("survival_losses_A")[0]
    theta = found["output/risk"].requires_grad_()
    time, event = found[f"input/times_cox_{case}"], 1 - found["input/censored"]
    loss = cox_loss(theta, time, event, ALL).mean()
    loss.backward()
    assert theta.grad is not None
    assert_close_to_float64(loss, found[f"output/cox_{case}"])
    assert_close_to_float64(theta.grad, found[f"grad/risk_cox_{case}"])


def test_each_part_is_its_formula() -> None:
    assert len(set(TIME.tolist())) < 40
    theta = normal(40)
    found = cox_loss(theta, TIME, EVENT, ALL)
    for i in range(40):
        at_risk = sum(math.exp(theta[j].item()) for j in range(40) if TIME[j] >= TIME[i])
        expected = EVENT[i].item() * (math.log(at_risk) - theta[i].item())
        assert found[i].item() == pytest.approx(expected, rel=1e-12)


def test_gradients_are_right_with_ties_and_missing_labels() -> None:
    time = torch.tensor([3.0, 3.0, 1.0, 5.0, 0.0, 3.0]).double()
    event = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]).double()
    present = torch.tensor([1, 1, 1, 1, 0, 1]).bool()
    assert torch.autograd.gradcheck(lambda z: cox_loss(z, time, event, present), normal(6))


def test_a_missing_label_is_at_risk_of_nothing_not_even_at_time_zero() -> None:
    rows = {"os": np.array([[0.0, 1.0], [np.nan, np.nan], [2.0, 0.0]])}
    objective, logits = fitted([SURVIVAL], ROWS, survival="cox"), normal(3, 1)
    kept = [0, 2]
    alone = per_bag(objective, logits[kept], {"os": rows["os"][kept]})
    assert alone[0] > 0
    assert torch.equal(per_bag(objective, logits, rows)[kept], alone)


def test_laying_out_fewer_risk_sets_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theta = normal(40)
    whole = cox_loss(theta, TIME, EVENT, ALL)
    monkeypatch.setattr(cox, "ROWS", 7)
    assert torch.equal(cox_loss(theta, TIME, EVENT, ALL), whole)


def test_large_predictors_stay_finite_and_a_shift_changes_nothing() -> None:
    theta = normal(40)
    base = cox_loss(theta, TIME, EVENT, ALL)
    assert torch.allclose(cox_loss(theta + 1000, TIME, EVENT, ALL), base, atol=1e-9)
    wide = torch.linspace(-500, 500, 40, requires_grad=True)
    loss = cox_loss(wide, TIME, EVENT, ALL).mean()
    loss.backward()
    assert loss.isfinite() and wide.grad is not None and wide.grad.isfinite().all()


def test_a_batch_that_says_nothing_gives_zero_with_a_zero_gradient() -> None:
    objective = fitted([SURVIVAL], ROWS, survival="cox")
    for rows in (
        [[3.0, 0.0], [4.0, 0.0]],  # no event
        [[3.0, 0.0], [4.0, 1.0]],  # an event with nobody else at risk
        [[3.0, 1.0]],
        [[np.nan, np.nan], [np.nan, np.nan]],
    ):
        logits = normal(len(rows), 1)
        loss = total(objective, logits, {"os": np.array(rows)})
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None and not logits.grad.any()
        assert math.isnan(objective.validation_loss(logits, tensors({"os": np.array(rows)})))


def test_the_mean_runs_over_all_labelled_bags_and_validation_over_the_whole_part() -> None:
    objective = fitted([SURVIVAL], ROWS, survival="cox")
    logits = normal(40, 1)
    parts = per_bag(objective, logits, ROWS)
    assert EVENT.sum() < 40
    assert total(objective, logits, ROWS).item() == pytest.approx(parts.sum().item() / 40)
    whole = objective.validation_loss(logits, tensors(ROWS))
    assert whole == pytest.approx(parts.mean().item(), rel=1e-12)


def test_only_cox_asks_for_a_batch_of_bags() -> None:
    for form, needs in (("cox", True), ("nll", False), ("ce_surv", False)):
        objective = build_objective([SURVIVAL, CLASSES], ObjectiveSpec(survival=form))
        assert objective.needs_batch_of_bags is needs
        assert objective.fit(labels()).needs_batch_of_bags is needs


def test_predictions_are_the_linear_predictor() -> None:
    logits = normal(5, 1).detach().numpy()
    objective = fitted([SURVIVAL], ROWS, survival="cox")
    np.testing.assert_array_equal(objective.predictions(logits)["os"], logits)
    assert objective.columns == {"os": ("risk",)}


def test_scikit_survivals_fit_is_where_the_gradient_vanishes() -> None:
    linear_model = pytest.importorskip("sksurv.linear_model", reason="no scikit-survival")
    x = normal(40, 2).detach()
    seen = np.array(
        list(zip(EVENT.bool().tolist(), TIME.tolist(), strict=True)),
        dtype=[("event", bool), ("time", float)],
    )
    model = linear_model.CoxPHSurvivalAnalysis(ties="breslow", tol=1e-12).fit(x.numpy(), seen)
    beta = torch.from_numpy(model.coef_.copy()).requires_grad_()
    cox_loss(x @ beta, TIME, EVENT, ALL).mean().backward()
    assert beta.grad is not None and beta.grad.abs().max() < 1e-7
