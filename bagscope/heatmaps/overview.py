"""The overview of a heatmap, for a slide's first look and for a paper: PNG and SVG.

Left the slide in grey with its tiles in colour, each exactly where it was cut; right the slide as
it is, the legend and the scale bar. Nothing is smoothed.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagscope.heatmaps.colours import ColourScale, lookup_table
from bagscope.heatmaps.raster import raster
from bagscope.heatmaps.tile_places import TilePlaces
from bagscope.wording import counted
from bagscope.wsi.outline import MaskFrame
from bagscope.wsi.overlay import scale_bar
from bagscope.wsi.overview import read_overview

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bagscope.wsi.slide import Slide

PICTURE_PX = 1200
"""The longer edge of the picture."""
OPACITY = 0.6
"""Of a tile's colour over the slide in grey."""

_DPI = 100
_MARGIN_PX = 36
_HEADER_PX = 92
_FOOTER_PX = 64
_SIDE_PX = 330
_ID_SIZE, _TEXT_SIZE = 17.0, 12.0
_LETTER_PX_PER_POINT = 0.95
"""How wide a letter of the font is, generously: 0.68 em at 100 dots per inch."""
_LINE_PX = 19
"""From line to line of small print."""
_ALERT = "#fde2c4"
_AROUND_RGB = (150, 150, 150)
_INK = "#1a1a1a"
_QUIET = "#5c5c5c"


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """What is written beside a heatmap.

    Attributes:
        slide_id: whose it is.
        prediction: what the model says of the case, empty where not known.
        of: whose scores are shown: a class, or empty.
        source: the run that they come from.
        remarks: sentences that a reader must know.
        warning: why the heatmap is not to be believed; empty where it can be.
    """

    slide_id: str
    prediction: str = ""
    of: str = ""
    source: str = ""
    remarks: Sequence[str] = ()
    warning: str = ""


