"""The overview picture: lines where mask edges are, tiles where tiles are, honest scale bars."""

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from bagscope.wsi import overlay
from bagscope.wsi.exif_thumbnail import extract
from bagscope.wsi.geojson import COLOURS
from bagscope.wsi.outline import MaskFrame
from bagscope.wsi.overlay import KeptTiles

SHAPE = (400, 600)
FRAME = MaskFrame(shape=SHAPE, origin_x_l0=1000, origin_y_l0=500, px_l0_x=32, px_l0_y=32)
GREY = np.full((*SHAPE, 3), 200, np.uint8)
NOTHING = np.zeros(SHAPE, bool)


def block(rows, columns) -> np.ndarray:
    mask = NOTHING.copy()
    mask[rows, columns] = True
    return mask


def near(picture, colour) -> np.ndarray:
    return np.abs(picture.astype(int) - colour).max(axis=2) < 40


def test_the_outline_follows_the_edge_of_the_mask():
    tissue = block(slice(100, 300), slice(150, 450))
    picture = overlay.draw(GREY, tissue, NOTHING, NOTHING, FRAME, edge_px=1200)
    assert picture.shape == (800, 1200, 3)
    large = cv2.resize(tissue.astype(np.uint8), (1200, 800), interpolation=cv2.INTER_NEAREST)
    ring = np.ones((9, 9), np.uint8)
    edge = (cv2.dilate(large, ring) - cv2.erode(large, ring)).astype(bool)
    line = near(picture, COLOURS["Tissue"])
    assert line.any()
    assert not line[~edge].any()
    # Nothing but outlines is drawn: the tissue itself keeps its colour.
    assert (picture[~edge] == 200).all()
    # Every point of the mask's edge has the line within reach.
    border = large - cv2.erode(large, np.ones((3, 3), np.uint8))
    assert cv2.dilate(line.astype(np.uint8), ring)[border.astype(bool)].all()


def test_pen_and_folds_are_tinted_in_their_colours():
    pen, fold = block(slice(10, 60), slice(10, 60)), block(slice(200, 300), slice(200, 300))
    picture = overlay.draw(GREY, NOTHING, pen, fold, FRAME, edge_px=600)
    for name, (y, x) in {"Pen": (35, 35), "Fold": (250, 250)}.items():
        expected = 200 * 0.65 + np.array(COLOURS[name]) * 0.35
        assert np.abs(picture[y, x] - expected).max() <= 1
    assert (picture[150, 500] == 200).all()


@pytest.mark.parametrize("edge_px", [300, 600, 1600])
def test_kept_tiles_are_tinted_where_they_lie(edge_px):
    corners = np.array([[1000 + 32 * 64, 500 + 32 * 128], [1000 + 32 * 96, 500 + 32 * 128]])
    tiles = KeptTiles(corners_l0=corners.astype(np.int32), extent_l0=32 * 32)
    picture = overlay.draw(
        GREY, NOTHING, NOTHING, NOTHING, FRAME, tiles=tiles, edge_px=edge_px
    )  # fmt: skip
    tinted = (picture != 200).any(axis=2)
    scale = edge_px / 600
    rows, columns = np.flatnonzero(tinted.any(axis=1)), np.flatnonzero(tinted.any(axis=0))
    found = [rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]
    assert (
        np.abs(np.array(found) - np.array([128, 160, 64, 128]) * scale).max() <= 1.5
    )  # borders are a pixel wide
    assert tinted.sum() == pytest.approx(32 * 64 * scale**2, rel=0.1)


def test_tiles_that_overhang_the_picture_are_cut_off():
    corners = np.array([[0, 0], [1000 + 32 * 590, 500 + 32 * 390]], np.int32)
    tiles = KeptTiles(corners_l0=corners, extent_l0=2000.0)
    picture = overlay.draw(GREY, NOTHING, NOTHING, NOTHING, FRAME, tiles=tiles, edge_px=600)
    assert (picture[-1, -1] != 200).any()
    assert (picture[0, 0] != 200).any()


@given(st.integers(100, 4000), st.floats(0.1, 100))
def test_the_scale_bar_is_round_fits_and_says_its_length(width_px, mpp):
    bar_px, label = overlay.scale_bar(width_px, mpp)
    number, unit = label.split()
    length_um = float(number) * {"mm": 1000, "µm": 1}[unit]
    assert bar_px * mpp == pytest.approx(length_um)
    assert width_px / 10 * 0.999 <= bar_px <= width_px / 4 * 1.001
    assert float(f"{length_um:.0e}") == pytest.approx(length_um)
    assert f"{length_um:.0e}"[0] in "125"


def test_the_drawn_bar_has_the_length_that_its_label_states():
    picture = overlay.draw(GREY, NOTHING, NOTHING, NOTHING, FRAME, mpp=8.0, edge_px=1600)
    dark = (picture < 60).all(axis=2)
    longest = max(
        (len(run) for row in dark for run in "".join("x "[not p] for p in row).split()), default=0
    )
    bar_px, label = overlay.scale_bar(1600, 8.0 * 600 / 1600)
    assert label == "1 mm"
    assert abs(longest - bar_px) <= 1
    assert not (overlay.draw(GREY, NOTHING, NOTHING, NOTHING, FRAME) < 60).any()


def test_tiny_and_odd_overviews_are_drawn():
    for shape in ((1, 1), (3, 200), (200, 3)):
        frame = MaskFrame(shape=shape, origin_x_l0=0, origin_y_l0=0, px_l0_x=9, px_l0_y=9)
        mask = np.ones(shape, bool)
        picture = overlay.draw(
            np.zeros((*shape, 3), np.uint8), mask, mask, mask, frame, mpp=4.0
        )  # fmt: skip
        assert picture.shape[:2] == (shape[0] * 4, shape[1] * 4)


def test_the_file_holds_the_picture_and_a_small_one():
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 255, (*SHAPE, 3), np.uint8)  # the worst that JPEG can meet
    tissue = block(slice(100, 300), slice(150, 450))
    encoded = overlay.encode_overview(noisy, tissue, NOTHING, NOTHING, FRAME, mpp=8.0)
    small = extract(encoded)
    assert len(small) <= overlay.THUMBNAIL_BYTES
    assert simplejpeg.decode_jpeg(encoded).shape == (1067, 1600, 3)
    assert max(simplejpeg.decode_jpeg(small).shape) <= overlay.THUMBNAIL_EDGE_PX
    assert encoded == overlay.encode_overview(noisy, tissue, NOTHING, NOTHING, FRAME, mpp=8.0)


def test_an_even_thumbnail_keeps_its_size_and_colour():
    even = np.full((360, 240, 3), (10, 158, 115), np.uint8)
    decoded = simplejpeg.decode_jpeg(overlay.encode_thumbnail(even))
    assert decoded.shape == even.shape
    assert np.abs(decoded.astype(int) - even).max() <= 3


def test_the_callers_pictures_are_left_alone():
    rgb, tissue = GREY.copy(), block(slice(0, 90), slice(0, 90))
    overlay.draw(rgb, tissue, NOTHING, NOTHING, FRAME, mpp=8.0, edge_px=600)
    assert (rgb == 200).all()
