"""A finer pass beside the heatmap that it refines: a picture of the region, and objects for QuPath.

A pixel of the region has the mean of the finer tiles that its centre lies in. Nothing is smoothed.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagscope.heatmaps.colours import ColourScale, lookup_table
from bagscope.heatmaps.overview import OPACITY, blend
from bagscope.heatmaps.raster import Cells
from bagscope.wsi.outline import MaskFrame, Polygon, Region
from bagscope.wsi.overlay import scale_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bagscope.wsi.slide import RectL0

PANEL_PX = 620
"""The longer edge of one of the three panels."""

_DPI = 100
_MARGIN_PX, _GAP_PX = 36, 24
_HEADER_PX, _TITLE_PX, _FOOTER_PX = 96, 28, 118
_LEGEND_PX = 420
_ALERT = "#fde2c4"
_WARNING_SIZE = 12.0
_LETTER_PX_PER_POINT = 0.95
"""How wide a letter of the font is, generously."""
_INK, _QUIET = "#1a1a1a", "#5c5c5c"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Panel:
    """One of two heatmaps of a region.

    Attributes:
        title: above it.
        scores: (H, W) float32, NaN where there is none.
    """

    title: str
    scores: NDArray[np.float32]


def region_frame(box_l0: RectL0) -> MaskFrame:
    """Return the frame of a region's picture: square pixels, the longer edge of `PANEL_PX`."""
    px_l0 = max(box_l0.width_l0, box_l0.height_l0) / PANEL_PX
    return MaskFrame(
        shape=(
            max(1, round(box_l0.height_l0 / px_l0)),
            max(1, round(box_l0.width_l0 / px_l0)),
        ),
        origin_x_l0=float(box_l0.x_l0),
        origin_y_l0=float(box_l0.y_l0),
        px_l0_x=px_l0,
        px_l0_y=px_l0,
    )


def cell_regions(cells: Cells, inside: NDArray[np.bool_], colours: ColourScale) -> Iterator[Region]:
    """Yield each cell that lies in the region as an object of type `tile`, with its mean score.

    Args:
        cells: of the finer tiles' mean.
        inside: (rows, columns) which of them to take.
        colours: of their scores.
    """
    rows, columns = np.nonzero(inside & ~np.isnan(cells.values))
    values = cells.values[rows, columns].astype(np.float64)
    left, right = cells.x_edges_l0[columns], cells.x_edges_l0[columns + 1]
    top, bottom = cells.y_edges_l0[rows], cells.y_edges_l0[rows + 1]
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1)
    for ring, value, (red, green, blue) in zip(
        corners.reshape(-1, 4, 2), values.tolist(), colours.rgb(values).tolist(), strict=True
    ):
        yield Region(
            class_name="",
            polygons=(Polygon(exterior_l0=ring),),
            object_type="tile",
            colour=(red, green, blue),
            measurements={colours.scale: float(f"{value:.6g}")},
        )


def draw_fine(
    rgb: NDArray[np.uint8],
    panels: Sequence[Panel],
    frame: MaskFrame,
    colours: ColourScale,
    *,
    slide_id: str,
    of: str = "",
    mpp: float | None = None,
    remarks: Sequence[str] = (),
    warning: str = "",
) -> bytes:
    """Return the picture as PNG: the slide, and the heatmaps over it in grey.

    Args:
        rgb: (H, W, 3) the slide in the region.
        panels: the heatmap as it was, and the finer one.
        frame: of all of them.
        colours: the cohort's.
        slide_id: as in the cohort.
        of: whose scores are shown: a class, or empty.
        mpp: micrometres per level-0 pixel; no scale bar without.
        remarks: sentences below.
        warning: why the heatmap is not to be believed; empty where it can be.
    """
    from matplotlib import rc_context

    with rc_context({"font.family": "DejaVu Sans", "text.parse_math": False}):
        figure = _figure(rgb, panels, frame, colours, slide_id, of, mpp, remarks, warning)
        content = io.BytesIO()
        how: dict[str, Any] = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}}
        figure.savefig(content, format="png", dpi=_DPI, **how)
    return content.getvalue()


