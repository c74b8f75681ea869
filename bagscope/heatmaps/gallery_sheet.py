"""A gallery as one picture for a slide deck: tiles with score and place, and where they lie.

Positions on the page are whole pixels, so that a tile is resampled once and nothing else is.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagscope.heatmaps.overview import slide_picture
from bagscope.heatmaps.tile_places import TilePlaces
from bagscope.wording import counted
from bagscope.wsi.outline import MaskFrame
from bagscope.wsi.overlay import scale_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bagscope.heatmaps.choices import GalleryOptions
    from bagscope.heatmaps.gallery import GalleryPart, Side
    from bagscope.wsi.slide import Slide

_DPI = 100
_CELL_PX = 190
_GAP_PX = 14
_STRIP_PX = 6
"""Of the heatmap's own colour below a tile."""
_TEXT_PX = 44
_COLUMNS = 6
_MARGIN_PX = 36
_HEADER_PX = 106
_BLOCK_PX = 36
_FOOTER_PX = 66
_LOCATOR_PX, _LOCATOR_TALL_PX = 440, 820
_EDGE_RGB = (200, 200, 200)
_ALERT = "#fde2c4"
_WARNING_SIZE = 12.0
_INK, _QUIET = "#1a1a1a", "#5c5c5c"
_SIDE_COLOURS = {"top": "#d55e00", "bottom": "#0072b2"}
_SIDE_WORDS = {"top": "Highest", "bottom": "Lowest"}
_LETTER_PX_PER_POINT = 0.95
"""How wide a letter of the font is, generously."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shown:
    """A tile of a gallery.

    Attributes:
        side: which end it is of.
        rank: from 1, on its side.
        row: among all tiles.
        value: its score.
        image: (px, px, 3) uint8 RGB, None where it could not be read.
    """

    side: Side
    rank: int
    row: int
    value: float
    image: NDArray[np.uint8] | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Locator:
    """The whole slide, small: (H, W, 3) uint8, and where its pixels lie."""

    rgb: NDArray[np.uint8]
    frame: MaskFrame


def locate(slide: Slide, places: TilePlaces) -> Locator:
    """Return a small picture of the slide to mark places on."""
    height, width = places.frame(1).shape
    longest_px = min(_LOCATOR_TALL_PX, round(_LOCATOR_PX * max(1.0, height / width)))
    frame = places.frame(64, longest_px=longest_px)
    return Locator(rgb=slide_picture(slide, frame), frame=frame)


def score_text(value: float, scale: str) -> str:
    """Return a score as it stands under a tile."""
    number = f"{value:.2f}" if scale == "probability" else f"{value:.3g}"
    unit = {"ratio": "×", "rollout": "×", "percentile": " %"}.get(scale, "")
    return f"{number}{unit}".replace("-", "−")


def draw_sheet(
    shown: Sequence[Shown],
    part: GalleryPart,
    places: TilePlaces,
    locator: Locator,
    *,
    slide_id: str,
    options: GalleryOptions,
    source: str = "",
    warning: str = "",
) -> bytes:
    """Return the picture as PNG.

    Args:
        shown: the tiles, each side in the order of its ranks.
        part: the scores that they were picked by.
        places: of all tiles.
        locator: the slide, small.
        slide_id: as in the cohort.
        options: how the tiles were picked and cut.
        source: where the scores come from.
        warning: why the heatmap is not to be believed; empty where it can be.
    """
    from matplotlib import rc_context

    with rc_context({"font.family": "DejaVu Sans", "text.parse_math": False}):
        figure = _figure(shown, part, places, locator, slide_id, options, source, warning)
        content = io.BytesIO()
        figure.savefig(
            content,
            format="png",
            dpi=_DPI,
            metadata={"Software": None},
            pil_kwargs={"compress_level": 3},
        )
    return content.getvalue()


def _figure(
    shown: Sequence[Shown],
    part: GalleryPart,
    places: TilePlaces,
    locator: Locator,
    slide_id: str,
    options: GalleryOptions,
    source: str,
    warning: str,
) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = {side: [one for one in shown if one.side == side] for side in _SIDE_WORDS}
    blocks = {side: tiles for side, tiles in blocks.items() if tiles}
    most = max(map(len, blocks.values()), default=1)
    columns = -(-most // -(-most // _COLUMNS))
    tiles_px = max(columns * (_CELL_PX + _GAP_PX) - _GAP_PX, 3 * _CELL_PX)
    row_px = _CELL_PX + _STRIP_PX + _TEXT_PX + _GAP_PX
    rows = {side: -(-len(tiles) // columns) for side, tiles in blocks.items()}
    body_px = sum(_BLOCK_PX + count * row_px for count in rows.values())
    place_h, place_w = locator.rgb.shape[:2]
    page_w = 3 * _MARGIN_PX + tiles_px + max(place_w, _LOCATOR_PX)
    letters = int((page_w - 2 * _MARGIN_PX - 24) / _LETTER_PX_PER_POINT / _WARNING_SIZE)
    warned = textwrap.wrap(f"Not to be believed. {warning}", letters) if warning else []
    band_px = 16 + 20 * len(warned) if warned else 0
    first = _HEADER_PX + band_px + (14 if warned else 0)
    page_h = first + max(body_px, place_h + 130) + _FOOTER_PX
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

    fits = (page_w - 2 * _MARGIN_PX) / (_LETTER_PX_PER_POINT * 1.1 * max(1, len(slide_id)))
    text(_MARGIN_PX, 22, slide_id, fontsize=min(17, fits), fontweight="bold")
    title = part.colours.title + (f": {part.of}" if part.of else "")
    text(_MARGIN_PX, 54, title, fontsize=13)
    text(_MARGIN_PX, 79, _said(blocks, places, options), fontsize=9, color=_QUIET)

    if warned:
        axes(_MARGIN_PX, _HEADER_PX, page_w - 2 * _MARGIN_PX, band_px).set_facecolor(_ALERT)
        text(_MARGIN_PX + 12, _HEADER_PX + 8, "\n".join(warned), fontsize=_WARNING_SIZE,
             linespacing=1.25)  # fmt: skip

    top = first
    for side, tiles in blocks.items():
        axes(_MARGIN_PX, top + 8, 12, 12).set_facecolor(_SIDE_COLOURS[side])
        text(_MARGIN_PX + 20, top + 5, _SIDE_WORDS[side], fontsize=12, fontweight="bold")
        top += _BLOCK_PX
        for place, tile in enumerate(tiles):
            left = _MARGIN_PX + place % columns * (_CELL_PX + _GAP_PX)
            _draw_tile(axes, text, tile, part, places, left, top + place // columns * row_px)
        top += rows[side] * row_px
    _draw_scale_bar(axes, text, shown, places, options, top + 4)
    corner = (2 * _MARGIN_PX + tiles_px, first)
    _draw_locator(axes, text, shown, places, locator, source, corner)
    return figure


def _said(blocks: dict[str, list[Shown]], places: TilePlaces, options: GalleryOptions) -> str:
    """Return how the tiles were picked, in one line."""
    counts = " and ".join(f"{len(t)} {_SIDE_WORDS[s].lower()}" for s, t in blocks.items())
    said = f"the {counts} of {counted(len(places), 'tile')}"
    if options.apart > 0:
        far = f"{options.apart:g} tile edges"
        if places.mpp is not None:
            far += f" ({options.apart * places.extent_l0 * places.mpp[0]:,.0f} µm)"
        said += f", no two of a side nearer than {far}"
    else:
        said += ", neighbours each by itself"
    if options.context > 0:
        said += "; framed: the tile that the model saw"
    return said


def _draw_tile(
    axes: Any,
    text: Any,
    tile: Shown,
    part: GalleryPart,
    places: TilePlaces,
    left: int,
    top: int,
) -> None:
    picture = axes(left, top, _CELL_PX, _CELL_PX)
    if tile.image is None:
        picture.set_facecolor("#e4e4e4")
        picture.plot([0, 1, 0, 1], [0, 1, 1, 0], color="#b0b0b0", linewidth=1)
        picture.set_xlim(0, 1)
        picture.set_ylim(0, 1)
        picture.text(0.5, 0.5, "could not be read", ha="center", va="center", fontsize=9,
                     backgroundcolor="#e4e4e4")  # fmt: skip
    else:
        picture.imshow(
            _bordered(_resized(tile.image, _CELL_PX)), interpolation="none", aspect="auto"
        )
    strip = axes(left, top + _CELL_PX, _CELL_PX, _STRIP_PX)
    red, green, blue = (part.colours.rgb(np.array([tile.value]))[0] / 255).tolist()
    strip.set_facecolor((red, green, blue))
    below = top + _CELL_PX + _STRIP_PX + 4
    text(left, below, f"{tile.rank}", fontsize=10.5, color=_SIDE_COLOURS[tile.side],
         fontweight="bold")  # fmt: skip
    score = score_text(tile.value, part.colours.scale)
    text(left + 30, below, score, fontsize=10.5, fontweight="bold")
    x_l0, y_l0 = places.coords_l0[tile.row].tolist()
    text(left, below + 19, f"x {x_l0}  y {y_l0}", fontsize=8, color=_QUIET)


def _resized(image: NDArray[np.uint8], edge_px: int) -> NDArray[np.uint8]:
    import cv2

    how = cv2.INTER_AREA if len(image) >= edge_px else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (edge_px, edge_px), interpolation=how), np.uint8)


def _bordered(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a tile with a thin edge, so that glass ends where the tile does."""
    image[[0, -1]] = image[:, [0, -1]] = _EDGE_RGB
    return image


