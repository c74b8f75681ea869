"""Paint any window of a synthetic slide, as the scanner would have seen it."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import TYPE_CHECKING

from bagscope.wsi.synthetic.artefacts import (
    BLUR_SIGMA_UM,
    blurred,
    fold_factor,
    plan_artefacts,
    with_glass_artefacts,
)
from bagscope.wsi.synthetic.balance import balance_tumor
from bagscope.wsi.synthetic.layout import FIELD_STEP_UM, plan_layout
from bagscope.wsi.synthetic.render import FRAY_UM, Window, render_concentrations
from bagscope.wsi.synthetic.stain import site_palette
from bagscope.wsi.synthetic.tissue_texture import tissue_kit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.synthetic.spec import SyntheticSpec

NOISE_PERIOD_PX = 512
WINDOW_MAX_PX = 1024
"""Windows may be this wide and this high."""

_OPTICS_SIGMA_UM = 0.2
_SCAN_STEP_CELLS = 16
_UNSCANNED_GREY = 2


class SlidePainter:
    """Everything that is needed to paint one slide; painting is safe from several threads.

    Args:
        spec: the slide.
    """

    def __init__(self, spec: SyntheticSpec) -> None:
        import numpy as np

        self.spec = spec
        self.kit = tissue_kit(spec.mpp)
        self.layout = plan_layout(spec)
        self.palette = site_palette(spec.site, spec.stain, spec.background)
        self.artefacts = plan_artefacts(spec, self.layout.fields.depth_um)
        fields = self.layout.fields
        busy = (fields.depth_um > -3 * FRAY_UM) | self.artefacts.on_glass(fields.depth_um.shape)
        self._busy_sums = np.pad(busy.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        self._scanned = _scanned_cells(fields.depth_um) if spec.background == "black" else None
        self._balance = None
        if spec.tumor_fraction:
            self._balance = balance_tumor(self.layout, self.kit, self.palette, spec.seed)
        self._noise = _noise_tile(self.palette.noise_sigma)

    def paint(self, window: Window) -> NDArray[np.uint8]:
        """Return the pixels of a window: (height_px, width_px, 3) uint8 RGB."""
        import cv2
        import numpy as np

        if self._is_glass(window):
            shape = (window.height_px, window.width_px, 3)
            rgb = np.full(shape, self.palette.glass, np.uint8)
        else:
            sigma_px = _OPTICS_SIGMA_UM / self.spec.mpp
            margin = 4
            if self.artefacts.blur is not None:
                margin += int(3 * BLUR_SIGMA_UM / self.spec.mpp)
            wide = window.grown(margin)
            rgb = self._drawn(wide)
            if sigma_px > 0.25:
                rgb = np.asarray(cv2.GaussianBlur(rgb, (0, 0), sigma_px), np.uint8)
            if self.artefacts.blur is not None:
                rgb = blurred(rgb, self.artefacts.blur, wide, self.spec.mpp)
            rgb = np.ascontiguousarray(rgb[margin:-margin, margin:-margin])
            rgb = with_glass_artefacts(rgb, self.artefacts, window, self.spec.mpp)
        rgb = self._with_noise(rgb, window)
        if self._scanned is not None:
            rgb = np.where(self._scanned_px(window)[..., None], rgb, np.uint8(_UNSCANNED_GREY))
        return rgb

    def blank_key(self, window: Window) -> Hashable | None:
        """Return a key that equal-looking windows of bare glass share, or None for any other."""
        if not self._is_glass(window):
            return None
        phase = (window.x_l0 % NOISE_PERIOD_PX, window.y_l0 % NOISE_PERIOD_PX)
        if self._scanned is None:
            return phase
        scanned = self._scanned_px(window)
        if not scanned.any():
            return "unscanned"
        return phase if scanned.all() else None

    # --- tissue -------------------------------------------------------------------------

    def _drawn(self, window: Window) -> NDArray[np.uint8]:
        """Draw tissue object by object."""
        import cv2
        import numpy as np

        h, e, weight = render_concentrations(self.layout, self.kit, window)
        if weight is not None and self._balance is not None:
            factors = (self._balance.h_factor, self._balance.e_factor)
            h, e = (
                cv2.convertScaleAbs(c * (1 + (f - 1) * weight)).astype(np.uint8)
                for c, f in zip((h, e), factors, strict=True)
            )
        if self.artefacts.fold is not None:
            factor = fold_factor(self.artefacts.fold, window, self.spec.mpp)
            h, e = (np.clip(c * factor, 0, 255).astype(np.uint8) for c in (h, e))
        rgb = self.palette.colours(h, e)
        if weight is not None and self._balance is not None:
            shifted = rgb + weight[..., None] * self._balance.shift_rgb
            rgb = np.clip(np.rint(shifted), 0, 255).astype(np.uint8)
        return rgb

    # --- glass --------------------------------------------------------------------------

    def _is_glass(self, window: Window) -> bool:
        cell_px = FIELD_STEP_UM / self.spec.mpp
        rows, columns = (n - 1 for n in self._busy_sums.shape)

        def cell(position_px: int, limit: int, extra: int) -> int:
            return min(max(int(position_px // cell_px) + extra, 0), limit)

        top, left = cell(window.y_l0, rows, -1), cell(window.x_l0, columns, -1)
        bottom = cell(window.y_l0 + window.height_px, rows, 3)
        right = cell(window.x_l0 + window.width_px, columns, 3)
        sums = self._busy_sums
        return bool(
            sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left] == 0
        )

    def _scanned_px(self, window: Window) -> NDArray[np.bool_]:
        import numpy as np

        assert self._scanned is not None
        step_px = FIELD_STEP_UM * _SCAN_STEP_CELLS / self.spec.mpp
        rows, columns = (
            np.minimum(((start + np.arange(count)) // step_px).astype(np.intp), limit - 1)
            for start, count, limit in (
                (window.y_l0, window.height_px, self._scanned.shape[0]),
                (window.x_l0, window.width_px, self._scanned.shape[1]),
            )
        )
        return np.asarray(self._scanned[rows[:, None], columns], np.bool_)

    def _with_noise(self, rgb: NDArray[np.uint8], window: Window) -> NDArray[np.uint8]:
        import cv2
        import numpy as np

        y, x = window.y_l0 % NOISE_PERIOD_PX, window.x_l0 % NOISE_PERIOD_PX
        place = np.s_[y : y + window.height_px, x : x + window.width_px]
        brighter, darker = self._noise
        return np.asarray(cv2.subtract(cv2.add(rgb, brighter[place]), darker[place]), np.uint8)


def _scanned_cells(depth_um: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which squares of the scanner's raster were scanned: those near tissue."""
    import numpy as np

    near = depth_um > -120
    rows, columns = (-(-n // _SCAN_STEP_CELLS) for n in near.shape)
    padded = np.zeros((rows * _SCAN_STEP_CELLS, columns * _SCAN_STEP_CELLS), np.bool_)
    padded[: near.shape[0], : near.shape[1]] = near
    squares = padded.reshape(rows, _SCAN_STEP_CELLS, columns, _SCAN_STEP_CELLS)
    return np.asarray(squares.any(axis=(1, 3)))


@functools.lru_cache(maxsize=4)
def _noise_tile(sigma: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return what to add and what to take away, repeated far enough for any window."""
    import numpy as np

    rng = np.random.default_rng(23)
    shape = (NOISE_PERIOD_PX, NOISE_PERIOD_PX)
    shared = rng.normal(0, 0.8 * sigma, (*shape, 1))
    values = np.rint(shared + rng.normal(0, 0.6 * sigma, (*shape, 3)))
    repeats = 1 + -(-WINDOW_MAX_PX // NOISE_PERIOD_PX)
    both = (np.clip(values, 0, 40), np.clip(-values, 0, 40))
    brighter, darker = (np.tile(v.astype(np.uint8), (repeats, repeats, 1)) for v in both)
    return brighter, darker
