"""What goes wrong between the microtome and the scanner: pen, folds, blur, bubbles.

Each is planned as a field over the slide (see `layout` for the frame) and applied to the pixels of
a window. Pen lies on the glass, wherever tissue is or not; folds and blur matter only in tissue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.wsi.synthetic.layout import FIELD_STEP_UM
from bagscope.wsi.synthetic.noise import ramp, smooth_noise
from bagscope.wsi.synthetic.render import interpolated

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.synthetic.render import Window
    from bagscope.wsi.synthetic.spec import PenColour, SyntheticSpec

BLUR_SIGMA_UM = 2.2
_PEN_LIGHT: dict[PenColour, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.22),
    "green": (0.10, 0.52, 0.28),
    "blue": (0.12, 0.22, 0.66),
    "black": (0.10, 0.10, 0.12),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefacts:
    """The artefacts of one slide; a field is None where the slide has none of its kind.

    Attributes:
        pens: (colour's transmittance, coverage 0 to 1) per stroke colour.
        fold: how much the tissue lies double, 0 to 1.
        blur: weight of the out-of-focus picture, 0 to 1.
        bubbles_um: (N, 3) x, y and radius.
    """

    pens: tuple[tuple[tuple[float, float, float], NDArray[np.float32]], ...]
    fold: NDArray[np.float32] | None
    blur: NDArray[np.float32] | None
    bubbles_um: NDArray[np.float32]

    def on_glass(self, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return the field cells that show something even where there is no tissue."""
        import numpy as np

        busy = np.zeros(shape, np.bool_)
        for _, coverage in self.pens:
            busy |= coverage > 0.004
        y, x = np.mgrid[0 : shape[0], 0 : shape[1]] * FIELD_STEP_UM
        for x_um, y_um, radius_um in self.bubbles_um.tolist():
            busy |= np.hypot(x - x_um, y - y_um) < radius_um + 40
        return busy


def plan_artefacts(spec: SyntheticSpec, depth_um: NDArray[np.float32]) -> Artefacts:
    """Draw the artefacts that a spec asks for."""
    import numpy as np

    rng = np.random.default_rng([6, spec.seed])
    edge_um = min(depth_um.shape) * FIELD_STEP_UM
    tissue = np.argwhere(depth_um > 0.3 * depth_um.max())
    pens = tuple((_PEN_LIGHT[c], _pen_stroke(rng, depth_um, tissue, edge_um)) for c in spec.pen)
    fold = _folds(rng, depth_um, tissue, edge_um, spec.folds) if spec.folds else None
    blur = _spots(rng, depth_um, tissue, edge_um, spec.blur) if spec.blur else None
    places = tissue[rng.integers(0, len(tissue), spec.bubbles)] * FIELD_STEP_UM
    radii = np.clip(edge_um * rng.uniform(0.04, 0.10, spec.bubbles), 30, 600)
    bubbles = np.stack([places[:, 1], places[:, 0], radii], axis=1).astype(np.float32)
    return Artefacts(pens=pens, fold=fold, blur=blur, bubbles_um=bubbles)


def _curve(
    rng: np.random.Generator, start: NDArray[np.float64], length: float, bend: float
) -> NDArray[np.float64]:
    """Return (40, 2) points (row, column) of a smooth line that starts near a point."""
    import numpy as np

    turn = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, 40)) / 6
    steps = np.stack([np.sin(turn), np.cos(turn)], axis=1) * (length / 40)
    line = np.cumsum(steps, axis=0)
    return np.asarray(start + line - line[20], np.float64)


def _drawn(shape: tuple[int, ...], line: NDArray[np.float64], width: float) -> NDArray[np.float32]:
    """Return a line of some width in cells, antialiased: 0 to 1."""
    import cv2
    import numpy as np

    canvas = np.zeros(shape, np.uint8)
    points = np.rint(line[:, ::-1] * 16).astype(np.int32)
    cv2.polylines(canvas, [points], False, 255, max(1, round(width)), cv2.LINE_AA, 4)
    return (canvas / 255).astype(np.float32)


