"""The benchmark for GPUs can be rehearsed without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kernels.packed import ROOT

OPERATIONS = (
    "cross_attention_pool", "varlen_self_attention", "attention within 3 steps",
    "linear_attention", "causal_conv1d", "selective_scan", "ssd_scan", "segment_softmax_pool",
)  # fmt: skip


@pytest.mark.slow
def test_every_operation_is_checked_and_timed() -> None:
    script = ROOT / "benchmarks/bench_gpu.py"
    command = [sys.executable, script, "--device", "cpu", "--sizes", "small"]
    # A rehearsal needs no speed, and threads wait long for each other on a busy machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    for name in OPERATIONS:
        told = [line for line in lines if line.startswith(f"{name}, ")]
        assert sum("eager ÷ a step" in line for line in told) == 2, told
        assert any("share of the bandwidth" in line for line in told)
        assert any("eager loop ÷ packed" in line for line in told)
    assert not [line for line in lines if "left out:" in line or "left out (" in line]
