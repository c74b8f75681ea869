"""Memory that shows whether a kernel reads what nobody wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton 3.9 warns that this default will change, and a warning is an error here.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Have torch fill all new, unwritten memory with NaN (integers: their largest value)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
