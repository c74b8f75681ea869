"""Stain normalisation: tiles of any laboratory in the colours of one.

Macenko et al., ISBI 2009. With the optical density OD = −ln((I + 1) / 240) per channel, the pixels
of tissue span a plane; the directions at the 1st and 99th percentile of the angle inside that plane
are eosin and haematoxylin. The concentrations of both, scaled so that their 99th percentiles are
the reference's, are rendered with the reference's stains.

Reinhard et al., IEEE CG&A 2001. Mean and standard deviation of each channel of CIE L*a*b* (D65)
become the reference's. They are taken over the tissue; paler pixels move the less, the paler they
are, so that glass stays glass.

Each tile stands alone, and tiles with little tissue come back as they are. Tissue is where the mean
optical density is at least 0.15: the threshold of Macenko et al., who don't say of which channel;
eosin hardly absorbs red, so that a threshold on every channel would drop it.

What decides about a byte does not depend on the order of a sum or on how a loop is cut: densities
are whole numbers of 1/1024, so that sums in float64 are exact, and float32 does only what
IEEE 754 rounds exactly, or else is rounded to steps that no error of a few units reaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NUMERICS = 1
"""Raised by hand whenever the same tiles would give other numbers."""

GLASS = 240.0
"""Light that bare glass lets through, in grey levels: of the authors' published code."""
TISSUE_OD = 0.15
MIN_TISSUE = 0.02
"""Tiles with a smaller part of tissue come back unchanged."""

MACENKO_STAINS = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))
"""Optical density of haematoxylin and eosin (columns) in red, green, blue: of the authors'
published code, used as the reference throughout the field."""
MACENKO_CONCENTRATIONS = (1.9705, 1.0308)
"""99th percentiles of both concentrations in the same reference."""
MACENKO_PERCENT = 1.0

REINHARD_MEAN = (61.0, 34.0, -10.0)
REINHARD_STD = (12.5, 7.5, 6.0)
"""L*, a*, b* of the tissue of bagscope's synthetic slides of site 0 (0.5 µm per pixel), rounded."""

_STEPS = 1024
# Of all numbers below 1024, the one whose steps end in colours farthest from a half.
_OUT_STEPS = 913
# Two stains closer than 2 degrees are one: its concentrations can't be told apart.
_MAX_COSINE = math.cos(math.radians(2))
_BINS = 4096
# So many pixels are worked on at a time: on a CPU, the planes then stay in the cache.
_GROUP_PIXELS_CPU = 2**17
_GROUP_PIXELS = 2**22

Normaliser = Callable[[Tensor], Tensor]


def stain_normaliser(method: str) -> Normaliser | None:
    """Return the function of a method, (B, h, w, 3) uint8 → the same; None for "none".

    Raises:
        ValueError: no such method.
    """
    methods: dict[str, Normaliser | None] = {
        "none": None,
        "macenko": macenko,
        "reinhard": reinhard,
    }
    if method not in methods:
        raise ValueError(f"no stain normalisation {method!r}; use one of {', '.join(methods)}")
    return methods[method]


def macenko(tiles: Tensor) -> Tensor:
    """Normalise (B, h, w, 3) uint8 tiles by their stains."""
    return _in_groups(tiles, _macenko)


def reinhard(tiles: Tensor) -> Tensor:
    """Normalise (B, h, w, 3) uint8 tiles by their colour statistics."""
    return _in_groups(tiles, _reinhard)


