"""Matrix units that a processor advertises and that kill whoever uses them: found, and left alone.

Some virtual machines show the AMX units of their host and then refuse their instructions, so that
the first bfloat16 product ends the process. The units are therefore tried in a process of their
own; where that one dies, oneDNN is told to do without them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"
_WITHOUT_MATRIX_UNITS = "AVX512_CORE_FP16"
_TRIAL = (
    "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); "
    "assert (a @ a)[0, 0] == 64; torch.nn.functional.linear(a.float(), a.float())"
)
_PATIENCE_S = 120


@lru_cache(maxsize=1)
def avoid_broken_units() -> bool:
    """Keep oneDNN from matrix units that crash; return whether that was necessary.

    Must come before the first product of the process, since oneDNN looks once. Costs nothing where
    no such units are advertised.
    """
    if ISA_VARIABLE in os.environ or not advertises_matrix_units():
        return False
    trial = subprocess.run(
        [sys.executable, "-c", _TRIAL], capture_output=True, check=False, timeout=_PATIENCE_S
    )
    if trial.returncode == 0:
        return False
    os.environ[ISA_VARIABLE] = _WITHOUT_MATRIX_UNITS
    return True


def advertises_matrix_units() -> bool:
    """Return whether the processor claims to have AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " amx_" in cpuinfo.read_text(encoding="utf-8", errors="replace")
