"""From a layout to pixels, one rectangle at a time.

Rectangles are in level-0 pixels and may reach beyond the slide. What a rectangle shows does not
depend on how the slide is cut into rectangles, but for rounding in the interpolated fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.wsi.synthetic.layout import FIELD_STEP_UM, MARKED_EVERY, NEST_THRESHOLD
from bagscope.wsi.synthetic.noise import ramp
from bagscope.wsi.synthetic.structures import darken, oriented

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.synthetic.layout import Layout, Places
    from bagscope.wsi.synthetic.tissue_texture import Stamp, TissueKit

FRAY_UM = 7.0
"""How far the texture moves a fragment's edge in and out."""

_HAZE = 6
_FIBRE_MEAN = 62
_NODE_UM = 2.0
_REACH_UM = 75.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A rectangle of level-0 pixels."""

    x_l0: int
    y_l0: int
    width_px: int
    height_px: int

    def grown(self, margin_px: int) -> Window:
        """Return the window with a margin on all sides."""
        return Window(
            x_l0=self.x_l0 - margin_px,
            y_l0=self.y_l0 - margin_px,
            width_px=self.width_px + 2 * margin_px,
            height_px=self.height_px + 2 * margin_px,
        )


def interpolated(field: NDArray[np.float32], window: Window, mpp: float) -> NDArray[np.float32]:
    """Return a field at the pixels of a window: (height_px, width_px) float32.

    Cubic at the centres of squares of about `_NODE_UM`, which stand where they stand whatever the
    window, and linear between those: as smooth as need be, and cheap.
    """
    import cv2
    import numpy as np

    node_px = max(1, 2 ** int(np.log2(max(1.0, _NODE_UM / mpp))))
    if node_px == 1:
        rows, row_weights = _weights(window.y_l0, window.height_px, mpp, field.shape[0])
        columns, column_weights = _weights(window.x_l0, window.width_px, mpp, field.shape[1])
        part = field[rows[0] : rows[1], columns[0] : columns[1]]
        return np.asarray(row_weights @ part @ column_weights.T, np.float32)
    top, left = window.y_l0 // node_px - 1, window.x_l0 // node_px - 1
    bottom = -(-(window.y_l0 + window.height_px) // node_px) + 1
    right = -(-(window.x_l0 + window.width_px) // node_px) + 1
    nodes = Window(x_l0=left, y_l0=top, width_px=right - left, height_px=bottom - top)
    coarse = interpolated(field, nodes, mpp * node_px)
    size = (nodes.width_px * node_px, nodes.height_px * node_px)
    fine = cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR)
    y, x = window.y_l0 - top * node_px, window.x_l0 - left * node_px
    return np.asarray(fine[y : y + window.height_px, x : x + window.width_px], np.float32)


def _weights(
    start_px: int, count_px: int, mpp: float, cells: int
) -> tuple[tuple[int, int], NDArray[np.float32]]:
    """Return the range of cells that pixels depend on, and their weights (pixels, cells)."""
    import numpy as np

    position = (start_px + np.arange(count_px) + 0.5) * (mpp / FIELD_STEP_UM)
    base = np.floor(position).astype(np.intp)
    t = (position - base).astype(np.float32)
    taps = (
        -0.5 * t + t**2 - 0.5 * t**3,
        1 - 2.5 * t**2 + 1.5 * t**3,
        0.5 * t + 2 * t**2 - 1.5 * t**3,
        -0.5 * t**2 + 0.5 * t**3,
    )
    cell = np.clip(base[:, None] + np.arange(-1, 3), 0, cells - 1)
    low, high = int(cell.min()), int(cell.max()) + 1
    weights = np.zeros((count_px, high - low), np.float32)
    for k, tap in enumerate(taps):
        # One entry per row, so that no sum is lost; clamped cells come in different rounds.
        weights[np.arange(count_px), cell[:, k] - low] += tap
    return (low, high), weights


def render_concentrations(
    layout: Layout, kit: TissueKit, window: Window
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32] | None]:
    """Draw the tissue of a window.

    Args:
        layout: the slide.
        kit: textures and stamps at the slide's resolution.
        window: what to draw.

    Returns:
        (height_px, width_px) concentration bytes of haematoxylin and of the second stain, and the
        weight of the tumour per pixel (None where there is none).
    """
    import cv2
    import numpy as np

    fields, mpp = layout.fields, kit.mpp
    texture = _texture(layout, kit, window)
    e = np.ascontiguousarray(texture[..., 0])
    fat = interpolated(fields.fat, window, mpp)
    if fat.max() > -0.7:
        e = _blend(
            e, texture[..., 1], ramp(fat + (texture[..., 3] - np.float32(128)) / 280, -0.03, 0.03)
        )
    h = np.full(e.shape, _HAZE, np.uint8)
    weight = None
    tumor_um = interpolated(fields.tumor_um, window, mpp)
    if tumor_um.max() > -4:
        weight = ramp(tumor_um, -4, 4)
    _stamp_structures(h, e, layout.normal_structures, kit, window, skip_tumor=weight is not None)
    if weight is not None:
        blobs = texture[..., 3].astype(np.float32)
        # Nests shrink away from the stroma around them while the tissue is processed.
        cleft = ramp(blobs, NEST_THRESHOLD - 19, NEST_THRESHOLD - 15)
        stroma = _blend(e, _blend(texture[..., 0], np.full_like(e, 4), cleft), weight)
        nests = ramp(blobs, NEST_THRESHOLD - 8, NEST_THRESHOLD - 4) * weight
        e = _blend(
            stroma, np.asarray(cv2.convertScaleAbs(texture[..., 2], alpha=0.8), np.uint8), nests
        )
        h = _blend(h, np.full_like(h, 10), nests)
        _stamp_structures(h, e, layout.tumor_structures, kit, window, skip_tumor=False)
    marks = e if layout.marked else None
    _stamp_nuclei(h, marks, layout.normal_nuclei, kit, window, skip_tumor=weight is not None)
    if weight is not None:
        _stamp_nuclei(h, marks, layout.tumor_nuclei, kit, window)
    # Nuclei hold protein too: without it they would look blue over clefts.
    e = np.maximum(e, cv2.convertScaleAbs(h, alpha=0.38))
    depth_um = interpolated(fields.depth_um, window, mpp)
    cover = interpolated(fields.thickness, window, mpp) * 128
    if depth_um.min() < 3 * FRAY_UM:
        # Loose fibres reach further than clefts cut in, to the eye: hence a little less all round.
        frayed = (
            depth_um
            - FRAY_UM / 3
            + (texture[..., 0].astype(np.float32) - _FIBRE_MEAN) * (FRAY_UM / 30)
        )
        cover *= ramp(frayed, -1.5, 1.5)
        cover[depth_um < -2.5 * FRAY_UM] = 0
    factor = np.clip(cover, 0, 255).astype(np.uint8)
    h8 = np.asarray(cv2.multiply(h, factor, scale=1 / 128), np.uint8)
    e8 = np.asarray(cv2.multiply(e, factor, scale=1 / 128), np.uint8)
    return h8, e8, weight


def _texture(layout: Layout, kit: TissueKit, window: Window) -> NDArray[np.uint8]:
    """Return the kit's textures, bent along the slide's fibres: (height_px, width_px, 4)."""
    import cv2
    import numpy as np

    scale = np.float32(1 / kit.mpp)
    u = interpolated(layout.fields.fibre_u_um, window, kit.mpp) * scale
    v = interpolated(layout.fields.fibre_v_um, window, kit.mpp) * scale
    u -= np.floor(u.min() / kit.period_px) * kit.period_px
    v -= np.floor(v.min() / kit.period_px) * kit.period_px
    bent = cv2.remap(kit.textures, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return np.asarray(bent, np.uint8)


def _blend(
    below: NDArray[np.uint8], above: NDArray[np.uint8], weight: NDArray[np.float32]
) -> NDArray[np.uint8]:
    import cv2
    import numpy as np

    above = np.ascontiguousarray(above)
    return np.asarray(cv2.blendLinear(below, above, 1 - weight, weight), np.uint8)


def _near(places: Places, window: Window, mpp: float, reach_um: float) -> NDArray[np.intp]:
    """Return the indices of the places that may touch a window, in drawing order."""
    import numpy as np

    top, left = window.y_l0 * mpp - reach_um, window.x_l0 * mpp - reach_um
    bottom = (window.y_l0 + window.height_px) * mpp + reach_um
    right = (window.x_l0 + window.width_px) * mpp + reach_um
    first, last = np.searchsorted(places.y_um, [top, bottom])
    x = places.x_um[first:last]
    return np.asarray(first + np.flatnonzero((x > left) & (x < right)), np.intp)


def _stamp_structures(
    h: NDArray[np.uint8],
    e: NDArray[np.uint8],
    places: Places,
    kit: TissueKit,
    window: Window,
    *,
    skip_tumor: bool,
) -> None:
    import numpy as np

    for i in _near(places, window, kit.mpp, _REACH_UM):
        if skip_tumor and places.in_tumor[i]:
            continue
        stamps = kit.structures[places.kinds[places.kind[i]]]
        stamp: Stamp = stamps[places.pick[i] % len(stamps)]
        assert stamp.opaque is not None
        y0 = round(places.y_um[i] / kit.mpp) - window.y_l0 - stamp.h.shape[0] // 2
        x0 = round(places.x_um[i] / kit.mpp) - window.x_l0 - stamp.h.shape[1] // 2
        target = np.s_[
            max(0, y0) : max(0, y0 + stamp.h.shape[0]), max(0, x0) : max(0, x0 + stamp.h.shape[1])
        ]
        part_h, part_e = h[target], e[target]
        top, left = max(0, -y0), max(0, -x0)
        source = np.s_[top : top + part_h.shape[0], left : left + part_h.shape[1]]
        np.copyto(part_h, stamp.h[source], where=stamp.opaque[source])
        np.copyto(part_e, stamp.e[source], where=stamp.opaque[source])


def _stamp_nuclei(
    h: NDArray[np.uint8],
    e: NDArray[np.uint8] | None,
    places: Places,
    kit: TissueKit,
    window: Window,
    *,
    skip_tumor: bool = False,
) -> None:
    import numpy as np

    chosen = _near(places, window, kit.mpp, 15.0)
    if skip_tumor:
        chosen = chosen[~places.in_tumor[chosen]]
    xs = np.rint(places.x_um[chosen] / kit.mpp).astype(int) - window.x_l0
    ys = np.rint(places.y_um[chosen] / kit.mpp).astype(int) - window.y_l0
    for i, x, y in zip(chosen.tolist(), xs.tolist(), ys.tolist(), strict=True):
        kind = places.kinds[places.kind[i]]
        stamps = kit.nuclei[kind]
        pick = int(places.pick[i])
        if kind == "fibroblast":
            stamp = oriented(stamps, float(places.angle[i]), pick)
        else:
            stamp = stamps[pick % len(stamps)]
        if e is not None and pick % MARKED_EVERY == 0:
            darken(e, stamp.e, y, x)
        else:
            darken(h, stamp.h, y, x)
