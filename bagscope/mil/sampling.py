"""Which tiles of a bag a training step sees, and how they are disturbed. Never in evaluation.

Every draw is keyed by seed, step and case, and by how often the case came in that step before. So
it does not depend on the batch that the bag came in, on prefetching, or on how often a run was
interrupted, and a case that is drawn several times an epoch shows other tiles each time.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope.kernels.varlen_self_attention.hilbert import hilbert_index
from bagscope.mil.bags import key_of
from bagscope.mil.recipe import BagSpec, Sampling

Key = tuple[int, int, str, int]
"""Seed, number of the step in the run, the case's id, how often it came in that step before."""

_ROWS, _NOISE, _DROPPED = 1, 2, 3
"""What a draw is for; two purposes never share one."""


def sample_rows(
    length: int,
    most: int | None,
    sampling: Sampling,
    grid: NDArray[np.int32] | None,
    *,
    key: Key,
) -> NDArray[np.int64] | None:
    """Return the rows to take of a bag, rising; None for all of them.

    "spatial" walks the tissue along a Hilbert curve and takes one tile of each stretch, so that
    every region is seen as often as its size asks for; without a lattice it is uniform.

    Args:
        length: tiles of the bag.
        most: how many at most.
        sampling: how they are drawn.
        grid: (length, 2) int32 (column, row) of the tiles.
        key: of the draw.
    """
    if most is None or length <= most:
        return None
    generator = np.random.default_rng(_entropy(key, _ROWS))
    if sampling == "uniform" or grid is None:
        return np.sort(generator.choice(length, most, replace=False)).astype(np.int64)
    column, row = torch.from_numpy(np.ascontiguousarray(grid.T))
    walk = np.argsort(hilbert_index(column, row).numpy(), kind="stable")
    borders = np.linspace(0, length, most + 1)
    # Stretches are at least one tile long, and no two of them reach into the same tile.
    low, high = np.ceil(borders[:-1]).astype(np.int64), np.ceil(borders[1:]).astype(np.int64)
    return np.sort(walk[generator.integers(low, high)]).astype(np.int64)


def shown_at(spec: BagSpec, longest: int, progress: float) -> BagSpec:
    """Return how bags are presented at a time: a curriculum's `sample_tiles` is of that time.

    It grows by the same factor in every epoch, from `first_tiles` to `sample_tiles`, or to the
    longest bag.

    Args:
        spec: of the whole training.
        longest: tiles of the largest bag.
        progress: share of the epochs that is done.
    """
    if spec.first_tiles is None or progress >= spec.grow_share:
        return spec
    last = min(longest, spec.sample_tiles or longest)
    first = min(spec.first_tiles, last)
    now = round(first * (last / first) ** (progress / spec.grow_share))
    return spec.model_copy(update={"sample_tiles": now})


def leave_out(
    rows: NDArray[np.int64] | None, length: int, share: float, *, key: Key
) -> NDArray[np.int64] | None:
    """Return the rows without a share of them, each by its own draw, but never without all.

    Args:
        rows: (n,) of a bag, None for all of them.
        length: tiles of the bag.
        share: that is left out.
        key: of the draw.
    """
    if not share:
        return rows
    rows = np.arange(length) if rows is None else rows
    drawn = np.random.default_rng(_entropy(key, _DROPPED)).random(len(rows))
    kept = drawn >= share
    kept[np.argmax(drawn)] = True
    return rows[kept]


def disturb(features: Tensor, *, dropout: float, noise: float, key: Key) -> Tensor:
    """Return features (n, D) with elements dropped and Gaussian noise added.

    Args:
        features: on the CPU.
        dropout: share of elements set to zero; the others grow to keep the sum.
        noise: standard deviation, in units of the bag's own.
        key: of the draw.
    """
    if not dropout and not noise:
        return features
    words = np.random.SeedSequence(_entropy(key, _NOISE)).generate_state(2, np.uint32)
    generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
    found = features.float()
    if noise:
        drawn = torch.randn(found.shape, generator=generator)
        found = found + drawn * (noise * found.std() if found.numel() > 1 else noise)
    if dropout:
        kept = torch.rand(found.shape, generator=generator) >= dropout
        found = found * kept / (1 - dropout)
    return found


def _entropy(key: Key, purpose: int) -> list[int]:
    seed, step, case_id, turn = key
    return [seed, step, key_of(case_id), turn, purpose]
