"""What the training features look like: to bring tiles to one scale, and to know what is unlike.

Means and standard deviations of tiles, and of the bags' means, in one pass over the training part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope.errors import ArtifactError
from bagscope.mil.sources import BagSource

_FEW = 1e-12
_ROWS = 128
"""So many at a time that what is float64 stays in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureStatistics:
    """Of the training features, float64; NaN where nobody here has seen them.

    Attributes:
        mean: (D,) over tiles.
        std: (D,) over tiles.
        bag_mean: (D,) over the bags' means.
        bag_std: (D,) over the bags' means.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    bag_mean: NDArray[np.float64]
    bag_std: NDArray[np.float64]

    @classmethod
    def unknown(cls, width: int) -> FeatureStatistics:
        """Return what is known of features of a width that were never seen: nothing."""
        return cls(**{name: np.full(width, np.nan) for name in cls.__slots__})

    @property
    def is_known(self) -> bool:
        """Return whether the training features were seen."""
        return not bool(np.isnan(self.mean).any())

    def tensors(self) -> dict[str, Tensor]:
        """Return the numbers as tensors, by name."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in self.__slots__}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> FeatureStatistics:
        """Return what `tensors` took apart."""
        return cls(**{name: tensors[name].double().numpy() for name in cls.__slots__})


def statistics_of(source: BagSource) -> FeatureStatistics:
    """Return the statistics of a source's bags; reads each once.

    Raises:
        ArtifactError: features that are no numbers; names the case.
    """
    width = source.dimension
    count, mean, spread = 0, np.zeros(width), np.zeros(width)
    bag_means = np.empty((len(source.cases), width))
    for place in range(len(source.cases)):
        tiles = source.read(place).features
        with np.errstate(invalid="ignore"):
            here, spread_here = _moments(tiles)
        if not np.isfinite(here).all():
            raise ArtifactError(
                f"{source.cases[place].case_id}: {int((~np.isfinite(tiles)).any(axis=1).sum())} of "
                f"{len(tiles)} tiles have features that are no finite numbers; extract them anew"
            )
        bag_means[place] = here
        # Means and sums of squares are joined bag by bag: nothing cancels, nothing is kept.
        joined = count + len(tiles)
        apart = here - mean
        spread += spread_here + apart**2 * count * len(tiles) / joined
        mean += apart * len(tiles) / joined
        count = joined
    return FeatureStatistics(
        mean=mean,
        std=np.sqrt(spread / max(1, count)),
        bag_mean=bag_means.mean(axis=0),
        bag_std=bag_means.std(axis=0),
    )


def _moments(tiles: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean and the sum of squares about it, (D,) each, of tiles (n, D)."""
    shift = tiles[:_ROWS].mean(axis=0, dtype=np.float64)  # so near the mean that nothing cancels
    total, squares = np.zeros(tiles.shape[1]), np.zeros(tiles.shape[1])
    for start in range(0, len(tiles), _ROWS):
        block = tiles[start : start + _ROWS].astype(np.float64)
        block -= shift
        total += block.sum(axis=0)
        block *= block
        squares += block.sum(axis=0)
    apart = total / len(tiles)
    return shift + apart, np.maximum(squares - total * apart, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Brings tiles to mean 0 and standard deviation 1: float32, (D,)."""

    shift: Tensor
    factor: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Return features (n, D) brought to scale; a dimension that never changed becomes zero."""
        return (features.float() - self.shift) * self.factor


def scale_of(statistics: FeatureStatistics) -> Scale:
    """Return the scale that takes the training tiles to mean 0 and standard deviation 1."""
    std = statistics.std
    factor = np.where(std > _FEW, 1 / np.maximum(std, _FEW), 0.0)
    return Scale(
        shift=torch.from_numpy(statistics.mean).float(), factor=torch.from_numpy(factor).float()
    )