def _figure(
    rgb: NDArray[np.uint8],
    panels: Sequence[Panel],
    frame: MaskFrame,
    colours: ColourScale,
    slide_id: str,
    of: str,
    mpp: float | None,
    remarks: Sequence[str],
    warning: str,
) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = frame.shape
    each_px = max(width, 300)
    page_w = 2 * _MARGIN_PX + (1 + len(panels)) * (each_px + _GAP_PX) - _GAP_PX
    letters = int((page_w - 2 * _MARGIN_PX - 24) / _LETTER_PX_PER_POINT / _WARNING_SIZE)
    warned = textwrap.wrap(f"Not to be believed. {warning}", letters) if warning else []
    band_px = 16 + 20 * len(warned) if warned else 0
    first = _HEADER_PX + band_px + (14 if warned else 0)
    page_h = first + _TITLE_PX + height + _FOOTER_PX
    figure = Figure(figsize=(page_w / _DPI, page_h / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def axes(left: float, top: float, wide: float, high: float) -> Any:
        box = (left / page_w, 1 - (top + high) / page_h, wide / page_w, high / page_h)
        found = figure.add_axes(box)
        found.set_xticks([])
        found.set_yticks([])
        for line in found.spines.values():
            line.set_visible(False)
        return found

    def text(left: float, top: float, words: str, **how: Any) -> None:
        figure.text(left / page_w, 1 - top / page_h, words, va="top", **{"color": _INK, **how})

    text(_MARGIN_PX, 22, slide_id, fontsize=17, fontweight="bold")
    place = f"x {frame.origin_x_l0:.0f}, y {frame.origin_y_l0:.0f}"
    size = f"{width * frame.px_l0_x:.0f} × {height * frame.px_l0_y:.0f} level-0 pixels"
    text(_MARGIN_PX, 56, f"A region at {place}, {size}", fontsize=11, color=_QUIET)
    if warned:
        axes(_MARGIN_PX, _HEADER_PX, page_w - 2 * _MARGIN_PX, band_px).set_facecolor(_ALERT)
        text(_MARGIN_PX + 12, _HEADER_PX + 8, "\n".join(warned), fontsize=_WARNING_SIZE,
             linespacing=1.25)  # fmt: skip
    pictures = [("The slide", rgb)]
    pictures += [(panel.title, blend(rgb, panel.scores, colours)) for panel in panels]
    top = first + _TITLE_PX
    for number, (title, picture) in enumerate(pictures):
        left = _MARGIN_PX + number * (each_px + _GAP_PX)
        text(left, first, title, fontsize=10.5, fontweight="bold")
        axes(left, top, width, height).imshow(picture, interpolation="none", aspect="auto")
    below = top + height + 18
    if mpp is not None:
        length_px, label = scale_bar(width, mpp * frame.px_l0_x)
        axes(_MARGIN_PX, below, round(length_px), 5).set_facecolor(_INK)
        text(_MARGIN_PX, below + 10, label, fontsize=10)
    legend = _MARGIN_PX + each_px + _GAP_PX
    _draw_legend(axes, text, colours, of, legend, below - 6)
    lines = [line for one in remarks for line in textwrap.wrap(one, 92)]
    text(legend + _LEGEND_PX + 40, below - 6, "\n".join(lines), fontsize=9, color=_QUIET,
         linespacing=1.5)  # fmt: skip
    return figure


def _draw_legend(axes: Any, text: Any, colours: ColourScale, of: str, left: int, top: int) -> None:
    title = colours.title + (f": {of}" if of else "")
    text(left, top, title, fontsize=11, fontweight="bold")
    bar = axes(left, top + 26, _LEGEND_PX, 16)
    # As the colours are seen: over the white of the glass.
    shown = 255 - (255 - lookup_table(colours.map_name).astype(np.float64)) * OPACITY
    bar.imshow(
        np.rint(shown).astype(np.uint8)[None],
        aspect="auto",
        extent=(0, 1, 0, 1),
        interpolation="none",
    )
    ticks = colours.ticks()
    bar.set_xticks(colours.positions(np.array(ticks)), [colours.tick_text(tick) for tick in ticks])
    bar.tick_params(length=4, labelsize=9, colors=_INK)
