"""What a process must know of its machine before it multiplies matrices on the CPU.

Some virtual machines show the AMX units of their host and then refuse their instructions, so that
the first bfloat16 product ends the process. The units are therefore tried in a process of their
own; where that one dies, oneDNN is told to do without them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"
TRIED_VARIABLE = "BAGSCOPE_MATRIX_UNITS"
"""Says "fine" to the processes that one starts which has tried; a trial takes seconds."""
_FINE = "fine"
_WITHOUT_MATRIX_UNITS = "AVX512_CORE_FP16"
_TRIAL = (
    "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); "
    "assert (a @ a)[0, 0] == 64; torch.nn.functional.linear(a.float(), a.float())"
)
_PATIENCE_S = 120
# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK, _NEVER = 1 << 30, 2**31 - 1


@lru_cache(maxsize=1)
def avoid_broken_units() -> bool:
    """Keep oneDNN from matrix units that crash; return whether that was necessary.

    Must come before the first product of the process, since oneDNN looks once. Costs nothing where
    no such units are advertised.
    """
    known = ISA_VARIABLE in os.environ or os.environ.get(TRIED_VARIABLE) == _FINE
    if known or not advertises_matrix_units():
        return False
    trial = subprocess.run(
        [sys.executable, "-c", _TRIAL], capture_output=True, check=False, timeout=_PATIENCE_S
    )
    if trial.returncode == 0:
        os.environ[TRIED_VARIABLE] = _FINE
        return False
    os.environ[ISA_VARIABLE] = _WITHOUT_MATRIX_UNITS
    return True


def compute_on(threads: int) -> None:
    """Make this process ready to compute with torch on so many threads."""
    avoid_broken_units()
    keep_freed_memory()
    import torch

    torch.set_num_threads(threads)


def advertises_matrix_units() -> bool:
    """Return whether the processor claims to have AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " amx_" in cpuinfo.read_text(encoding="utf-8", errors="replace")


def keep_freed_memory() -> bool:
    """Have the C library reuse large blocks in place of returning them to the system at once.

    Every layer of a network allocates anew; on Linux, pages that come fresh from the system are
    cleared one by one, which costs up to half of the time of a light network. The process then
    keeps the most that it ever held. Returns whether the C library takes such advice (glibc).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
    )
