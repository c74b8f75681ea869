"""Which arithmetic this machine does well: found by trying, not by reading its advertisement.

Some virtual machines advertise matrix instructions that kill the process which uses them, and on
some processors bfloat16 is slower than float32. So the instructions are tried in a process of
their own, and bfloat16 is used only where it is faster. float16 products are never done on a CPU,
where they run hundreds of times slower.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from bagscope.arithmetic import avoid_broken_units
from bagscope.errors import ConfigError

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16", "float16"]

_WORTHWHILE = 1.25
"""bfloat16 must be this much faster than float32 to be worth its rounding."""
_SIZE, _ROUNDS = 768, 6
_LARGEST_ERROR = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuPolicy:
    """What the processor is trusted with.

    Attributes:
        bfloat16: products in bfloat16 work, are right, and faster than float32.
        note: one sentence for `doctor` and for the record.
    """

    bfloat16: bool
    note: str


@lru_cache(maxsize=1)
def cpu_policy() -> CpuPolicy:
    """Find out what this processor does well; must come before the first product of the process."""
    capped = avoid_broken_units()
    gain, error = _bfloat16_gain()
    usable = gain >= _WORTHWHILE and error <= _LARGEST_ERROR
    note = f"bfloat16 is {gain:.2g} times as fast as float32 on this CPU"
    if error > _LARGEST_ERROR:
        note += f" but wrong by {error:.2g}"
    note += ", so it is used" if usable else ", so float32 is used"
    if capped:
        note += "; its matrix units are advertised, but crash, and are left alone"
    return CpuPolicy(bfloat16=usable, note=note)


def choose_precision(
    own: Precision, device: torch.device, *, asked: Precision | None = None
) -> Precision:
    """Return the arithmetic to encode with.

    Args:
        own: what the encoder's authors use on a GPU; taken where the device does it well.
        device: to encode on.
        asked: what the user asked for, which goes before.

    Raises:
        ConfigError: float16 on a CPU.
    """
    if asked is not None:
        if asked == "float16" and device.type == "cpu":
            raise ConfigError(
                "precision float16 runs hundreds of times slower on a CPU; choose float32, "
                "bfloat16 or auto"
            )
        return asked
    if device.type != "cpu" or own == "float32":
        return own
    return "bfloat16" if cpu_policy().bfloat16 else "float32"


def _bfloat16_gain() -> tuple[float, float]:
    """Return how many times faster bfloat16 products are than float32, and their relative error."""
    import torch

    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(_SIZE, _SIZE, generator=generator)
    short = exact.bfloat16()
    reference = exact @ exact
    error = float((short @ short - reference).abs().max() / reference.abs().max())
    seconds = {}
    for name, matrix in (("float32", exact), ("bfloat16", short)):
        best = float("inf")
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - begin)
        seconds[name] = best
    return seconds["float32"] / seconds["bfloat16"], error
