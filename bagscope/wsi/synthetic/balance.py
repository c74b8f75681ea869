"""Bring a tumour's mean colour to that of the tissue around it.

A slide's tumour must be told by its nuclei and not by its tint. Places inside the tumour and inside
the slide's other tissue are drawn; two factors on the tumour's stain concentrations and a shift of
a few grey levels then make the mean colours equal.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.wsi.synthetic.layout import FIELD_STEP_UM
from bagscope.wsi.synthetic.render import Window, render_concentrations
from bagscope.wsi.synthetic.tissue_texture import REFERENCE_MPP

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.synthetic.layout import Layout
    from bagscope.wsi.synthetic.stain import Palette
    from bagscope.wsi.synthetic.tissue_texture import TissueKit

_SAMPLES = 64
_SAMPLE_PX = 256
_INSIDE_UM = 0.75 * _SAMPLE_PX * REFERENCE_MPP
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

    rng = np.random.default_rng([5, seed])
    fields = layout.fields
    inside = np.minimum(fields.depth_um - _INSIDE_UM, fields.tumor_um)
    around = np.minimum(fields.depth_um - _INSIDE_UM, -fields.tumor_um - _INSIDE_UM)
    tumor = _pixels(layout, kit, inside, rng, tumor=True)
    other = _pixels(layout, kit, around, rng, tumor=False)
    if not len(tumor) or not len(other):
        return TumorBalance(h_factor=1, e_factor=1, shift_rgb=np.zeros(3, np.float32))
    target = palette.colours(other[:, 0], other[:, 1]).mean(axis=0)

    def mean_rgb(factors: NDArray[np.float64]) -> NDArray[np.float64]:
        h, e = (np.clip(np.rint(tumor[:, i] * factors[i]), 0, 255).astype(np.uint8) for i in (0, 1))
        return np.asarray(palette.colours(h, e).mean(axis=0), np.float64)

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


def _pixels(
    layout: Layout,
    kit: TissueKit,
    where: NDArray[np.floating],
    rng: np.random.Generator,
    *,
    tumor: bool,
) -> NDArray[np.uint8]:
    """Return pixels as (N, 2) concentrations, of windows whose centres have `where` above 0."""
    import numpy as np

    places = np.flatnonzero(where > 0)
    found = [np.zeros((0, 2), np.uint8)]
    # Evenly from top to bottom, so that few windows stand for the whole slide.
    strata = np.linspace(0, len(places), min(_SAMPLES, len(places)) + 1).astype(int)
    for first, last in itertools.pairwise(strata.tolist()):
        place = int(places[rng.integers(first, last)])
        row, column = divmod(place, where.shape[1])
        window = Window(
            x_l0=round(column * FIELD_STEP_UM / kit.mpp) - _SAMPLE_PX // 2,
            y_l0=round(row * FIELD_STEP_UM / kit.mpp) - _SAMPLE_PX // 2,
            width_px=_SAMPLE_PX,
            height_px=_SAMPLE_PX,
        )
        h, e, weight = render_concentrations(layout, kit, window)
        share = np.zeros(h.shape) if weight is None else weight
        keep = share > 0.99 if tumor else share < 0.01
        found.append(np.stack([h[keep], e[keep]], axis=1)[::3])
    return np.concatenate(found)
