"""Bring a tumour's mean colour to that of the tissue it replaces.

A slide's tumour must be told by its nuclei and not by its tint. The same places are drawn twice,
with the tumour and as if it were not there; two factors on the tumour's stain concentrations and a
shift of a few grey levels then make the mean colours equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.wsi.synthetic.layout import FIELD_STEP_UM
from bagscope.wsi.synthetic.render import Window, render_concentrations

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.synthetic.layout import Layout
    from bagscope.wsi.synthetic.stain import Palette
    from bagscope.wsi.synthetic.tissue_texture import TissueKit

_SAMPLES = 10
_SAMPLE_PX = 320
_STEPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TumorBalance:
    """What is done to the tumour's pixels.

    Attributes:
        h_factor, e_factor: on the two concentrations.
        shift_rgb: added to the colours afterwards, (3,) float32 grey levels.
    """

    h_factor: float
    e_factor: float
    shift_rgb: NDArray[np.float32]


def balance_tumor(layout: Layout, kit: TissueKit, palette: Palette, seed: int) -> TumorBalance:
    """Return the factors and the shift that make the tumour's mean colour that of the tissue."""
    import numpy as np

    drawn, wanted, weights = _sample_pairs(layout, kit, palette, np.random.default_rng([5, seed]))
    if not len(weights):
        return TumorBalance(h_factor=1, e_factor=1, shift_rgb=np.zeros(3, np.float32))
    target = np.average(wanted, axis=0, weights=weights)

    def mean_rgb(factors: NDArray[np.float64]) -> NDArray[np.float64]:
        h, e = (np.clip(np.rint(drawn[:, i] * factors[i]), 0, 255).astype(np.uint8) for i in (0, 1))
        return np.average(palette.colours(h, e), axis=0, weights=weights)

    factors = np.ones(2)
    for _ in range(_STEPS):
        here = mean_rgb(factors)
        slope = np.stack([(mean_rgb(factors + d) - here) / 0.05 for d in 0.05 * np.eye(2)], axis=1)
        change = np.linalg.lstsq(slope, target - here, rcond=None)[0]
        factors = np.clip(factors + np.clip(change, -0.2, 0.2), 0.6, 1.5)
    return TumorBalance(
        h_factor=float(factors[0]),
        e_factor=float(factors[1]),
        shift_rgb=(target - mean_rgb(factors)).astype(np.float32),
    )


def _sample_pairs(
    layout: Layout, kit: TissueKit, palette: Palette, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """Return tumour pixels as (h, e), their colours had there been no tumour, and weights."""
    import numpy as np

    fields = layout.fields
    places = np.flatnonzero((fields.tumor_um > 0) & (fields.depth_um > 10))
    drawn, wanted, weights = [], [], []
    for place in rng.choice(places, min(_SAMPLES, len(places)), replace=False):
        row, column = divmod(int(place), fields.depth_um.shape[1])
        window = Window(
            x_l0=round(column * FIELD_STEP_UM / kit.mpp) - _SAMPLE_PX // 2,
            y_l0=round(row * FIELD_STEP_UM / kit.mpp) - _SAMPLE_PX // 2,
            width_px=_SAMPLE_PX,
            height_px=_SAMPLE_PX,
        )
        h, e, weight = render_concentrations(layout, kit, window)
        if weight is None:
            continue
        plain_h, plain_e, _ = render_concentrations(layout, kit, window, with_tumor=False)
        inside = weight > 0.99
        drawn.append(np.stack([h[inside], e[inside]], axis=1)[::3])
        wanted.append(palette.colours(plain_h[inside], plain_e[inside])[::3])
        weights.append(np.ones(len(drawn[-1])))
    if not drawn:
        nothing = np.zeros((0, 3), np.uint8)
        return nothing, nothing, np.zeros(0)
    return np.concatenate(drawn), np.concatenate(wanted), np.concatenate(weights)
