"""Where there is nothing to find, nothing is found; with a leak, it would be.

`benchmarks/canary.py` does the same at length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bagscope.pipeline.train import PlannedRun
from tests.pipeline.noise import honest_aurocs, leaky_aurocs, plan_of, reach_of

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[PlannedRun]:
    folder = Path(tmp_path_factory.mktemp("noise"))
    return [plan_of(folder / str(seed), seed) for seed in SEEDS]


def test_of_noise_a_run_says_that_there_is_nothing(plans: list[PlannedRun]) -> None:
    found = np.concatenate([honest_aurocs(planned) for planned in plans])
    assert len(found) == 5 * len(SEEDS)
    assert abs(found.mean() - 0.5) < reach_of(plans[0], len(SEEDS))


@pytest.mark.slow
def test_its_leaky_twin_finds_what_is_not_there(plans: list[PlannedRun]) -> None:
    found = np.concatenate([leaky_aurocs(planned, "train") for planned in plans])
    assert found.mean() - 0.5 > reach_of(plans[0], len(SEEDS))
