"""The overview picture of a slide: what was taken for tissue, pen and folds, and which tiles.

Colours are those of `geojson.COLOURS`, so that the picture and QuPath show a class alike. Frames:
`rgb` and the masks are overview pixels; the picture is scaled, and lines are drawn after scaling,
so that they are as crisp on a small picture as on a large one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bagscope.wsi.exif_thumbnail import embed
from bagscope.wsi.geojson import COLOURS
from bagscope.wsi.outline import FOLD, PEN, TISSUE, MaskFrame, polygons

if TYPE_CHECKING:
    from bagscope.wsi.slide import Rgb

PICTURE_EDGE_PX = 1600
THUMBNAIL_EDGE_PX = 360
THUMBNAIL_BYTES = 15_000
"""At most; 500 of them make a page of about 10 MB."""

TILE_COLOUR: Rgb = (0, 114, 178)
_CASING: Rgb = (32, 32, 32)
_MAX_ENLARGEMENT = 4.0
_SUBPIXEL_BITS = 4
_UNSEEN_PX = 0.4
_MIN_LATTICE_PX = 6
"""Tiles smaller than this on the picture are tinted without lines between them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeptTiles:
    """Which tiles were kept: `corners_l0` (N, 2) as (x, y), and their edge `extent_l0`."""

    corners_l0: NDArray[np.int32]
    extent_l0: float


def encode_overview(
    rgb: NDArray[np.uint8],
    tissue: NDArray[np.bool_],
    pen: NDArray[np.bool_],
    fold: NDArray[np.bool_],
    frame: MaskFrame,
    *,
    mpp: float | None = None,
    tiles: KeptTiles | None = None,
    quality: int = 85,
) -> bytes:
    """Return the overview as a JPEG file that carries its own thumbnail (see `draw`)."""
    outlines = _outlines({TISSUE: tissue, FOLD: fold, PEN: pen})
    large = _draw(rgb, outlines, {FOLD: fold, PEN: pen}, frame, mpp, tiles, PICTURE_EDGE_PX)
    small = _draw(rgb, outlines, {FOLD: fold, PEN: pen}, frame, None, None, THUMBNAIL_EDGE_PX)
    return embed(encode_jpeg(large, quality=quality), encode_thumbnail(small))


def draw(
    rgb: NDArray[np.uint8],
    tissue: NDArray[np.bool_],
    pen: NDArray[np.bool_],
    fold: NDArray[np.bool_],
    frame: MaskFrame,
    *,
    mpp: float | None = None,
    tiles: KeptTiles | None = None,
    edge_px: int = PICTURE_EDGE_PX,
) -> NDArray[np.uint8]:
    """Return the overview with outlines, kept tiles and a scale bar: (h, w, 3) uint8 RGB.

    Args:
        rgb: (H, W, 3) uint8, the scanned area; neither label nor macro image.
        tissue: (H, W) bool.
        pen: (H, W) bool.
        fold: (H, W) bool.
        frame: where the overview's pixels lie in level 0.
        mpp: micrometres per overview pixel; no scale bar without.
        tiles: which tiles to tint.
        edge_px: the picture's longer edge; small overviews are enlarged fourfold at most.
    """
    outlines = _outlines({TISSUE: tissue, FOLD: fold, PEN: pen})
    return _draw(rgb, outlines, {FOLD: fold, PEN: pen}, frame, mpp, tiles, edge_px)


def _outlines(
    masks: Mapping[str, NDArray[np.bool_]],
) -> dict[str, list[NDArray[np.float64]]]:
    """Return all rings of each class, in overview pixels."""
    found = {}
    for class_name, mask in masks.items():
        unit = MaskFrame(shape=mask.shape, origin_x_l0=0, origin_y_l0=0, px_l0_x=1, px_l0_y=1)
        found[class_name] = [ring for shape in polygons(mask, unit) for ring in shape.rings_l0]
    return found


