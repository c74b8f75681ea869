"""Tests of the kernels in Triton's interpreter; tests/kernels/test_<op>.py runs each file."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def interpreter() -> None:
    """Skip where the process was started without the interpreter's switch."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a process of its own with TRITON_INTERPRET=1; the op's own test runs it")
