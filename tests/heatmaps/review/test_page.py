"""The slide view of the review page, driven in a real browser from `file://`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.heatmaps.review import page_test_bundle as made
from tests.heatmaps.review.browsing import chromium, settled, wait_until, watched_page

BOARD, ALONE, WARNED, NO_TILES, LOST = "board", "case-7#2 (a)", "warned", "no_tiles", "lost"
HOSTILE = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"
GLASS_RGB = np.array([0xE4, 0xE6, 0xE9])
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five slides: a checkerboard, tiles alone, one with a warning, one without tiles, one lost."""
    folder = tmp_path_factory.mktemp("bundle with a space")
    board, picture = made.checkerboard(BOARD)
    coords = np.array([[0, 0], [512, 0], [5_000, 3_000], [5_200, 3_100]])
    layer = made.layer_data("ratio", "tumor: attention", np.array([4, 0.25, 1, 4]), made.RED_LUT)
    alone = made.slide_data(ALONE, coords, [layer])
    sentence = f"Random tiles move the answer as much. {HOSTILE}"
    curves = {
        "shares": [0.0, 0.5, 1.0], "deletion": [0.9, 0.5, 0.1], "insertion": [0.1, 0.5, 0.9],
        "random_deletion": [0.9, 0.5, 0.1], "random_insertion": [0.1, 0.5, 0.9],
    }  # fmt: skip
    faith = {"score": 0.02, "warning": sentence, "text": HOSTILE, "curves": curves}
    ring = [[0, 0], [3_000, 0], [3_000, 3_000], [0, 3_000]]
    warned = made.slide_data(
        WARNED, coords,
        [{**layer, "title": HOSTILE, "meaning": HOSTILE, "unit_text": HOSTILE},
         {**layer, "id": "own", "faithfulness": {**faith, "warning": "", "text": "It drives it."}}],
        mpp=None, faithfulness=faith, notes=[HOSTILE], frame_note=HOSTILE,
        agreement=f"Two models agree. {HOSTILE}",
        annotations=[{"class": HOSTILE, "polygons": [[ring]]}],
    )  # fmt: skip
    no_tiles = made.slide_data(NO_TILES, np.empty((0, 2)), [])
    slides = [board, alone, warned, no_tiles]
    rows = [
        made.cohort_row(number, key=key, slide=key, correct=None)
        for number, key in enumerate([*(slide["key"] for slide in slides), LOST])
    ]
    rows[2] |= {"slide": HOSTILE, "patient": HOSTILE, "notes": [HOSTILE], "correct": False}
    rows[2]["verdicts"] = [{"verdict": "agree", "comment": HOSTILE, "reviewer": HOSTILE}]
    cohort = made.cohort_data(rows, title=HOSTILE, headline=[HOSTILE], notes=[HOSTILE])
    made.write_bundle(folder, cohort, slides, {BOARD: picture})
    for entry in board["gallery"]:
        made.write_jpeg(folder / entry["image"], picture[:100, :100])
    return folder


def open_at(page: Any, bundle: Path, place: str = "") -> None:
    page.goto((bundle / "index.html").as_uri() + place)
    if place:
        key = unquote(place.removeprefix("#slide/").split("?")[0])
        wait_until(page, f"bagscope.isViewReady() && bagscope.currentSlide().key === '{key}'")


def show_only_the_slide(page: Any) -> None:
    page.evaluate(
        "document.querySelectorAll('#viewport .card, #viewport .tools')"
        ".forEach((card) => (card.style.visibility = 'hidden'))"
    )


def set_opacity(page: Any, percent: int) -> None:
    page.locator("#opacity").fill(str(percent))


def disagrees(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> bool:
    """Return whether two maps differ anywhere by more than the pixel in which an edge lies."""
    thick = cv2.morphologyEx((first ^ second).astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2)))
    return bool(thick.any())


