from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bagscope.errors import ConfigError
from bagscope.mil.objectives.entropy import entropy_weight
from bagscope.mil.objectives.spec import EntropySpec
from bagscope.mil.targets import TargetSpec
from tests.kernels.packed import assert_close_to_float64, vectors
from tests.mil.objectives.made import CLASSES, Rows, fitted, labels, normal, output, tensors
from tests.mil.parity.recorded import Recorded

ROWS: Rows = {"subtype": labels(6)["subtype"]}


@pytest.mark.parametrize("case", ["single", "rows"])
def test_term_and_gradient_are_the_recorded_ones(case: str) -> None:
    found = vectors("aem_loss_A")[0]
    raw = found["input/attention_raw"][: 1 if case == "single" else 3].requires_grad_()
    log_attention = raw.log_softmax(1)
    entropy = -(log_attention.exp() * log_attention).sum(1)
    # The bag's weight is zero, so that the total is the term alone.
    objective = fitted([CLASSES], ROWS, entropy={"weight": 1.0}, terms={"bag": 0.0})
    losses = objective(
        output(torch.zeros(1, 3), entropy=entropy[None]),
        tensors({"subtype": ROWS["subtype"][:1]}),
        progress=0.3,
    )
    losses.total.backward()
    assert raw.grad is not None
    assert_close_to_float64(losses.mean("entropy"), found[f"output/loss_{case}"])
    assert_close_to_float64(raw.grad, found[f"grad/attention_raw_{case}"])


def test_abmil_with_the_term_is_the_recorded_model() -> None:
    options = {
        "hidden": "=hidden",
        "attention": "=attention_hidden",
        "gated": True,
        "projection_bias": False,
        "dropout": 0.0,
    }
    recorded = Recorded("aem_abmil-lambda01_A", "aem-abmil", options)
    target = TargetSpec(column="y", classes=("0", "1"))
    objective = fitted(
        [target], {"y": np.array([[0.0], [1.0]])}, entropy={"weight": recorded.config["lambda_"]}
    )
    truth = {"y": recorded.label.double().reshape(1, 1)}
    losses = objective(recorded.output(), truth, progress=0.5)
    recorded.compare(loss_bag=losses.terms["bag"], loss_entropy=losses.terms["entropy"])
    recorded.compare_gradients(losses.total)


def test_schedules() -> None:
    constant = EntropySpec(weight=0.2)
    assert [entropy_weight(constant, p) for p in (0.0, 0.4, 1.0)] == [0.2, 0.2, 0.2]
    cosine = EntropySpec(weight=0.2, schedule="cosine", end=0.1)
    found = [entropy_weight(cosine, p) for p in (0.0, 1 / 3, 0.5, 1.0)]
    assert found == pytest.approx([0.2, 0.175, 0.15, 0.1])
    with pytest.raises(ValueError, match=r"progress is 1\.5"):
        entropy_weight(constant, 1.5)


def test_the_weight_is_applied_and_the_term_reported_without_it() -> None:
    options = {"weight": 0.5, "schedule": "cosine"}
    objective = fitted([CLASSES], ROWS, entropy=options)
    logits, entropy = normal(6, 3), normal(6, 2).abs()
    found = [
        objective(output(logits, entropy=entropy), tensors(ROWS), progress=p) for p in (0.0, 0.5, 1)
    ]
    for losses, weight in zip(found, (0.5, 0.25, 0.0), strict=True):
        torch.testing.assert_close(losses.terms["entropy"], -entropy.detach().mean(1))
        assert losses.weights["entropy"] == pytest.approx(weight)
        expected = losses.mean("bag") - weight * entropy.mean()
        assert losses.total.item() == pytest.approx(expected.item())


def test_without_a_weight_there_is_no_term() -> None:
    logits = normal(6, 3)
    with_entropy = output(logits, entropy=torch.ones(6, 1))
    losses = fitted([CLASSES], ROWS)(with_entropy, tensors(ROWS), progress=0.0)
    assert set(losses.terms) == {"bag"} and losses.total.item() == losses.mean("bag").item()


def test_per_log_n_divides_by_the_bags_own_size() -> None:
    objective = fitted([CLASSES], ROWS, entropy={"weight": 1.0, "per_log_n": True})
    sizes = torch.tensor([1, 2, 10, 100, 1000, 7], dtype=torch.int32)
    uniform = output(normal(6, 3), entropy=sizes.double().log()[:, None])
    losses = objective(uniform, tensors(ROWS), progress=0.0, lengths=sizes)
    assert losses.terms["entropy"].tolist() == pytest.approx([0, -1, -1, -1, -1, -1])
    with pytest.raises(ValueError, match=r"lengths=bags\.lengths"):
        objective(uniform, tensors(ROWS), progress=0.0)


def test_an_aggregator_without_entropy_is_refused() -> None:
    objective = fitted([CLASSES], ROWS, entropy={"weight": 0.1})
    with pytest.raises(ConfigError, match="reports no entropy"):
        objective(output(normal(6, 3)), tensors(ROWS), progress=0.0)
    assert math.isfinite(objective.validation_loss(normal(6, 3), tensors(ROWS)))
