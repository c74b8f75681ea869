"""The statistics of the encoder color-texture: see `color_texture`, which says what they are.

Pixel values are whole numbers 0 ... 255 in float32, so that their sums are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

EDGE_PX = 128
_PIXELS = EDGE_PX**2
DIMENSION = 126

# Optical density of haematoxylin, eosin and remainder (rows) in red, green, blue: the vectors of
# Ruifrok and Johnston, with DAB as the remainder.
_RUIFROK = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_STEPS = 64
_LEVELS = 255

_HAEMATOXYLIN_EDGES = (0, 8, 16, 28, 44, 72, 160)
_PALE_EDGES = (0, 5, 10, 16, 23, 32, 64)
_GREY_EDGES = (0, 43, 85, 128, 170, 213, _LEVELS)
_STEP_EDGES = (0, 4, 12, 32, 96)
_PARTS = 4
_DEVIATION_EDGES = (0, 2 * _PARTS, 6 * _PARTS, 16 * _PARTS, 48 * _PARTS)
# Differences of so few levels are noise and no pattern.
_FLAT = 3
# Halvings of the resolution. At full resolution, patterns are those of noise and JPEG.
_STEP_SCALES = (0, 1, 2)
_PATTERN_SCALES = (1, 2, 3)
_BANDS = 5

# So many tiles are worked on at a time that their planes need no fresh memory.
_GROUP = 16


class ColorTexture(nn.Module):
    """Colour and texture statistics of (B, 3, 128, 128) RGB in 0 ... 1: (B, 126) float32."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the vectors.

        Raises:
            ValueError: images of another size.
        """
        if images.ndim != 4 or images.shape[1:] != (3, EDGE_PX, EDGE_PX):
            raise ValueError(f"images are {tuple(images.shape)}; pass (B, 3, {EDGE_PX}, {EDGE_PX})")
        if not len(images):
            return images.new_zeros((0, DIMENSION), dtype=torch.float32)
        return torch.cat([_vectors(group) for group in torch.split(images, _GROUP)])


def _vectors(images: Tensor) -> Tensor:
    planes = _planes(images)
    parts = [*_colour(planes)]
    scaled = planes[:, 1:4]
    squares = [_mean_squares(scaled)]
    for scale in range(_BANDS):
        if scale in _STEP_SCALES:
            parts += _steps(scaled[:, :2])
        if scale in _PATTERN_SCALES:
            parts.append(_pattern(scaled[:, :2]))
        scaled = _sum_2x2(scaled).mul_(1 / 4).round_()
        squares.append(_mean_squares(scaled))
    parts += [(fine - coarse).clamp_min(0).sqrt() / 64 for fine, coarse in pairwise(squares)]
    return torch.cat([part.float() for part in parts], dim=1)


def _planes(images: Tensor) -> Tensor:
    """Return (B, 5, h, w): saturation, brightness, haematoxylin, eosin, remainder."""
    grey = images.float().mul(_LEVELS).round_().contiguous()
    red, green, blue = grey.unbind(1)
    planes = torch.empty((len(images), 5, *images.shape[2:]), device=images.device)
    density = (grey + 1).mul_(1 / (_LEVELS + 1)).log_().mul_(-_STEPS).round_()
    for plane, weights in zip((2, 3, 4), _unmixing(), strict=True):
        amount = planes[:, plane]
        torch.mul(density[:, 0], weights[0], out=amount)
        amount.add_(density[:, 1], alpha=weights[1]).add_(density[:, 2], alpha=weights[2])
        amount.mul_(1 / _STEPS).round_().clamp_(0, _LEVELS)
    torch.add(red, green, out=planes[:, 1]).add_(blue).mul_(1 / 3).round_()
    highest = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    torch.sub(highest, lowest, out=planes[:, 0])
    return planes


def _unmixing() -> list[list[int]]:
    """Return what each stain takes of the densities of red, green, blue, in steps of 1/64.

    Whole numbers, so that the sum is exact.
    """
    stains = torch.tensor(_RUIFROK, dtype=torch.float64)
    stains /= torch.linalg.vector_norm(stains, dim=1, keepdim=True)
    weights = torch.linalg.inv(stains).T.mul(_STEPS).round()
    return [[int(weight) for weight in row] for row in weights.tolist()]


def _colour(planes: Tensor) -> Iterator[Tensor]:
    # Every other row says as much of how the colours are spread, in half the time.
    rows = planes[:, :, ::2]
    yield _spread(rows[:, :2].contiguous(), _GREY_EDGES)
    yield _spread(rows[:, 2:3].contiguous(), _HAEMATOXYLIN_EDGES)
    yield _spread(rows[:, 3:].contiguous(), _PALE_EDGES)
    mean = _total(planes) / _PIXELS
    deviation = (_mean_squares(planes) - mean**2).clamp_min(0).sqrt()
    yield deviation / 64
    haematoxylin = planes[:, 2:3]
    for first in (0, 3):
        other = slice(first, first + 2)
        together = _total(planes[:, other] * haematoxylin) / _PIXELS - mean[:, other] * mean[:, 2:3]
        # One level of noise is added to each, so that a flat tile has no correlation.
        yield together / ((deviation[:, other] + 1) * (deviation[:, 2:3] + 1))


def _steps(planes: Tensor) -> Iterator[Tensor]:
    right, down = _differences(planes)
    step = torch.maximum(right[..., 1:, :].abs_(), down[..., 1:].abs_())
    yield _spread(step, _STEP_EDGES)
    yield _spread(_local_deviation(planes), _DEVIATION_EDGES)


def _local_deviation(planes: Tensor) -> Tensor:
    """Return the standard deviation in each square of 4 × 4 pixels, in quarters of a level."""
    total = _sum_2x2(_sum_2x2(planes))
    squares = _sum_2x2(_sum_2x2(planes * planes))
    # Whole numbers below 2²⁴ up to the root, which IEEE 754 rounds exactly.
    variance = squares.mul_(16).sub_(total.mul_(total))
    return variance.sqrt_().mul_(_PARTS / 16).round_()


def _pattern(planes: Tensor) -> Tensor:
    """Return how often a pixel clearly exceeds 1, 2, 3, 4 of its 4 neighbours."""
    right, down = _differences(planes)
    right, down = right[..., 1:-1, :], down[..., 1:-1]
    # clamp(d, t, t + 1) − t is 1 where a whole number d is above t, else 0.
    over, under = (_FLAT, _FLAT + 1), (-_FLAT - 1, -_FLAT)
    count = right[..., :-1].clamp(*over).sub_(right[..., 1:].clamp(*under))
    count.add_(down[..., :-1, :].clamp(*over)).sub_(down[..., 1:, :].clamp(*under))
    return _spread(count.sub_(4 * _FLAT), range(5))


def _differences(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Return each right neighbour less the pixel, (..., h, w − 1), and each lower one."""
    return planes[..., 1:] - planes[..., :-1], planes[..., 1:, :] - planes[..., :-1, :]


def _sum_2x2(planes: Tensor) -> Tensor:
    # Average pooling works pixel by pixel on a CPU; this is eight times as fast.
    rows = planes[..., ::2, :] + planes[..., 1::2, :]
    return rows[..., ::2] + rows[..., 1::2]


def _spread(planes: Tensor, edges: Sequence[int]) -> Tensor:
    """Return (B, K · ranges) float64: how the whole numbers of (B, K, h, w) fill each range."""
    pixels = math.prod(planes.shape[2:])
    filled = [
        (planes.clamp(low, high).sum((2, 3)).double() / pixels - low) / (high - low)
        for low, high in pairwise(edges)
    ]
    return torch.cat(filled, dim=1)


def _total(planes: Tensor) -> Tensor:
    """Return (B, K) float64 sums of (B, K, h, w) whole numbers up to 2¹⁷."""
    return planes.sum(3).double().sum(2)


def _mean_squares(planes: Tensor) -> Tensor:
    return _total(planes * planes) / math.prod(planes.shape[2:])
