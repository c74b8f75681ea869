"""Which implementation of an operation runs, and with which float32 arithmetic: decided here alone.

    reference   plain torch, for reading and for tests
    cpu         streaming torch: chunks of rows, memory that does not grow with the bag
    triton      compiled kernels, on CUDA
    interpret   the same kernels in Triton's interpreter, for tests without a GPU

`BAGSCOPE_KERNELS` forces one of them; `auto` (the default) takes `triton` on CUDA and `cpu`
elsewhere. What a kernel does not take falls back to `cpu`, and says so once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch

from bagscope.arithmetic import avoid_broken_units

Way = Literal["reference", "cpu", "triton", "interpret"]
VARIABLE = "BAGSCOPE_KERNELS"
_CHOICES = ("auto", *get_args(Way))
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger(__name__)
_told: set[str] = set()

_kept_bytes = 1 << 30

# The float32 policy's trial.
_SIZE, _ROUNDS = 512, 6
_WORTHWHILE = 1.15
_ERROR_ALLOWANCE = 2.0


def choose(op: str, tensor: torch.Tensor, *, refuses: str = "") -> Way:
    """Return the implementation of `op` for tensors like this one.

    Args:
        op: name of the operation, for the message.
        tensor: the largest input; its device and dtype decide.
        refuses: why the kernel can't take the shapes at hand, empty where it can.

    Raises:
        ValueError: `BAGSCOPE_KERNELS` is none of the known words.
    """
    if tensor.device.type == "cpu":
        avoid_broken_units()
    wanted = os.environ.get(VARIABLE, "auto") or "auto"
    if wanted not in _CHOICES:
        raise ValueError(f"{VARIABLE} is {wanted!r}; choose one of {', '.join(_CHOICES)}")
    if wanted in ("reference", "cpu"):
        return "reference" if wanted == "reference" else "cpu"
    if wanted == "auto" and tensor.device.type != "cuda":
        return "cpu"
    reason = refuses or _refusal(tensor, wanted)
    if reason:
        _tell_once(op, reason)
        return "cpu"
    return "interpret" if wanted == "interpret" else "triton"


def _refusal(tensor: torch.Tensor, wanted: str) -> str:
    if not has_triton():
        return "triton is not installed"
    if wanted != "interpret" and tensor.device.type != "cuda":
        return f"tensors on {tensor.device.type}, kernels are compiled for CUDA only"
    if tensor.dtype not in _KERNEL_DTYPES:
        return f"no kernel for {str(tensor.dtype).removeprefix('torch.')}"
    return ""


def has_triton() -> bool:
    """Return whether Triton can be imported."""
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _tell_once(op: str, reason: str) -> None:
    if (key := f"{op}: {reason}") not in _told:
        _told.add(key)
        _log.warning("%s runs without its kernel (%s)", op, reason)


def table() -> dict[str, str]:
    """Return what would run here, for `doctor`: device kind → implementation, and the policy."""
    found = {"cpu": choose("doctor", torch.empty(0))}
    if torch.cuda.is_available():
        found["cuda"] = choose("doctor", torch.empty(0, device="cuda"))
    return {**found, "float32 products": float32_policy()[1]}


# --- what is kept for the way back -----------------------------------------------------------


@contextlib.contextmanager
def keeping(most_bytes: int) -> Iterator[None]:
    """Let each call of the block keep so much of its activations; the rest is computed anew.

    It holds for the process, and changes no result.
    """
    global _kept_bytes
    before, _kept_bytes = _kept_bytes, most_bytes
    try:
        yield
    finally:
        _kept_bytes = before


def kept_bytes() -> int:
    """Return what one call of an operation may keep of its activations."""
    return _kept_bytes


# --- float32 products on the CPU ------------------------------------------------------------


@contextlib.contextmanager
def own_arithmetic() -> Iterator[None]:
    """Run the block with this machine's best float32 products; every operation's body does.

    The setting is torch's own and holds for the thread's process, so it is put back afterwards.
    """
    wanted = float32_policy()[0]
    before = torch.get_float32_matmul_precision()
    if wanted == before:
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=1)
def float32_policy() -> tuple[str, str]:
    """Return torch's matmul precision for our operations, and one sentence on why.

    "medium" lets oneDNN do float32 products, which on some CPUs is twice as fast at the same
    accuracy. It is also leave to use bfloat16, so it is taken only where the error stays that of
    float32.
    """
    avoid_broken_units()
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "highest", "torch's default (no oneDNN)"
    trials = _trials()
    default, medium = trials["highest"], trials["medium"]
    if medium.error > _ERROR_ALLOWANCE * default.error:
        return "highest", f"torch's default (oneDNN errs by {medium.error:.1e})"
    if default.seconds < _WORTHWHILE * medium.seconds:
        return "highest", "torch's default (oneDNN is no faster here)"
    gain = default.seconds / medium.seconds
    return "medium", f"oneDNN, {gain:.2g} times as fast at the same error"


class _Trial(NamedTuple):
    """How long a product takes at a precision, and its error relative to the exact one."""

    seconds: float
    error: float


def _trials() -> dict[str, _Trial]:
    """Return the trial of each precision."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(_SIZE, _SIZE, generator=generator)
    exact = a.double() @ a.double()
    seconds: dict[str, list[float]] = {"highest": [], "medium": []}
    errors: dict[str, float] = {}
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    # One thread's own time: what else runs on the machine must not decide, or the same study would
    # get other bits on a busy day.
    torch.set_num_threads(1)
    try:
        for _ in range(_ROUNDS):
            for precision, found in seconds.items():
                torch.set_float32_matmul_precision(precision)
                begin = time.thread_time()
                product = a @ a
                found.append(time.thread_time() - begin)
                # Not the largest error: that one differs twofold from draw to draw.
                errors[precision] = float((product.double() - exact).norm() / exact.norm())
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(before)
    return {name: _Trial(min(found), errors[name]) for name, found in seconds.items()}