def picture_frame(places: TilePlaces, *, longest_px: int = PICTURE_PX) -> MaskFrame:
    """Return the frame of the picture: the scanned area, its longer edge of so many pixels.

    Pixels are a whole part of the lattice's step where tiles are large enough to be seen.
    """
    one = places.frame(1)
    longest = max(one.shape)
    return places.frame(max(1, longest_px // longest), longest_px=longest_px)


def slide_picture(slide: Slide, frame: MaskFrame) -> NDArray[np.uint8]:
    """Return the slide's pixels on a frame (H, W, 3) uint8; beyond the scanned area it is white."""
    # Only the ratio of the two sizes counts, so that a slide without a pixel size can be shown.
    found = read_overview(slide, 1.0, mpp=frame.px_l0_x)
    height, width = frame.shape
    x_l0 = frame.origin_x_l0 + (np.arange(width) + 0.5) * frame.px_l0_x
    y_l0 = frame.origin_y_l0 + (np.arange(height) + 0.5) * frame.px_l0_y
    column = np.floor((x_l0 - found.frame.origin_x_l0) / found.frame.px_l0_x).astype(np.intp)
    row = np.floor((y_l0 - found.frame.origin_y_l0) / found.frame.px_l0_y).astype(np.intp)
    known_x = (column >= 0) & (column < found.frame.shape[1])
    known_y = (row >= 0) & (row < found.frame.shape[0])
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[np.ix_(known_y, known_x)] = found.rgb[np.ix_(row[known_y], column[known_x])]
    return picture


def blend(
    rgb: NDArray[np.uint8] | None, scores: NDArray[np.float32], colours: ColourScale
) -> NDArray[np.uint8]:
    """Lay scores (H, W) in colour over a slide (H, W, 3) in grey; over white without one.

    Without the slide a thin line is drawn around the tiles, so that pale ones are seen to be there.
    """
    import cv2

    over = colours.rgb(scores)
    where = ~np.isnan(scores)
    if rgb is None:
        wider = cv2.dilate(where.view(np.uint8), np.ones((3, 3), np.uint8)).astype(np.bool_)
        over[wider & ~where] = _AROUND_RGB
        return over
    grey = np.repeat((rgb @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)
    # A little lighter than it is: colours keep their lightness on dark tissue.
    grey = 255 - (255 - grey) * 0.75
    mixed = np.where(where[..., None], grey * (1 - OPACITY) + over * OPACITY, grey)
    return np.rint(mixed).astype(np.uint8)


def draw_overview(
    places: TilePlaces,
    values: NDArray[np.floating],
    colours: ColourScale,
    caption: Caption,
    *,
    rgb: NDArray[np.uint8] | None = None,
    frame: MaskFrame | None = None,
    formats: Sequence[str] = ("png",),
) -> dict[str, bytes]:
    """Return the overview as files' contents by format, "png" or "svg".

    Args:
        places: of the tiles.
        values: (n,) of each tile, on the scale of `colours`.
        colours: the cohort's.
        caption: what is written beside it.
        rgb: (H, W, 3) the slide in that frame; the lattice alone is drawn without.
        frame: of the picture (`picture_frame`).
        formats: which ones.
    """
    from matplotlib import rc_context

    frame = frame or picture_frame(places)
    picture = blend(rgb, raster(places, values, frame), colours)
    with rc_context(
        {
            "font.family": "DejaVu Sans",
            "text.parse_math": False,  # a slide's id may have a dollar sign
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "bagscope",  # the same picture has the same bytes
            "image.composite_image": False,
        }
    ):
        figure = _figure(picture, rgb, places, frame, colours, caption)
        return {name: _encoded(figure, name) for name in formats}


def _encoded(figure: Figure, name: str) -> bytes:
    content = io.BytesIO()
    how: dict[str, Any] = {"metadata": {"Date": None, "Creator": None}}
    if name == "png":
        how = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}}
    figure.savefig(content, format=name, dpi=_DPI, **how)
    return content.getvalue()


def _figure(
    picture: NDArray[np.uint8],
    rgb: NDArray[np.uint8] | None,
    places: TilePlaces,
    frame: MaskFrame,
    colours: ColourScale,
    caption: Caption,
) -> Figure:
    """Lay the page out in whole pixels, so that no pixel of the picture is resampled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = picture.shape[:2]
    small = min(_SIDE_PX / width, 330 / height)
    notes = [counted(len(places), "tile"), *([caption.source] if caption.source else [])]
    lines = [line for note in (*notes, *caption.remarks) for line in textwrap.wrap(note, 50)]
    legend = _legend_lines(colours, caption.of)
    side_px = _legend_px(legend) + _LINE_PX * len(lines)
    side_px += 0 if rgb is None else 44 + round(height * small)
    left_px = max(width, 420)
    page_w = _MARGIN_PX * 3 + left_px + _SIDE_PX
    across = page_w - 2 * _MARGIN_PX
    letters = int(across / _LETTER_PX_PER_POINT / _TEXT_SIZE)
    said = textwrap.wrap(caption.prediction, letters)
    first = _HEADER_PX + 21 * max(0, len(said) - 1)
    warned = textwrap.wrap(f"Not to be believed. {caption.warning}", letters - 4)
    band = (first - 8, 21 * len(warned) + 14)
    first += band[1] + 10 if caption.warning else 0
    page_h = first + max(height, side_px) + _FOOTER_PX
    figure = Figure(figsize=(page_w / _DPI, page_h / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def axes(left: float, top: float, wide: float, high: float) -> Any:
        box = (left / page_w, 1 - (top + high) / page_h, wide / page_w, high / page_h)
        return figure.add_axes(box)

    def text(left: float, top: float, words: str, **how: Any) -> None:
        figure.text(left / page_w, 1 - top / page_h, words, va="top", **{"color": _INK, **how})

    fits = across / (_LETTER_PX_PER_POINT * 1.1 * max(1, len(caption.slide_id)))
    text(_MARGIN_PX, 24, caption.slide_id, fontsize=min(_ID_SIZE, fits), fontweight="bold")
    text(_MARGIN_PX, 57, "\n".join(said), fontsize=_TEXT_SIZE, linespacing=1.25)
    if caption.warning:
        back = axes(_MARGIN_PX, band[0], across, band[1])
        back.set_facecolor(_ALERT)
        _bare(back)
        text(_MARGIN_PX + 12, band[0] + 8, "\n".join(warned), fontsize=_TEXT_SIZE, linespacing=1.25)
    _show(axes(_MARGIN_PX, first, width, height), picture)
    if places.mpp is not None:
        _draw_scale_bar(axes, text, places, frame, first + height)

    side = _MARGIN_PX * 2 + left_px
    opacity = 1.0 if rgb is None else OPACITY
    top = _draw_legend(axes, text, colours, legend, side, first, opacity)
    if rgb is not None:
        _show(axes(side, top + 22, round(width * small), round(height * small)), rgb)
        text(side, top, "the slide without colours", fontsize=9, color=_QUIET)
        top += 22 + round(height * small) + 22
    text(side, top, "\n".join(lines), fontsize=9, color=_QUIET, linespacing=1.5)
    return figure


def _show(axes: Any, image: NDArray[np.uint8]) -> None:
    axes.imshow(image, interpolation="none", aspect="auto")
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for line in axes.spines.values():
        line.set_visible(False)


def _legend_lines(colours: ColourScale, of: str) -> tuple[list[str], list[str]]:
    """Return what stands above the colours, and what below."""
    title = textwrap.wrap(colours.title + (f": {of}" if of else ""), 38)
    meaning = textwrap.wrap(colours.meaning, 52)
    return title, [*meaning, "The same colours on every slide of the cohort."]


def _legend_px(legend: tuple[list[str], list[str]]) -> int:
    title, meaning = legend
    return 20 * len(title) + 6 + 18 + 36 + _LINE_PX * len(meaning) + 22


def _draw_legend(
    axes: Any,
    text: Any,
    colours: ColourScale,
    legend: tuple[list[str], list[str]],
    side: int,
    top: int,
    opacity: float,
) -> int:
    """Draw what the colours mean; return how far down it reaches, in pixels."""
    first = top
    title, meaning = legend
    text(side, top, "\n".join(title), fontsize=11, fontweight="bold")
    top += 20 * len(title) + 6
    bar = axes(side, top, _SIDE_PX, 18)
    # As they are seen: over the white of the glass, or by themselves.
    shown = 255 - (255 - lookup_table(colours.map_name).astype(np.float64)) * opacity
    bar.imshow(
        np.rint(shown).astype(np.uint8)[None],
        aspect="auto",
        extent=(0, 1, 0, 1),
        interpolation="none",
    )
    ticks = colours.ticks()
    bar.set_yticks([])
    bar.set_xticks(colours.positions(np.array(ticks)), [colours.tick_text(tick) for tick in ticks])
    bar.tick_params(length=4, labelsize=9, colors=_INK)
    for line in bar.spines.values():
        line.set_linewidth(0.6)
    top += 18 + 36
    text(side, top, "\n".join(meaning), fontsize=9, color=_QUIET, linespacing=1.5)
    return first + _legend_px(legend)


def _draw_scale_bar(axes: Any, text: Any, places: TilePlaces, frame: MaskFrame, top: int) -> None:
    assert places.mpp is not None, "asked for with a pixel size only"
    length_px, label = scale_bar(frame.shape[1], places.mpp[0] * frame.px_l0_x)
    bar = axes(_MARGIN_PX, top + 14, round(length_px), 5)
    bar.set_facecolor(_INK)
    bar.set_xticks([])
    bar.set_yticks([])
    text(_MARGIN_PX, top + 24, label, fontsize=10)
