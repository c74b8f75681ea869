from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bagscope.heatmaps.colours import ColourScale, shared_scale
from bagscope.heatmaps.overview import (
    Caption,
    blend,
    draw_overview,
    picture_frame,
    slide_picture,
)
from bagscope.heatmaps.raster import raster
from bagscope.wsi.opening import open_slide
from tests.builders import build_svs
from tests.heatmaps.made import made_places

SIDE = 64


@pytest.fixture
def colours() -> ColourScale:
    return shared_scale("ratio", "log_weight", [(0.3, 3.0)])


def checkerboard(columns: int, rows: int) -> NDArray[np.bool_]:
    return (np.indices((rows, columns)).sum(axis=0) % 2).astype(bool)


def find(page: NDArray[np.uint8], part: NDArray[np.uint8]) -> tuple[int, int]:
    """Return where on a page a part lies, every pixel of it alike; fails where it does not."""
    height, width = part.shape[:2]
    starts = np.argwhere((page[: -height + 1, : -width + 1] == part[0, 0]).all(axis=2))
    for row, column in starts:
        if np.array_equal(page[row : row + height, column : column + width], part):
            return int(row), int(column)
    raise AssertionError("the part is nowhere on the page")


def test_the_overlay_lies_on_its_tiles_to_the_pixel(tmp_path: Path, colours: ColourScale) -> None:
    board = checkerboard(12, 9)
    dark = np.repeat(np.repeat(board, SIDE, axis=0), SIDE, axis=1)
    image = np.where(dark[..., None], (120, 40, 90), (250, 250, 250)).astype(np.uint8)
    build_svs(tmp_path / "board.svs", image=image, subsampling="4:4:4", quality=95, tile_px=SIDE)
    # The dark squares are the tiles: any shift shows glass in colour, or tissue in grey.
    places = made_places(12, 9, extent_l0=SIDE, keep=board.ravel())
    values = np.linspace(0.4, 3, len(places))
    frame = picture_frame(places, longest_px=384)
    with open_slide(tmp_path / "board.svs") as slide:
        rgb = slide_picture(slide, frame)
    seen_dark = rgb[..., 1] < 145
    np.testing.assert_array_equal(seen_dark, ~np.isnan(raster(places, values, frame)))
    drawn = draw_overview(places, values, colours, Caption(slide_id="b"), rgb=rgb, frame=frame)
    page = np.asarray(Image.open(io.BytesIO(drawn["png"])).convert("RGB"))
    find(page, blend(rgb, raster(places, values, frame), colours))


def test_a_picture_has_its_frame_whatever_the_slide_covers(tmp_path: Path) -> None:
    image = np.zeros((300, 400, 3), np.uint8)
    image[:, 200:] = 200
    build_svs(tmp_path / "half.svs", image=image, subsampling="4:4:4", downsamples=(1,))
    places = made_places(3, 2, extent_l0=200, origin_l0=(100.0, 0.0))
    frame = places.frame(4)
    with open_slide(tmp_path / "half.svs") as slide:
        rgb = slide_picture(slide, frame)
    assert rgb.shape == (8, 12, 3)
    assert (rgb[:6, :2] < 20).all()
    assert (abs(rgb[:6, 2:6].astype(int) - 200) < 20).all()
    assert (rgb[:, 6:] == 255).all()
    assert (rgb[6:] == 255).all()


def words(svg: bytes) -> str:
    return " ".join("".join(part.itertext()) for part in ElementTree.fromstring(svg).iter())


def test_the_page_says_what_it_shows(colours: ColourScale) -> None:
    places = made_places(8, 5, extent_l0=512, mpp=0.25)
    caption = Caption(
        slide_id="case-7", prediction="predicted tumor (0.93)", of="tumor", source="run abmil"
    )
    drawn = draw_overview(places, np.ones(40), colours, caption, formats=("svg", "png"))
    said = words(drawn["svg"])
    for told in ("case-7", "predicted tumor (0.93)", "tumor", "run abmil", "40 tiles", "1/4", "4×"):
        assert told in said
    assert re.search(r"\d+ µm", said)
    again = draw_overview(places, np.ones(40), colours, caption, formats=("svg", "png"))
    assert again == drawn


def test_a_lattice_alone_is_drawn_on_white_and_without_a_scale_bar(colours: ColourScale) -> None:
    places = made_places(4, 4, mpp=None, keep=checkerboard(4, 4).ravel())
    drawn = draw_overview(places, np.ones(8), colours, Caption(slide_id="x"), formats=("svg",))
    assert "µm" not in words(drawn["svg"])
    picture = blend(None, raster(places, np.ones(8), places.frame(8)), colours)
    by_tile = picture.reshape(4, 8, 4, 8, 3).transpose(0, 2, 1, 3, 4)
    empty = by_tile[~checkerboard(4, 4)]
    assert (empty[:, 1:-1, 1:-1] == 255).all()
    # A line around the tiles tells pale ones from none.
    assert (empty[:, 0] < 200).any()
    assert len(np.unique(by_tile[checkerboard(4, 4)].reshape(-1, 3), axis=0)) == 1


def test_a_single_tile_has_its_picture(colours: ColourScale) -> None:
    places = made_places(1, 1)
    drawn = draw_overview(places, np.array([1.0]), colours, Caption(slide_id="one"))
    page = Image.open(io.BytesIO(drawn["png"]))
    assert min(page.size) > 400
