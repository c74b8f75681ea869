"""From stain concentrations to colours, by the law of Beer and Lambert.

A pixel's light is glass · exp(−h · H − e · E), with h and e the concentrations of the two stains
and H, E their absorption per channel. Concentrations are bytes, `CONCENTRATION_STEP` each, so
that a table of 65,536 colours does the whole conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.synthetic.spec import Background, Stain

CONCENTRATION_STEP = 0.01
"""Natural absorbance per unit of a concentration byte, before a stain's own vector."""

_SITES = (
    # haematoxylin, second stain (eosin), glass
    ((0.74, 0.86, 0.42), (0.10, 0.78, 0.45), (244, 243, 244)),
    ((0.86, 0.80, 0.30), (0.05, 0.84, 0.27), (237, 239, 243)),
)
_DAB = (0.42, 0.83, 1.12)
_GLASS_GREY = 0.80


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """The colours of one laboratory and scanner.

    Attributes:
        table: (65536, 3) uint8 RGB, by haematoxylin byte · 256 + second stain's byte.
        glass: colour where there is no tissue.
        noise_sigma: the sensor's noise in grey levels.
    """

    table: NDArray[np.uint8]
    glass: tuple[int, int, int]
    noise_sigma: float

    def colours(self, h: NDArray[np.uint8], e: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return (height, width, 3) uint8 RGB of two maps of concentration bytes."""
        import numpy as np

        index = h.astype(np.uint16)
        index <<= 8
        index |= e
        return np.take(self.table, index, axis=0)


def site_palette(site: int, stain: Stain, background: Background) -> Palette:
    """Return the palette of a site; sites beyond the fixed ones are drawn from their number."""
    import numpy as np

    if site < len(_SITES):
        haematoxylin, eosin, glass = (np.array(v, np.float64) for v in _SITES[site])
    else:
        rng = np.random.default_rng([7, site])
        haematoxylin = np.array(_SITES[0][0]) * rng.uniform(0.82, 1.18, 3)
        eosin = np.array(_SITES[0][1]) * rng.uniform(0.75, 1.25, 3) * rng.choice([0.8, 1.2])
        glass = 242 + rng.uniform(-6, 4, 3)
    if background == "grey":
        glass = glass * _GLASS_GREY
    steps = np.arange(256) * CONCENTRATION_STEP
    second = steps[:, None] * eosin
    if stain == "dab":
        # DAB marks few structures: weak staining fades, strong staining turns brown.
        brown = np.clip((steps - 0.85) / 1.1, 0, None) * 1.5
        second = (
            brown[:, None] * np.array(_DAB) + 0.16 * np.minimum(steps, 1)[:, None] * haematoxylin
        )
    absorbance = (steps[:, None] * haematoxylin)[:, None, :] + second[None, :, :]
    table = np.clip(np.rint(glass * np.exp(-absorbance)), 0, 255).astype(np.uint8)
    red, green, blue = (round(float(channel)) for channel in glass)
    return Palette(
        table=table.reshape(-1, 3), glass=(red, green, blue), noise_sigma=1.6 + 0.5 * (site % 2)
    )