def _draw(
    rgb: NDArray[np.uint8],
    outlines: Mapping[str, Sequence[NDArray[np.float64]]],
    tinted: Mapping[str, NDArray[np.bool_]],
    frame: MaskFrame,
    mpp: float | None,
    tiles: KeptTiles | None,
    edge_px: int,
) -> NDArray[np.uint8]:
    """Draw `outlines` in their order, over tiles and over the areas of `tinted` classes."""
    import cv2

    height, width = rgb.shape[:2]
    scale = min(edge_px / max(height, width), _MAX_ENLARGEMENT)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Means over areas matter below a half only, and take many times longer.
    how = cv2.INTER_AREA if scale < 0.5 else cv2.INTER_LINEAR if scale < 1 else cv2.INTER_CUBIC
    picture = np.ascontiguousarray(cv2.resize(rgb, size, interpolation=how), dtype=np.uint8)
    per_px = (size[0] / width, size[1] / height)
    thickness = max(2, round(max(size) / 640))

    if tiles is not None and len(tiles.corners_l0):
        _tint_tiles(picture, tiles, frame, per_px)
    for class_name, mask in tinted.items():
        if mask.any():
            large = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            _blend(picture, large.astype(np.bool_), COLOURS[class_name], 0.35)
    for class_name, rings in outlines.items():
        lines = [_line(ring * per_px) for ring in rings]
        for colour, extra in ((_CASING, 1), (COLOURS[class_name], 0)):
            cv2.polylines(
                picture, lines, True, colour, thickness + extra, cv2.LINE_AA, _SUBPIXEL_BITS
            )
    if mpp is not None:
        _draw_scale_bar(picture, mpp / per_px[0])
    return picture