def _pen_stroke(
    rng: np.random.Generator,
    depth_um: NDArray[np.float32],
    tissue: NDArray[np.intp],
    edge_um: float,
) -> NDArray[np.float32]:
    import cv2
    import numpy as np

    edge, shape = edge_um / FIELD_STEP_UM, depth_um.shape
    width = float(np.clip(0.05 * edge, 8, 60))
    coverage = np.zeros(shape, np.float32)
    for _ in range(int(rng.integers(1, 3))):
        start = tissue[rng.integers(len(tissue))] + rng.normal(0, 0.08 * edge, 2)
        line = _curve(rng, start, edge * rng.uniform(0.4, 0.8), 1.3)
        coverage = np.maximum(coverage, _drawn(shape, line, width * rng.uniform(0.8, 1.2)))
    soft = np.asarray(cv2.GaussianBlur(coverage, (0, 0), 0.5), np.float32)
    # Ink dries in streaks.
    streaks = smooth_noise(rng, shape[0], shape[1], 1.5, 6)
    return np.asarray(soft * np.clip(0.86 + 0.07 * streaks, 0.6, 1), np.float32)


def _folds(
    rng: np.random.Generator,
    depth_um: NDArray[np.float32],
    tissue: NDArray[np.intp],
    edge_um: float,
    count: int,
) -> NDArray[np.float32]:
    import cv2
    import numpy as np

    fold = np.zeros(depth_um.shape, np.float32)
    for _ in range(count):
        line = _curve(rng, tissue[rng.integers(len(tissue))].astype(float), edge_um / 8 * 0.5, 1.0)
        fold = np.maximum(fold, _drawn(fold.shape, line, rng.uniform(30, 55) / FIELD_STEP_UM))
    return np.asarray(cv2.GaussianBlur(fold, (0, 0), 0.7), np.float32)


def _spots(
    rng: np.random.Generator,
    depth_um: NDArray[np.float32],
    tissue: NDArray[np.intp],
    edge_um: float,
    count: int,
) -> NDArray[np.float32]:
    import numpy as np

    rows, columns = depth_um.shape
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    near = np.full(depth_um.shape, np.inf, np.float32)
    for cy, cx in tissue[rng.integers(0, len(tissue), count)]:
        radius = edge_um / FIELD_STEP_UM * rng.uniform(0.09, 0.16)
        near = np.minimum(near, np.hypot(y - cy, x - cx) / radius)
    uneven = max(3.0, rows / 30)
    return ramp(1 - near + 0.15 * smooth_noise(rng, rows, columns, uneven, uneven), -0.12, 0.12)


def fold_factor(fold: NDArray[np.float32], window: Window, mpp: float) -> NDArray[np.float32]:
    """Return the factor on all stain where tissue lies double, darkest along the crease."""
    import numpy as np

    doubled = np.clip(interpolated(fold, window, mpp), 0, 1)
    return np.asarray(1 + 1.5 * doubled + 2.0 * doubled * (1 - doubled), np.float32)


def blurred(
    rgb: NDArray[np.uint8], blur: NDArray[np.float32], window: Window, mpp: float
) -> NDArray[np.uint8]:
    """Return a window's pixels, out of focus where `blur` says so."""
    import cv2
    import numpy as np

    weight = np.clip(interpolated(blur, window, mpp), 0, 1)
    if weight.max() < 0.01:
        return rgb
    soft = cv2.GaussianBlur(rgb, (0, 0), BLUR_SIGMA_UM / mpp)
    return np.asarray(cv2.blendLinear(rgb, soft, 1 - weight, weight), np.uint8)


def with_glass_artefacts(
    rgb: NDArray[np.uint8], artefacts: Artefacts, window: Window, mpp: float
) -> NDArray[np.uint8]:
    """Return a window's pixels with bubbles and pen over them."""
    import numpy as np

    for x_um, y_um, radius_um in artefacts.bubbles_um.tolist():
        x = (window.x_l0 + np.arange(window.width_px, dtype=np.float32)) * mpp - x_um
        y = (window.y_l0 + np.arange(window.height_px, dtype=np.float32)) * mpp - y_um
        rim = np.sqrt(y[:, None] ** 2 + x[None, :] ** 2) - radius_um
        if rim.min() > 40 or rim.max() < -60:
            continue
        light = 1 - 0.72 * np.exp(-((rim / 5) ** 2)) + 0.10 * np.exp(-(((rim + 14) / 6) ** 2))
        light = light - 0.10 * np.exp(-((np.minimum(rim - 5, 0) / 60) ** 2)) * (rim < 5)
        rgb = np.clip(rgb * light[..., None].astype(np.float32), 0, 255).astype(np.uint8)
    for transmittance, coverage in artefacts.pens:
        ink = np.clip(interpolated(coverage, window, mpp), 0, 1)
        if ink.max() < 0.004:
            continue
        light = 1 - ink[..., None] * (1 - np.array(transmittance, np.float32))
        rgb = (rgb * light).astype(np.uint8)
    return rgb