def _draw_scale_bar(
    axes: Any,
    text: Any,
    shown: Sequence[Shown],
    places: TilePlaces,
    options: GalleryOptions,
    top: int,
) -> None:
    note = "x, y: top-left corner of the tile in level-0 pixels"
    if places.mpp is None or not shown:
        text(_MARGIN_PX, top + 14, f"pixel size unknown · {note}", fontsize=9, color=_QUIET)
        return
    shown_um = (1 + 2 * options.context) * places.extent_l0 * places.mpp[0]
    length_px, label = scale_bar(2 * _CELL_PX, shown_um / _CELL_PX)
    axes(_MARGIN_PX, top, round(length_px), 5).set_facecolor(_INK)
    text(_MARGIN_PX, top + 10, f"{label} in the tiles", fontsize=9)
    text(_MARGIN_PX, top + 30, note, fontsize=9, color=_QUIET)


def _draw_locator(
    axes: Any,
    text: Any,
    shown: Sequence[Shown],
    places: TilePlaces,
    locator: Locator,
    source: str,
    corner: tuple[int, int],
) -> None:
    """Show on the slide where the tiles lie, each with its rank."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    height, width = locator.rgb.shape[:2]
    left, top = corner
    text(left, top + 5, "Where they lie", fontsize=12, fontweight="bold")
    top += _BLOCK_PX
    whole = axes(left, top, width, height)
    whole.imshow(locator.rgb, interpolation="none", aspect="auto")
    halo = [withStroke(linewidth=2.5, foreground="white")]
    # The best are drawn last, over the others.
    for tile in reversed(shown):
        place_l0 = places.coords_l0[tile.row].astype(np.float64)[None]
        x, y = locator.frame.from_l0(place_l0)[0].tolist()
        edge = places.extent_l0 / locator.frame.px_l0_x
        colour = _SIDE_COLOURS[tile.side]
        box = Rectangle((x - 0.5, y - 0.5), edge, edge, fill=False, edgecolor=colour, linewidth=1.2)
        whole.add_patch(box)
        whole.text(
            x + edge / 2,
            y + edge / 2 if edge >= 18 else y - 1,
            str(tile.rank),
            fontsize=7.5,
            fontweight="bold",
            color=colour,
            ha="center",
            va="center" if edge >= 18 else "bottom",
            path_effects=halo,
            clip_on=False,
        )
    below = top + height + 10
    if places.mpp is not None:
        length_px, label = scale_bar(width, places.mpp[0] * locator.frame.px_l0_x)
        axes(left, below, round(length_px), 4).set_facecolor(_INK)
        text(left, below + 8, label, fontsize=9)
        below += 34
    lines = textwrap.wrap(source, 60)
    text(left, below, "\n".join(lines), fontsize=9, color=_QUIET, linespacing=1.5)
