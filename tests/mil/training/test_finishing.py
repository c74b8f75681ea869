from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from bagscope.mil.cases import Case
from bagscope.mil.member import Member
from bagscope.mil.sources import ArraySource
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trained, Trainer
from tests.mil.made_bags import TARGET, made_recipe, made_source


@pytest.fixture(scope="module")
def trained() -> Trained:
    recipe = made_recipe(training={"epochs": 1})
    return Trainer(recipe, [TARGET], made_source(8), made_source(4), seed=0).run()


def overconfident(count: int, *, per_patient: int = 1, missing: int = 0) -> tuple[Any, Any]:
    """Return logits that are three times too sure, and the cases that they are of."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) // per_patient % 2
    honest = np.stack([np.zeros(count), generator.normal(2 * labels - 1, 1.4)], axis=1)
    cases = [
        Case(
            case_id=f"c{place}",
            patient_id=f"p{place // per_patient}",
            slide_ids=(f"c{place}",),
            targets={"label": (float("nan") if place < missing else float(label),)},
        )
        for place, label in enumerate(labels)
    ]
    return 3 * honest, ArraySource([np.ones((1, 2), np.float32)] * count, cases)


def finished(trained: Trained, logits: Any, inner: Any, **training: Any) -> Member:
    recipe = made_recipe(training=training)
    with_logits = dataclasses.replace(trained, inner_logits=logits)
    return finish(with_logits, recipe, inner, seed=7, fields={"a": 1})


def test_with_twenty_patients_of_each_class_overconfidence_is_repaired(trained: Trained) -> None:
    logits, inner = overconfident(400)
    member = finished(trained, logits, inner)
    labels = np.arange(400) % 2

    def loss(temperature: float) -> float:
        return -float(log_softmax(logits / temperature, axis=1)[np.arange(400), labels].mean())

    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-6})
    assert member.temperatures["label"] == pytest.approx(best.x, rel=1e-3)
    assert member.temperatures["label"] > 2
    assert member.uncalibrated == {}
    assert (member.seed, member.fields) == (7, {"a": 1})


@pytest.mark.parametrize(("count", "per_patient"), [(38, 1), (78, 2)])
def test_with_fewer_patients_it_is_left_out_and_said(
    trained: Trained, count: int, per_patient: int
) -> None:
    logits, inner = overconfident(count, per_patient=per_patient)
    member = finished(trained, logits, inner)
    assert member.temperatures == {}
    assert "20" in member.uncalibrated["label"]
    assert "patients" in member.uncalibrated["label"]
    assert member.thresholds == {"label": 0.5}
    assert "20" in member.unchosen["label"]


def test_cases_without_the_label_do_not_count(trained: Trained) -> None:
    logits, inner = overconfident(44, missing=6)
    assert finished(trained, logits, inner).temperatures == {}
    logits, inner = overconfident(44, missing=44)
    assert "no inner validation case" in finished(trained, logits, inner).uncalibrated["label"]
    logits, inner = overconfident(44)
    assert finished(trained, logits, inner).temperatures


def test_the_threshold_is_youden_s_on_calibrated_probabilities(trained: Trained) -> None:
    logits, inner = overconfident(400)
    member = finished(trained, logits, inner)
    labels = np.arange(400) % 2
    probability = member.predictions(logits)["label"][:, 1]

    def youden(threshold: float) -> float:
        called = probability >= threshold
        return float(called[labels == 1].mean() - called[labels == 0].mean())

    best = max(youden(value) for value in probability)
    assert youden(member.thresholds["label"]) == pytest.approx(best)
    assert finished(trained, logits, inner, threshold="half").thresholds == {"label": 0.5}


def test_what_is_not_asked_for_or_can_not_be_is_said(trained: Trained) -> None:
    logits, inner = overconfident(400)
    off = finished(trained, logits, inner, calibrate=False)
    assert off.temperatures == {}
    assert off.uncalibrated == {"label": "the recipe does not ask for it"}
    assert off.unchosen == {}
    half = finished(trained, logits, inner, threshold="half")
    assert half.unchosen == {"label": "the recipe asks for one half"}
    assert half.temperatures
    without = finished(trained, None, None)
    assert without.uncalibrated == {"label": "there is no inner validation part"}
    assert without.thresholds == {"label": 0.5}
    assert without.unchosen == {"label": "there is no inner validation part"}


def test_a_threshold_is_chosen_without_a_temperature_too(trained: Trained) -> None:
    logits, inner = overconfident(400)
    lopsided = logits + np.array([0.0, 2.0])
    member = finished(trained, lopsided, inner, calibrate=False)
    probability = softmax(lopsided, axis=1)[:, 1]
    labels = np.arange(400) % 2

    def youden(threshold: float) -> float:
        called = probability >= threshold
        return float(called[labels == 1].mean() - called[labels == 0].mean())

    assert youden(member.thresholds["label"]) == pytest.approx(max(map(youden, probability)))
    assert member.thresholds["label"] > 0.6