def _line(ring: NDArray[np.float64]) -> NDArray[np.int32]:
    """Return a ring of picture coordinates as OpenCV draws it, steps too small to see left out."""
    import cv2

    seen = cv2.approxPolyDP(ring.astype(np.float32), _UNSEEN_PX, True)
    # Lines are drawn through pixel centres, half a pixel off the pixel's corner.
    points: NDArray[np.int32] = np.rint((seen - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
    return points


def _blend(picture: NDArray[np.uint8], where: NDArray[np.bool_], colour: Rgb, share: float) -> None:
    """Mix a colour into part of a picture, in place."""
    import cv2

    x, y, width, height = cv2.boundingRect(where.view(np.uint8))
    if width == 0:
        return
    part = np.s_[y : y + height, x : x + width]
    values = np.arange(256)[:, None] * (1 - share) + np.array(colour) * share
    mixed = cv2.LUT(picture[part], np.rint(values).astype(np.uint8)[None])
    cv2.copyTo(mixed, where[part].view(np.uint8), picture[part])


def _tint_tiles(
    picture: NDArray[np.uint8],
    tiles: KeptTiles,
    frame: MaskFrame,
    per_px: tuple[float, float],
) -> None:
    """Tint the kept tiles' area, with their borders where those can be told apart."""
    height, width = picture.shape[:2]
    corners = tiles.corners_l0.astype(np.float64)
    first = np.rint(frame.from_l0(corners) * per_px).astype(np.intp)
    last = np.rint(frame.from_l0(corners + tiles.extent_l0) * per_px).astype(np.intp)
    boxes = np.concatenate([first, last], axis=1)
    _blend(picture, _covered(boxes, (height, width)), TILE_COLOUR, 0.16)
    if tiles.extent_l0 / frame.px_l0_x * per_px[0] >= _MIN_LATTICE_PX:
        x0, y0, x1, y1 = boxes.T
        sides = ((x0, y0, x0, y1), (x1, y0, x1, y1), (x0, y0, x1, y0), (x0, y1, x1, y1))
        lines = np.concatenate([np.stack(side, axis=1) for side in sides])
        lines[:, 2:] += 1  # a line is a box of one pixel's width
        _blend(picture, _covered(lines, (height, width)), TILE_COLOUR, 0.30)


def _covered(boxes: NDArray[np.intp], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels lie in any of the boxes (N, 4) as (x0, y0, x1, y1): (h, w) bool."""
    import cv2

    height, width = shape
    x0, y0, x1, y1 = np.clip(boxes, 0, (width, height, width, height)).T
    # Each box adds one inside itself: sums over both axes turn four corners into an area.
    change = np.zeros((height + 1, width + 1), np.float32)
    for rows, columns, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        np.add.at(change, (rows, columns), sign)
    covered: NDArray[np.bool_] = cv2.integral(change, sdepth=cv2.CV_32F)[1:-1, 1:-1] > 0.5
    return np.ascontiguousarray(covered)


# --- scale bar ------------------------------------------------------------------------------


def scale_bar(width_px: int, mpp: float) -> tuple[float, str]:
    """Return the length in pixels and the label of a round scale bar, a tenth to a fourth wide."""
    longest_um = width_px * mpp / 4
    power = 10.0 ** math.floor(math.log10(longest_um))
    length_um = next(step * power for step in (5, 2, 1) if step * power <= longest_um)
    if length_um >= 1000:
        return length_um / mpp, f"{length_um / 1000:g} mm"
    return length_um / mpp, f"{length_um:g} µm"


def _draw_scale_bar(picture: NDArray[np.uint8], mpp: float) -> None:
    """Draw bar and label onto a light plate in the lower left corner."""
    import cv2

    height, width = picture.shape[:2]
    bar_px, label = scale_bar(width, mpp)
    unit = max(height, width) / 1600
    size = max(0.4, 0.7 * unit)
    font, weight = cv2.FONT_HERSHEY_SIMPLEX, max(1, round(1.6 * unit))
    text = label.replace("µ", "u")
    (text_px, text_height), descent = cv2.getTextSize(text, font, size, weight)
    pad, gap = round(8 + 8 * unit), round(4 + 4 * unit)
    bar_height = max(2, round(5 * unit))
    plate_w = 2 * pad + max(round(bar_px), text_px)
    plate_h = 2 * pad + bar_height + gap + text_height + descent // 2
    if plate_w > width or plate_h > height:
        return
    top = height - plate_h
    plate = picture[top:, :plate_w]
    plate[:] = np.rint(plate * 0.2 + 255 * 0.8).astype(np.uint8)
    bar_y = top + pad
    picture[bar_y : bar_y + bar_height, pad : pad + round(bar_px)] = _CASING
    baseline = bar_y + bar_height + gap + text_height
    cv2.putText(picture, text, (pad, baseline), font, size, _CASING, weight, cv2.LINE_AA)
    if "µ" in label:
        # The font has no Greek: a stem below its "u" makes one.
        before = cv2.getTextSize(text[: text.index("u")], font, size, weight)[0][0]
        through = cv2.getTextSize(text[: text.index("u") + 1], font, size, weight)[0][0]
        x = pad + before + round((through - before) * 0.16)
        cv2.line(
            picture,
            (x, baseline - text_height // 2),
            (x, baseline + max(2, text_height // 3)),
            _CASING,
            weight,
            cv2.LINE_AA,
        )


# --- encoding -------------------------------------------------------------------------------


def encode_jpeg(picture: NDArray[np.uint8], *, quality: int = 85) -> bytes:
    """Return an RGB picture as JPEG, with colour at full resolution: lines keep their colour."""
    import simplejpeg

    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(picture), quality=quality, colorspace="RGB", colorsubsampling="444"
    )
    return encoded


def encode_thumbnail(picture: NDArray[np.uint8], *, most_bytes: int = THUMBNAIL_BYTES) -> bytes:
    """Return a JPEG of at most `most_bytes`, by lower quality first and a smaller size then."""
    import cv2

    while True:
        for quality in (85, 75, 65, 55):
            encoded = encode_jpeg(picture, quality=quality)
            if len(encoded) <= most_bytes:
                return encoded
        height, width = picture.shape[:2]
        size = (max(1, round(width * 0.8)), max(1, round(height * 0.8)))
        picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
