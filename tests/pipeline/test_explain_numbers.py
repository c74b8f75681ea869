"""Targets of gradients and statistics over slides, against what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special

from bagscope.mil.explain.annotations import SlideDetections, froc
from bagscope.mil.explain.effects import Controlled, Effect, Places
from bagscope.mil.objectives.discrete_time import DiscreteTimeCriterion
from bagscope.mil.objectives.ordinal import OrdinalCriterion
from bagscope.pipeline.explain_annotations import froc_statistic, over_slides
from bagscope.pipeline.explain_gradients import discrete_risk, ordinal_log_odds
from bagscope.pipeline.explain_record import chance_of

RNG = np.random.default_rng(5)


def test_what_is_differentiated_is_what_the_objective_predicts() -> None:
    logits = RNG.normal(size=(6, 3))
    ordinal = OrdinalCriterion(classes=("0", "1", "2", "3"), weights=(1.0, 1.0, 1.0, 1.0))
    chances = ordinal.predict(logits)
    for column in range(4):
        found = ordinal_log_odds(column)(torch.from_numpy(logits)).numpy()
        np.testing.assert_allclose(found, special.logit(chances[:, column]), atol=1e-9)
    survival = DiscreteTimeCriterion(form="nll", alpha=0.0, edges=(0.0, 1.0, 2.0, 3.0))
    found = discrete_risk(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(found, survival.predict(logits)[:, 0], atol=1e-12)


def made_slides() -> list[SlideDetections]:
    # Scores of few values, so that lesions and false positives tie.
    found = []
    for lesions in (2, 0, 1, 3, 0):
        count = int(RNG.integers(4, 12))
        scores = RNG.integers(0, 6, count).astype(np.float64)
        lesion = RNG.integers(-1, lesions, count) if lesions else np.full(count, -1)
        found.append(SlideDetections(scores=scores, lesion=lesion, lesions=lesions))
    return found


@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1], [2, 0, 1, 3, 0], [0, 3, 1, 0, 2]])
def test_froc_of_slides_drawn_anew_is_that_of_as_many_copies(counts: list[int]) -> None:
    slides = made_slides()
    copies = [one for one, n in zip(slides, counts, strict=True) for _ in range(n)]
    found = froc_statistic(slides)(np.array([counts], np.float64))
    assert found == pytest.approx(froc(copies).score)


def test_slides_of_one_patient_are_drawn_together() -> None:
    slides = {
        name: {
            "auroc": value,
            "auprc": value,
            "dice": None,
            "threshold": 2.0,
            "lesions": 1,
            "detections": {"scores": [3.0, 1.0], "lesion": [0, -1]},
        }
        for name, value in (("a", 0.9), ("b", 0.7), ("c", 0.5))
    }
    found = over_slides(slides, {"a": "p", "b": "p", "c": "q"})
    assert found["estimates"]["auroc"]["value"] == pytest.approx(0.7)
    # Draws of two patients have the means 0.8, 0.7 and 0.5, and no others.
    assert found["estimates"]["auroc"]["low"] == pytest.approx(0.5)
    assert found["estimates"]["auroc"]["high"] == pytest.approx(0.8)
    assert found["estimates"]["dice"]["value"] is None
    assert found["estimates"]["lesion_sensitivity"]["value"] == 1.0
    alone = over_slides({"a": slides["a"]}, {"a": "p"})
    assert alone["estimates"]["auroc"]["low"] is None


def test_tiles_suffice_by_how_often_random_ones_leave_as_high_an_answer() -> None:
    nowhere = Places(slide_ids=(), rows=np.zeros(0, np.int64), coords_l0=None)
    effect = Effect(
        slide_id="s",
        model_id="",
        intervention="keep only",
        columns=("yes",),
        tiles_before=10,
        tiles_after=2,
        removed=nowhere,
        added=nowhere,
        before=np.array([0.9]),
        after=np.array([0.88]),
        decision_before=0,
        decision_after=0,
    )
    controls = np.array([[0.2], [0.88], [0.95], [0.5]])
    one = Controlled(effect=effect, controls=controls)
    assert chance_of("sufficiency", one) == pytest.approx([3 / 5])
    # A change of at least 0.02, either way: all but the one that is the same.
    assert chance_of("necessity", one) == pytest.approx([5 / 5])
