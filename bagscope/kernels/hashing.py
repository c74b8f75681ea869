"""Draws by name: numbers that depend on their keys alone, on every device and in any batch.

Keys are folded one into the other by splitmix64, a hash of 64 bits; torch's integers have a sign
and wrap, so its multipliers stand here as signed numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST, _SECOND, _GOLDEN = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB


def key_of_step(seed: int, step: int, device: torch.device) -> Tensor:
    """Return the key of a step of a run: a single number."""
    signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    return hashed(signed ^ hashed(torch.full((), step, device=device)))


def hashed(number: Tensor) -> Tensor:
    """Return splitmix64's output for each number, int64."""
    number = number + _GOLDEN
    number = (number ^ _shifted(number, 30)) * _FIRST
    number = (number ^ _shifted(number, 27)) * _SECOND
    return number ^ _shifted(number, 31)


def uniform(key: Tensor) -> Tensor:
    """Return a number in [0, 1) for each key, float64."""
    return _shifted(key, 11).double() * 2.0**-53


def _shifted(number: Tensor, bits: int) -> Tensor:
    """Return the number shifted right with zeros coming in, as an unsigned one is."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)
