"""What every test process does first."""

from __future__ import annotations

import pytest
from hypothesis import settings

from bagscope.arithmetic import avoid_broken_units

# How long an example takes says nothing on a machine that others use too.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture(scope="session", autouse=True)
def working_arithmetic() -> None:
    """Leave matrix units alone that would kill the test process, whatever a test sets later."""
    if avoid_broken_units():
        import torch

        # oneDNN looks at its settings once, at its first product.
        torch.ones(2, 2, dtype=torch.bfloat16) @ torch.ones(2, 2, dtype=torch.bfloat16)
