"""Metrics of a sequence, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bagscope.mil.continual.metrics import accuracy, kept, localisation

NONE = math.nan


def test_a_small_matrix_by_hand() -> None:
    found = kept([[0.9, NONE, NONE], [0.95, 0.8, NONE], [0.7, 0.85, 0.6]])
    assert found.average == pytest.approx((0.7 + 0.85 + 0.6) / 3)
    assert found.learning == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    # The first fell from its best, 0.95; the second one rose from 0.8.
    assert found.forgetting == pytest.approx(((0.95 - 0.7) + (0.8 - 0.85)) / 2)


def test_what_is_not_known_is_left_out() -> None:
    found = kept([[NONE, NONE], [NONE, 0.5]])
    assert found.average == found.learning == 0.5 and math.isnan(found.forgetting)
    with pytest.raises(ValueError, match="row and a column"):
        kept([[1.0, 2.0]])


def test_accuracy_and_localisation() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert accuracy(probabilities, np.array([0, 1, 1])) == pytest.approx(2 / 3)
    truth = [np.array([True, False, False]), np.array([False, False]), np.array([True, False])]
    scores = [np.array([0.5, 0.6, 0.1]), np.array([1.0, 2.0]), np.array([3.0, 1.0])]
    assert localisation(scores, truth) == pytest.approx((0.5 + 1.0) / 2)
    assert math.isnan(localisation(scores[1:2], truth[1:2]))