def assert_lies_on_the_picture(page: Any) -> None:
    set_opacity(page, 100)
    page.keyboard.press("1")
    heat = settled(page).astype(int)
    set_opacity(page, 0)
    picture = settled(page).astype(int)
    # A tile of the picture is black or white, of the heatmap blue or red, the glass grey.
    has_tile = np.ptp(heat, axis=2) > 100
    on_slide = np.abs(picture - GLASS_RGB).max(axis=2) > 3
    white = picture.mean(axis=2) > 127
    red = heat[..., 0] > heat[..., 2]
    assert not disagrees(has_tile, on_slide)
    assert not disagrees(red & has_tile, white & on_slide)
    # Enough of both to be worth something, and a shift by two pixels would be seen.
    assert min((white & on_slide).mean(), (~white & on_slide).mean()) > 0.05
    assert disagrees(np.roll(red & has_tile, 2, axis=1), white & on_slide)


VIEWS = {
    1: [
        "x=5600&y=3600&zoom=0.0613",
        "x=4000&y=3000&zoom=0.0913",
        "x=2100&y=1700&zoom=0.05&rotation=90",
        "x=5000&y=3500&zoom=0.1234&rotation=30",
    ],
    2: ["x=9700&y=6400&zoom=0.3771"],
}


@pytest.mark.parametrize("pixels_per_css_px", VIEWS)
def test_overlay_lies_on_its_tile_to_the_pixel(
    browser: Any, bundle: Path, pixels_per_css_px: int
) -> None:
    options = {
        "viewport": {"width": 920, "height": 520}, "reduced_motion": "reduce",
        "device_scale_factor": pixels_per_css_px,
    }  # fmt: skip
    with watched_page(browser, bundle, **options) as page:
        open_at(page, bundle, f"#slide/{BOARD}")
        show_only_the_slide(page)
        for view in VIEWS[pixels_per_css_px]:
            page.evaluate(f"location.hash = '#slide/{BOARD}?{view}'")
            assert_lies_on_the_picture(page)
            assert view in page.url


def test_overlay_stays_on_its_tile_when_moved_by_hand(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle, viewport={"width": 920, "height": 520}) as page:
        open_at(page, bundle, f"#slide/{BOARD}")
        show_only_the_slide(page)
        page.mouse.move(300, 300)
        for _ in range(4):
            page.mouse.wheel(0, -120)
            page.wait_for_timeout(60)
        page.mouse.down()
        page.mouse.move(411, 267, steps=4)
        page.mouse.up()
        page.set_viewport_size({"width": 903, "height": 471})
        # Tiles under the pointer have an outline.
        page.mouse.move(2, 2)
        assert_lies_on_the_picture(page)
        # Where a tile has no score, the picture is seen.
        white = settled(page).min(axis=2) > 240
        page.keyboard.press("3")
        set_opacity(page, 100)
        assert not disagrees(np.ptp(settled(page).astype(int), axis=2) > 100, white)


def colour_at(page: Any, x_l0: float, y_l0: float) -> Pixels:
    """Return the colour of the screen at a level-0 place; the page says where the view lies."""
    pixels = settled(page)
    view = page.evaluate("bagscope.view()")
    height, width = pixels.shape[:2]
    column = width / 2 + (x_l0 - view["x"]) * view["zoom"]
    row = height / 2 + (y_l0 - view["y"]) * view["zoom"]
    return pixels[round(row), round(column)]


def middle_of(column: int, row: int) -> tuple[float, float]:
    edge = made.SQUARE_PX * made.DOWNSAMPLE
    x_l0, y_l0 = made.PICTURE_CORNER_L0
    return x_l0 + (column + 0.5) * edge, y_l0 + (row + 0.5) * edge


WHITE, BLACK = middle_of(12, 8), middle_of(13, 8)