def _in_groups(tiles: Tensor, function: Normaliser) -> Tensor:
    count, height, width, _ = tiles.shape
    if not tiles.numel():
        return tiles.clone()
    planes = tiles.reshape(count, height * width, 3).permute(0, 2, 1)
    pixels = _GROUP_PIXELS_CPU if tiles.device.type == "cpu" else _GROUP_PIXELS
    size = max(1, pixels // (height * width))
    done = [function(group.contiguous()) for group in torch.split(planes, size)]
    return torch.cat(done).permute(0, 2, 1).reshape(tiles.shape)


def _densities(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, 3, P) float32 optical densities in whole steps, and three times their mean."""
    od = planes.to(torch.float32).add_(1).div_(GLASS).log_().mul_(-_STEPS).round_()
    return od, od[:, 0] + od[:, 1] + od[:, 2]


def _enough(tissue: Tensor) -> Tensor:
    """Return (B,) whether enough of (B, P) pixels are tissue."""
    return tissue.sum(1) >= max(2.0, MIN_TISSUE * tissue.shape[1])


# --- Macenko --------------------------------------------------------------------------------


def _macenko(planes: Tensor) -> Tensor:
    od, total = _densities(planes)
    tissue = total >= 3 * TISSUE_OD * _STEPS
    enough = _enough(tissue)
    stains = _stain_vectors(od, tissue, enough)
    h, e = stains[:, :, 0], stains[:, :, 1]
    cosine = (h * e).sum(1)
    usable = enough & (cosine < _MAX_COSINE)
    # Least squares for two columns of length 1, written out: batched solvers may depend on the
    # size of the batch.
    free = 1 - torch.where(usable, cosine, 0) ** 2
    solve_h = (h - cosine[:, None] * e) / free[:, None]
    solve_e = (e - cosine[:, None] * h) / free[:, None]
    everywhere = torch.ones_like(tissue)
    tops = [
        _percentile(_projected(od, solve.float()), everywhere, 100 - MACENKO_PERCENT)
        for solve in (solve_h, solve_e)
    ]
    usable &= (tops[0] > 0) & (tops[1] > 0)
    reference = torch.tensor(MACENKO_STAINS, dtype=torch.float64, device=od.device)
    change = torch.zeros(len(od), 3, 3, dtype=torch.float64, device=od.device)
    for i, solve in enumerate((solve_h, solve_e)):
        factor = MACENKO_CONCENTRATIONS[i] * _STEPS / torch.where(usable, tops[i], 1)
        change += reference[:, i, None] * (solve * factor[:, None])[:, None, :]
    change = torch.where(usable[:, None, None], change, 0).float()
    out = torch.empty_like(planes)
    for channel in range(3):
        density = _projected(od, change[:, channel]).mul_(_OUT_STEPS / _STEPS).round_()
        light = density.mul_(-1 / _OUT_STEPS).exp_().mul_(GLASS)
        out[:, channel] = light.round_().clamp_(0, 255).to(torch.uint8)
    return torch.where(usable[:, None, None], out, planes)


def _stain_vectors(od: Tensor, tissue: Tensor, enough: Tensor) -> Tensor:
    """Return (B, 3, 2) float64 unit vectors of haematoxylin and eosin.

    The plane is that of the two largest principal components. Angles are measured from the mean
    density inside it, so that neither the signs nor the order of the components matter.
    """
    count = tissue.sum(1).clamp_min(1).double()
    inside = (od * tissue[:, None]).double()
    mean = inside.sum(2) / count[:, None]
    products = inside @ inside.transpose(1, 2)
    covariance = products / count[:, None, None] - mean[:, :, None] * mean[:, None, :]
    identity = torch.eye(3, dtype=torch.float64, device=od.device)
    covariance = torch.where(enough[:, None, None], covariance, identity)
    normal = torch.linalg.eigh(covariance).eigenvectors[:, :, 0]
    first = _unit(mean - (mean * normal).sum(1, keepdim=True) * normal)
    second = torch.linalg.cross(normal, first)
    second = torch.where(second[:, :1] < 0, -second, second)
    along, across = _projected(od, first.float()), _projected(od, second.float())
    low, high = (
        _direction(_percentile(_angle(along, across), tissue, percent), first, second)
        for percent in (MACENKO_PERCENT, 100 - MACENKO_PERCENT)
    )
    # Of the two stains, haematoxylin is the one that absorbs red.
    swap = (low[:, 0] > high[:, 0])[:, None]
    return torch.stack([torch.where(swap, low, high), torch.where(swap, high, low)], dim=2)


def _angle(along: Tensor, across: Tensor) -> Tensor:
    """Return what grows with the angle, −2 to 2, 1 at a right angle: division is exact, atan isn't.

    It is the way along a square's edge rather than along the circle.
    """
    way = across / (along.abs() + across.abs()).clamp_min_(1e-6)
    return torch.where(along < 0, torch.copysign(torch.full_like(way, 2), across) - way, way)


def _direction(way: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return (B, 3) unit vectors of (B,) results of `_angle`."""
    across = torch.where(way.abs() <= 1, way, torch.copysign(2 - way.abs(), way))
    along = 1 - way.abs()
    return _unit(along[:, None] * first + across[:, None] * second)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / (vectors**2).sum(1, keepdim=True).sqrt().clamp_min(1e-12)


def _projected(planes: Tensor, weights: Tensor) -> Tensor:
    """Return (B, P), the sum of (B, 3, P) over channels with (B, 3) float32 weights."""
    total = planes[:, 0] * weights[:, 0, None]
    total += planes[:, 1] * weights[:, 1, None]
    total += planes[:, 2] * weights[:, 2, None]
    return total


def _percentile(values: Tensor, where: Tensor, percent: float) -> Tensor:
    """Return (B,) float64 percentiles of (B, P) float32 values, by a histogram of each row.

    Between the lowest and the highest value lie `_BINS` bins; inside a bin, values are taken as
    evenly spread.
    """
    high = torch.where(where, values, -torch.inf).amax(1, keepdim=True)
    low = torch.where(where, values, torch.inf).amin(1, keepdim=True)
    none = ~(high >= low)
    low, high = low.masked_fill(none, 0), high.masked_fill(none, 0)
    width = ((high - low) / _BINS).clamp_min(1e-9)
    bins = ((values - low) / width).clamp_(0, _BINS - 1).to(torch.int32)
    bins = torch.where(where, bins, _BINS)
    rows = torch.arange(len(values), device=values.device, dtype=torch.int32)[:, None]
    flat = (bins + rows * (_BINS + 1)).reshape(-1)
    counts = torch.bincount(flat, minlength=len(values) * (_BINS + 1))
    counts = counts.view(len(values), _BINS + 1)[:, :_BINS]
    upto = counts.cumsum(1)
    rank = (percent / 100) * (upto[:, -1:] - 1).clamp_min(0).double()
    index = torch.searchsorted(upto.double(), rank, right=True).clamp_max(_BINS - 1)
    here = counts.gather(1, index).clamp_min(1).double()
    before = upto.gather(1, index).double() - here
    inside = ((rank - before + 0.5) / here).clamp(0, 1)
    return (low.double() + (index + inside) * width.double())[:, 0]


# --- Reinhard -------------------------------------------------------------------------------

_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_FROM_XYZ = (
    (3.240479, -1.537150, -0.498535),
    (-0.969256, 1.875991, 0.041556),
    (0.055648, -0.204043, 1.057311),
)
_WHITE = (0.950456, 1.0, 1.088754)
_LINEAR_BELOW = 0.008856
_SLOPE = 7.787
_LAB_STEPS = 2.0**20


def _reinhard(planes: Tensor) -> Tensor:
    _, total = _densities(planes)
    limit = 3 * TISSUE_OD * _STEPS
    tissue = total >= limit
    enough = _enough(tissue)
    count = tissue.sum(1).clamp_min(1).double()
    weight = (total.double() / limit).clamp_(0, 1)
    changed = []
    for i, channel in enumerate(_lab(planes)):
        # Whole steps, whose sums are exact in any order.
        steps = (channel * _LAB_STEPS).round_() * tissue
        mean = steps.sum(1) / count / _LAB_STEPS
        centred = ((channel - mean[:, None]) * 2.0**11).round_() * tissue
        std = ((centred * centred).sum(1) / count).sqrt() / 2.0**11
        # A channel without spread has nothing to be stretched.
        factor = torch.where(std > 0.1, REINHARD_STD[i] / std.clamp_min(0.1), 1)
        target = (channel - mean[:, None]).mul_(factor[:, None]).add_(REINHARD_MEAN[i])
        changed.append(channel + (target - channel) * weight)
    return torch.where(enough[:, None, None], _rgb(changed), planes)


def _lab(planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return L*, a*, b* of (B, 3, P) bytes, each (B, P) float64."""
    grey = torch.arange(256, dtype=torch.float64, device=planes.device) / 255
    table = torch.where(grey > 0.04045, ((grey + 0.055) / 1.055) ** 2.4, grey / 12.92)
    linear = table[planes.to(torch.int32)]
    f = []
    for row, white in zip(_TO_XYZ, _WHITE, strict=True):
        t = linear[:, 0] * (row[0] / white)
        t += linear[:, 1] * (row[1] / white)
        t += linear[:, 2] * (row[2] / white)
        f.append(torch.where(t > _LINEAR_BELOW, t ** (1 / 3), _SLOPE * t + 16 / 116))
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


def _rgb(lab: list[Tensor]) -> Tensor:
    """Return (B, 3, P) bytes of L*, a*, b*; colours beyond the screen's are cut."""
    f_y = (lab[0] + 16) / 116
    xyz = []
    for f, white in zip((f_y + lab[1] / 500, f_y, f_y - lab[2] / 200), _WHITE, strict=True):
        cube = f * f * f
        xyz.append(torch.where(cube > _LINEAR_BELOW, cube, (f - 16 / 116) / _SLOPE) * white)
    channels = []
    for row in _FROM_XYZ:
        light = (xyz[0] * row[0] + xyz[1] * row[1] + xyz[2] * row[2]).clamp_(0, 1)
        curved = 1.055 * light.clamp_min(1e-9) ** (1 / 2.4) - 0.055
        grey = torch.where(light > 0.0031308, curved, 12.92 * light) * 255
        channels.append(grey.round_().clamp_(0, 255).to(torch.uint8))
    return torch.stack(channels, dim=1)
