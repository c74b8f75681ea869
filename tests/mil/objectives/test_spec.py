from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from bagscope.errors import ConfigError
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.specs import parse_spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": "balance"}, "'balance': input should be 'none' or 'balanced'"),
        ({"class_weights": [1, -2]}, "-2: input should be greater than 0"),
        ({"class_weights": []}, "class_weights is empty"),
        ({"focal": 2}, "did you mean 'focal_gamma'"),
        ({"survival": "cox", "bins": 8}, "bins and nll_alpha belong to nll and ce_surv"),
        ({"survival": "cox", "nll_alpha": 0.1}, "bins and nll_alpha belong to nll and ce_surv"),
        ({"bins": 1}, "greater than or equal to 2"),
        ({"label_smoothing": 1}, "less than 1"),
        ({"terms": {"instance": -1}}, r"terms.instance is -1"),
        ({"terms": {"entropy": 1}}, r"its weight is entropy.weight"),
        ({"terms": {"bag/age": 1}}, "the weight of a target stands in the target"),
        ({"entropy": {"weight": 1, "end": 0.5}}, "end belongs to schedule: cosine"),
        ({"entropy": {"weigth": 1}}, "did you mean 'weight'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_spec(ObjectiveSpec, options, where="recipe")
    assert "\n" not in str(caught.value)


def test_a_recipe_survives_json() -> None:
    spec = ObjectiveSpec.model_validate(
        {
            "class_weights": [1, 2.5],
            "terms": {"bag": 0.7, "instance": 0.3},
            "entropy": {"weight": 0.1, "schedule": "cosine", "end": 0.01},
        }
    )
    assert ObjectiveSpec.model_validate_json(spec.model_dump_json()) == spec


def test_reading_a_recipe_needs_no_torch() -> None:
    script = "import sys, bagscope.mil.objectives.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
