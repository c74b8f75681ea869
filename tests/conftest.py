"""What every test process does first."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from bagscope.arithmetic import avoid_broken_units

# How long an example takes says nothing on a machine that others use too; and examples are the same
# in every run, so that a change is never blamed for what another draw would have found before it.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("exploring", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session", autouse=True)
def working_arithmetic() -> None:
    """Leave matrix units alone that would kill the test process, whatever a test sets later."""
    if avoid_broken_units():
        import torch

        # oneDNN looks at its settings once, at its first product.
        torch.ones(2, 2, dtype=torch.bfloat16) @ torch.ones(2, 2, dtype=torch.bfloat16)
