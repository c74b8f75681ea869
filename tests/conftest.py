"""What every test process does first."""

from __future__ import annotations

import pytest

from bagscope.arithmetic import avoid_broken_units


@pytest.fixture(scope="session", autouse=True)
def working_arithmetic() -> None:
    """Leave matrix units alone that would kill the test process."""
    avoid_broken_units()
