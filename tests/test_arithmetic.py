"""The advice to the C library does what it says (matrix units: features/test_precision)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bagscope.arithmetic import keep_freed_memory

FAULTS = """
import resource
import numpy as np
from bagscope.arithmetic import keep_freed_memory
if {advised}: assert keep_freed_memory()
for _ in range(2):  # the second one may reuse what the first gave back
    np.ones(64 << 20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    np.ones(64 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*, advised: bool) -> int:
    script = FAULTS.format(advised=advised)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_blocks_are_used_again() -> None:
    fresh, kept = page_faults(advised=False), page_faults(advised=True)
    assert kept < fresh / 4


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
