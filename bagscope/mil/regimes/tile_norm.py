"""Batch norm over the tiles of a step: each feature to mean 0 and deviation 1, scaled and shifted.

Evaluation goes by running means, of which every step is a tenth. Unlike torch's module it keeps no
count of steps, a whole number that the mean of several epochs' weights could not be taken of.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_MOMENTUM = 0.1


class TileNorm(nn.Module):
    """Batch norm of tiles."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, features: Tensor) -> Tensor:
        """Return tiles (T, D) in their own dtype; training takes at least two of them."""
        found = functional.batch_norm(
            features.to(self.weight.dtype),
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=_MOMENTUM,
        )
        return found.to(features.dtype)