def test_opacity_class_switch_and_toggle(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        open_at(page, bundle, f"#slide/{BOARD}")
        assert page.locator("#legend-title").inner_text() == "tumor: attention"
        slider = page.locator("#opacity")
        slider.fill("50")
        np.testing.assert_allclose(colour_at(page, *WHITE), [255, 127.5, 127.5], atol=3)
        np.testing.assert_allclose(colour_at(page, *BLACK), [0, 0, 127.5], atol=3)
        page.keyboard.press("]")
        assert slider.input_value() == "60"
        page.keyboard.press("h")
        np.testing.assert_allclose(colour_at(page, *WHITE), 255, atol=3)
        page.keyboard.press("h")
        slider.fill("100")
        np.testing.assert_allclose(colour_at(page, *WHITE), [255, 0, 0], atol=3)
        page.get_by_role("radio", name="normal: attention").check()
        np.testing.assert_allclose(colour_at(page, *WHITE), [0, 0, 255], atol=3)
        assert page.locator("#legend-title").inner_text() == "normal: attention"
        page.keyboard.press("3")
        np.testing.assert_allclose(colour_at(page, *BLACK), 0, atol=3)


def test_gallery_tile_jumps_to_its_place_and_marks_it(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        open_at(page, bundle, f"#slide/{BOARD}")
        before = page.evaluate("bagscope.view()")
        button = page.get_by_role("button", name=re.compile("^Lowest 2:"))
        tile = int(button.get_attribute("data-tile"))
        button.click()
        settled(page)
        row, column = divmod(tile, made.SQUARES_ACROSS)
        view = page.evaluate("bagscope.view()")
        np.testing.assert_allclose((view["x"], view["y"]), middle_of(column, row), atol=2)
        assert view["zoom"] > 1.5 * before["zoom"]
        assert button.get_attribute("aria-current") == "true"
        assert page.locator("#marked-image").evaluate("(image) => image.naturalWidth") == 100
        # The mark's white line runs around the tile.
        edge_l0 = made.SQUARE_PX * made.DOWNSAMPLE
        on_edge = colour_at(page, view["x"] + edge_l0 / 2, view["y"])
        np.testing.assert_array_equal(on_edge, 255)
        page.keyboard.press("Escape")
        assert not page.locator("#marked").is_visible()


def test_value_and_place_under_the_pointer(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        open_at(page, bundle, f"#slide/{BOARD}?layer=squares&x=6000&y=4000&zoom=0.1")
        box = page.locator("#viewport").bounding_box()
        x_l0, y_l0 = WHITE
        page.mouse.move(
            box["x"] + box["width"] / 2 + (x_l0 - 6000) * 0.1,
            box["y"] + box["height"] / 2 + (y_l0 - 4000) * 0.1,
        )
        assert page.locator("#readout-score").inner_text() == "4 × uniform"
        said = page.locator("#readout-place").inner_text().replace(",", "")
        seen = [int(number) for number in re.findall(r"\d+", said.replace("level 0", ""))]
        # At this zoom a screen pixel is ten of level 0.
        np.testing.assert_allclose(seen[:2], WHITE, atol=10)
        np.testing.assert_allclose(seen[2:], np.multiply(WHITE, 0.25), atol=3)
        # Above the picture, whose corner is 3400 level-0 pixels above the middle of the view.
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 - 345)
        assert page.locator("#readout-score").inner_text() == "no tile"


def test_scale_bar_has_the_length_that_it_says(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        open_at(page, bundle, f"#slide/{BOARD}?x=6000&y=4000&zoom=0.1")
        said = page.locator("#scale-text").inner_text()
        bar_px = page.locator("#scale-bar").bounding_box()["width"]
        assert said == "200 µm"
        assert bar_px == pytest.approx(200 / 0.25 * 0.1, abs=0.5)
        open_at(page, bundle, f"#slide/{WARNED}")
        wait_until(page, "document.getElementById('scale-text').innerText.includes('level 0')")


def test_tiles_are_drawn_alone_where_there_is_no_picture(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        open_at(page, bundle, f"#slide/{quote(ALONE)}?layer=ratio&x=2800&y=1700&zoom=0.15")
        set_opacity(page, 100)
        for place, colour in [((256, 256), [255, 0, 0]), ((768, 256), [0, 0, 255])]:
            np.testing.assert_allclose(colour_at(page, *place), colour, atol=3)
        # Off a lattice the highest of the tiles over a place is the one that is seen, and read.
        np.testing.assert_allclose(colour_at(page, 5_300, 3_200), [255, 0, 0], atol=3)
        np.testing.assert_allclose(colour_at(page, 5_100, 3_050), [128, 0, 127], atol=3)
        np.testing.assert_allclose(colour_at(page, 2_800, 1_000), 255, atol=3)
        assert "no picture" in page.locator("#slide-notes").inner_text()


def test_overlapping_tiles_show_their_mean(browser: Any, bundle: Path) -> None:
    rng = np.random.default_rng(3)
    grid = np.argwhere(rng.random((9, 13)) < 0.7)[:, ::-1]
    # A step that is no whole number of pixels, as a lattice at an odd pixel size has it.
    step, size = 100.4, 200.8
    coords = np.round(grid * step).astype(int) + np.array([70, 30])
    values = rng.random(len(grid)).astype(np.float32)
    tiles = {"count": len(grid), "size_l0": size, "coords": made.base64_of(coords, "<i4")}
    layer = made.layer_data("x", "x", values, made.RED_LUT, low=0, high=1, log=False)
    points = rng.uniform(0, (1_500, 1_100), (300, 2))
    from_edge = np.minimum(
        np.abs(points[:, None] - coords), np.abs(points[:, None] - coords - size)
    ).min(axis=(1, 2))
    # Corners are rounded to whole pixels, so by an edge either side is right.
    points = points[from_edge > 1]
    inside = ((points[:, None] >= coords) & (points[:, None] < coords + size)).all(axis=2)
    with watched_page(browser, bundle) as page:
        open_at(page, bundle)
        read, colours = page.evaluate(
            """([tiles, layer, points]) => {
              const map = new bagscope.TileMap(tiles);
              const values = bagscope.float32sOf(layer.values);
              const image = map.image(layer, values, bagscope.bytesOf(layer.lut));
              const { width, height } = image;
              const { data } = image.getContext("2d").getImageData(0, 0, width, height);
              const { across, down } = map.lattice;
              const cell = (axis, place) => Math.floor((place - axis.first) / axis.step);
              return [
                points.map(([x, y]) => map.scoreAt(x, y, values)?.value ?? null),
                points.map(([x, y]) => data[4 * (cell(down, y) * width + cell(across, x))] ?? null),
              ];
            }""",
            [tiles, layer, points.tolist()],
        )
    assert len(points) > 100
    assert inside.sum(axis=1).max() == 4
    for over, value, red in zip(inside, read, colours, strict=True):
        if not over.any():
            assert value is None
            continue
        mean = values[over].mean(dtype=np.float64)
        assert value == pytest.approx(mean)
        assert abs(red - np.floor(256 * mean)) <= 1


def test_deep_link_leads_to_layer_and_place_and_follows_the_view(
    browser: Any, bundle: Path
) -> None:
    with watched_page(browser, bundle) as page:
        open_at(page, bundle, f"#slide/{BOARD}?layer=inverse&x=7000&y=2000&zoom=0.25&rotation=90")
        wanted = {"layer": "inverse", "x": 7000, "y": 2000, "zoom": 0.25, "rotation": 90}
        assert page.evaluate("bagscope.view()") == wanted
        settled(page)  # tiles on their way to a layer that is left make the viewer warn
        page.keyboard.press("1")
        page.keyboard.press("r")
        settled(page)
        link = page.url
        assert "layer=squares" in link and "rotation=180" in link
        page.goto("about:blank")
        page.goto(link)
        wait_until(page, "bagscope.isViewReady()")
        assert page.evaluate("bagscope.view()") == wanted | {"layer": "squares", "rotation": 180}
        settled(page)
        page.goto((bundle / "index.html").as_uri() + "#slide/nobody")
        assert "no slide nobody" in page.locator("#fault").inner_text()


def test_warning_is_plain_to_see_and_hostile_text_is_only_text(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        open_at(page, bundle)
        assert HOSTILE in page.locator("#slides").inner_text()
        open_at(page, bundle, f"#slide/{WARNED}")
        warning = page.locator("#warning")
        assert "Random tiles move the answer" in warning.inner_text()
        assert warning.bounding_box()["y"] < 120
        for place in ("slide-title", "slide-notes", "legend-title", "legend-annotations", "others",
                      "layers", "faithfulness"):  # fmt: skip
            assert HOSTILE in page.locator(f"#{place}").inner_text(), place
        assert page.locator("#faithfulness svg").count() == 2
        assert page.evaluate("window.hacked") is None
        assert page.locator("img[src='x']").count() == 0
        # What is said is said of the layer that is shown.
        page.keyboard.press("2")
        assert not warning.is_visible()
        beside = page.locator("#faithfulness").inner_text()
        assert "It drives it." in beside and f"Two models agree. {HOSTILE}" in beside
        page.keyboard.press("1")
        assert warning.is_visible()
        page.keyboard.press("u")
        open_at(page, bundle, f"#slide/{quote(ALONE)}")
        assert not warning.is_visible()
        assert page.evaluate("window.hacked") is None


def test_annotations_are_drawn_and_can_be_hidden(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        open_at(page, bundle, f"#slide/{WARNED}?x=2800&y=1700&zoom=0.15")
        on_line = (3_000, 1_500)
        shown = colour_at(page, *on_line)
        page.keyboard.press("a")
        hidden = colour_at(page, *on_line)
        np.testing.assert_array_equal(hidden, 255)
        assert np.ptp(shown) > 100


def test_slide_without_tiles_and_slide_without_data(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        open_at(page, bundle, f"#slide/{NO_TILES}")
        assert not page.locator("#legend").is_visible()
        assert page.locator("#prediction").is_visible()
    with watched_page(browser, bundle, "ERR_FILE_NOT_FOUND") as page:
        page.goto((bundle / "index.html").as_uri() + f"#slide/{LOST}")
        page.locator("#fault").wait_for()
        assert "slides/lost/slide.js could not be read" in page.locator("#fault").inner_text()


def test_reduced_motion_moves_at_once(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle, reduced_motion="reduce") as page:
        open_at(page, bundle, f"#slide/{BOARD}")
        page.get_by_role("button", name=re.compile("^Highest 1:")).click()
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        view = page.evaluate("bagscope.view()")
        settled(page)
        assert page.evaluate("bagscope.view()") == view


def test_link_is_followed_though_the_view_changes_at_that_moment(
    browser: Any, bundle: Path
) -> None:
    wanted = {"layer": "inverse", "x": 7000, "y": 2000, "zoom": 0.25}
    with watched_page(browser, bundle, reduced_motion="reduce") as page:
        open_at(page, bundle, f"#slide/{BOARD}")
        # The page hears of an address only later; a key arrives before it does.
        page.evaluate(
            """(hash) => {
              location.hash = hash;
              const press = new KeyboardEvent("keydown", { key: "1", bubbles: true });
              document.body.dispatchEvent(press);
            }""",
            f"#slide/{BOARD}?layer=inverse&x=7000&y=2000&zoom=0.25",
        )
        settled(page)
        view = page.evaluate("bagscope.view()")
        assert {name: view[name] for name in wanted} == wanted
        assert "layer=inverse&x=7000&y=2000&zoom=0.25" in page.url
