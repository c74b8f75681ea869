"""Dropout that can be drawn again: the backward pass makes the forward pass's mask anew.

The mask belongs to (seed, first row of the chunk), so it is the same as long as chunks are. Keeping
it instead would cost a byte per tile and hidden unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagscope.kernels.segments import CHUNK_ROWS

_STEPS = 1 << 16
_GOLDEN, _PRIME, _LIMIT = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, (1 << 63) - 1


def chunk_dropout(rows: int, columns: int, p: float, seed: int, start: int, like: Tensor) -> Tensor:
    """Return (rows, columns) of 0 with probability p and 1 / (1 - p) else, in like's dtype.

    The probability is rounded to 1 / 65,536, and the other value to what keeps the mean at one.
    """
    kept, factor = chunk_kept(rows, columns, p, seed, start, like.device)
    return kept.to(like.dtype).mul_(factor)


def chunk_kept(
    rows: int, columns: int, p: float, seed: int, start: int, device: torch.device
) -> tuple[Tensor, float]:
    """Return which of (rows, columns) stay, bool, and what they are multiplied with."""
    generator = torch.Generator(device)
    generator.manual_seed((seed * _GOLDEN + start * _PRIME) & _LIMIT)
    # Sixteen bits per number: drawing is what dropout costs on a processor.
    words = torch.empty((rows * columns + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(1 << 63), None, generator=generator)
    dropped = min(round(p * _STEPS), _STEPS - 1)
    kept = words.view(torch.int16)[: rows * columns].view(rows, columns) >= dropped - _STEPS // 2
    return kept, _STEPS / (_STEPS - dropped)


def gate_dropout(p: float, is_gated: bool) -> float:
    """Return the probability of dropping the product of the gates' activations.

    Both are dropped on their own, yet only their product is used: one draw does for both.
    """
    return 1.0 - (1.0 - p) ** 2 if is_gated else p


def tile_dropout(rows: int, columns: int, p: float, seed: int, like: Tensor) -> Tensor:
    """Return the masks of all chunks, one under the other: (rows, columns)."""
    found: Tensor = torch.ops.bagscope.tile_dropout(rows, columns, p, seed, like.detach())
    return found


@torch.library.custom_op(
    "bagscope::tile_dropout",
    mutates_args=(),
    schema="(SymInt rows, SymInt columns, float p, SymInt seed, Tensor like) -> Tensor",
)
def _tile_dropout(rows: int, columns: int, p: float, seed: int, like: Tensor) -> Tensor:
    parts = [
        chunk_dropout(min(CHUNK_ROWS, rows - start), columns, p, seed, start, like)
        for start in range(0, rows, CHUNK_ROWS)
    ]
    return torch.cat(parts) if parts else like.new_empty(0, columns)


@_tile_dropout.register_fake
def _(rows: int, columns: int, p: float, seed: int, like: Tensor) -> Tensor:
    return like.new_empty(rows, columns)
