"""Nuclei, drawn one by one: outline, rim, chromatin, nucleoli.

Tumour nuclei are larger, of uneven outline and size, with coarse clumped chromatin, cleared
between the clumps, and nucleoli; their mean absorbance is lower, so that a denser crowd of them
leaves the mean colour where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.wsi.synthetic.noise import ramp, smooth_noise
from bagscope.wsi.synthetic.tissue_texture import ANGLES, REFERENCE_MPP, Stamp

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class NucleusKind:
    """How one kind of nucleus looks.

    Attributes:
        length_um, width_um: full axes.
        size_spread, shape_spread: relative spread of the axes, and of the outline's radius.
        body, rim: haematoxylin bytes inside and along the membrane.
        clump_um, clump: size of the chromatin's grain, and its amplitude in bytes.
        nucleoli: mean number of nucleoli.
        variants: how many are drawn (per angle where `oriented`).
        oriented: drawn at `ANGLES` orientations instead of a random one.
    """

    length_um: float
    width_um: float
    size_spread: float
    shape_spread: float
    body: float
    rim: float
    clump_um: float
    clump: float
    nucleoli: float
    variants: int
    oriented: bool = False


KINDS = {
    "fibroblast": NucleusKind(
        length_um=12,
        width_um=2.8,
        size_spread=0.22,
        shape_spread=0.06,
        body=112,
        rim=22,
        clump_um=0.5,
        clump=16,
        nucleoli=0,
        variants=8,
        oriented=True,
    ),
    "columnar": NucleusKind(
        length_um=8.6,
        width_um=4.6,
        size_spread=0.12,
        shape_spread=0.04,
        body=96,
        rim=26,
        clump_um=0.5,
        clump=15,
        nucleoli=0.3,
        variants=6,
        oriented=True,
    ),
    "lymphocyte": NucleusKind(
        length_um=6.0,
        width_um=5.4,
        size_spread=0.10,
        shape_spread=0.04,
        body=128,
        rim=18,
        clump_um=0.8,
        clump=26,
        nucleoli=0,
        variants=48,
    ),
    "tumor": NucleusKind(
        length_um=10.4,
        width_um=8.0,
        size_spread=0.20,
        shape_spread=0.09,
        body=44,
        rim=38,
        clump_um=0.55,
        clump=17,
        nucleoli=1.3,
        variants=96,
    ),
}


def draw_nuclei() -> dict[str, list[Stamp]]:
    """Return the stamps of every kind at the reference resolution."""
    import numpy as np

    stamps = {}
    for index, (name, kind) in enumerate(KINDS.items()):
        rng = np.random.default_rng([21, index])
        grain = smooth_noise(rng, 512, 512, *(2 * [kind.clump_um / REFERENCE_MPP]))
        angles = np.arange(ANGLES) * np.pi / ANGLES if kind.oriented else None
        stamps[name] = [
            _draw(rng, kind, grain, float(angle))
            for _ in range(kind.variants)
            for angle in (rng.uniform(0, np.pi, 1) if angles is None else angles)
        ]
    return stamps


def _draw(
    rng: np.random.Generator, kind: NucleusKind, grain: NDArray[np.float32], angle: float
) -> Stamp:
    import numpy as np

    factor = float(np.exp(rng.normal(0, kind.size_spread)))
    half_l = kind.length_um / 2 * factor / REFERENCE_MPP
    half_w = kind.width_um / 2 * factor**0.7 * rng.uniform(0.88, 1.12) / REFERENCE_MPP
    reach = int(np.ceil(max(half_l, half_w) * 1.25)) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = -x * np.sin(angle) + y * np.cos(angle)
    # A slight bend keeps long nuclei from looking ruled.
    across = across - rng.normal(0, 0.10) * along**2 / half_l
    theta = np.arctan2(across / half_w, along / half_l)
    outline = 1 + sum(
        rng.normal(0, kind.shape_spread / k) * np.cos(k * theta + rng.uniform(0, 6.3))
        for k in (2, 3, 4)
    )
    radius = np.sqrt((along / half_l) ** 2 + (across / half_w) ** 2) / outline
    depth_px = (1 - radius) * min(half_l, half_w)
    inside = ramp(depth_px.astype(np.float32), -0.9, 1.3)
    rim = np.exp(-(((depth_px - 1.2) / 1.5) ** 2))
    oy, ox = rng.integers(0, grain.shape[0] - 2 * reach - 1, 2)
    chromatin = grain[oy : oy + 2 * reach + 1, ox : ox + 2 * reach + 1]
    body = kind.body * rng.uniform(0.75, 1.25) + kind.clump * chromatin + kind.rim * rim
    for _ in range(rng.poisson(kind.nucleoli)):
        spot, turn = rng.uniform(0, 0.5), rng.uniform(0, 6.3)
        ny = spot * half_w * np.sin(turn)
        nx = spot * half_l * np.cos(turn)
        size = rng.uniform(2.0, 3.6)
        body = body + 70 * np.exp(-((along - nx) ** 2 + (across - ny) ** 2) / size**2)
    h = np.clip(np.rint(body * inside), 0, 230).astype(np.uint8)
    marker = np.clip(90 * inside + 0.9 * h, 0, 230) * (inside > 0.1)
    return Stamp(h=h, e=marker.astype(np.uint8), opaque=None)
