"""The table of slides, the keyboard and the looks of the review page, in a real browser."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.heatmaps.review import page_test_bundle as made
from tests.heatmaps.review.browsing import chromium, wait_until, watched_page

SLIDES = 1_000
PAINTED_MS = 200
SIZES = [(1366, 768), (1024, 768), (820, 1180)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def rows() -> list[made.Json]:
    return [made.cohort_row(number) for number in range(SLIDES)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, rows: list[made.Json]) -> Path:
    """A thousand slides, of which the first three in the table's own order can be opened."""
    folder = tmp_path_factory.mktemp("cohort")
    board, picture = made.checkerboard("slide_0000")
    ring = [[1_000, 1_000], [9_000, 1_000], [9_000, 7_000], [1_000, 7_000]]
    faith = {"score": 0.02, "warning": "Random tiles move the answer as much.", "text": "Low."}
    shares = np.linspace(0, 1, 5).tolist()
    names = ("deletion", "insertion", "random_deletion", "random_insertion")
    faith["curves"] = {"shares": shares, **dict.fromkeys(names, shares)}
    board |= {"faithfulness": faith, "annotations": [{"class": "tumor", "polygons": [[ring]]}]}
    slides = [board] + [
        {**board, "key": key, "gallery": [], "picture": None, "faithfulness": None}
        for key in ("slide_0003", "slide_0006")
    ]
    made.write_bundle(folder, made.cohort_data(rows), slides, {"slide_0000": picture})
    for entry in board["gallery"]:
        made.write_jpeg(folder / entry["image"], picture[:100, :100])
    return folder


def open_table(page: Any, bundle: Path) -> None:
    page.goto((bundle / "index.html").as_uri())


def shown_slides(page: Any) -> list[str]:
    """Return the slides in sight, in order; the table makes only these."""
    return page.locator("#slides-body .slide-link").all_inner_texts()


def test_misclassified_come_first(browser: Any, bundle: Path, rows: list[made.Json]) -> None:
    wrong = [row["slide"] for row in rows if row["correct"] is False]
    with watched_page(browser, bundle) as page:
        open_table(page, bundle)
        first = shown_slides(page)
        assert 8 < len(first) < 60
        assert first == wrong[: len(first)]
        assert page.locator("#filter-count").inner_text() == "1,000 slides"
        # The end of the table is where the right ones are.
        page.locator("#table-scroll").evaluate("(area) => (area.scrollTop = 1e9)")
        wait_until(page, "document.querySelector('#slides-body').innerText.includes('slide_0998')")
        assert not set(shown_slides(page)) & set(wrong)


def test_each_column_sorts_both_ways(browser: Any, bundle: Path, rows: list[made.Json]) -> None:
    keys = {
        "Slide": lambda row: row["slide"],
        "Patient": lambda row: row["patient"],
        "Fold": lambda row: row["fold"],
        "Truth": lambda row: row["truth"]["label"],
        "Predicted": lambda row: row["predicted"]["label"]["value"],
        "Outcome": lambda row: row["correct"],
        "Faithful": lambda row: row["faithfulness"]["score"],
        "Unlike training": lambda row: not row["ood"],
        "Tiles": lambda row: row["tiles"],
    }
    script = """async () => {
      const seen = {};
      for (const head of [...document.querySelectorAll("th")]) {
        for (const _ of [0, 1]) {
          head.firstChild.click();
          const slides = [...document.querySelectorAll(".slide-link")].map((one) => one.innerText);
          seen[`${head.innerText.match(/[A-Za-z ]+/)[0].trim()} ${head.ariaSort}`] = slides;
        }
      }
      return seen;
    }"""
    with watched_page(browser, bundle) as page:
        open_table(page, bundle)
        seen = page.evaluate(script)
    for name, key in keys.items():
        by_name = {row["slide"]: key(row) for row in rows}
        for order in ("ascending", "descending"):
            best = sorted(map(key, rows), reverse=order == "descending")
            slides = seen[f"{name} {order}"]
            assert len(slides) > 8
            assert [by_name[slide] for slide in slides] == best[: len(slides)], (name, order)


def test_filters(browser: Any, bundle: Path, rows: list[made.Json]) -> None:
    choices = [
        ("#filter-outcome", "wrong", lambda row: row["correct"] is False),
        ("#filter-truth", "tumor", lambda row: row["truth"]["label"] == "tumor"),
        ("#filter-predicted", "normal", lambda row: row["predicted"]["label"]["text"] == "normal"),
        ("#filter-warning", True, lambda row: row["faithfulness"]["warning"] != ""),
        ("#filter-ood", True, lambda row: row["ood"]),
    ]
    with watched_page(browser, bundle) as page:
        open_table(page, bundle)
        left = rows
        for field, value, fits in choices:
            control = page.locator(field)
            if value is True:
                control.check()
            else:
                control.select_option(value)
            left = [row for row in left if fits(row)]
            assert left
            assert page.locator("#filter-count").inner_text() == f"{len(left)} of 1,000 slides"
            seen = shown_slides(page)
            assert seen == [row["slide"] for row in left][: len(seen)]
        page.locator("#filter-clear").click()
        page.locator("#filter-text").fill("PATIENT_012")
        assert shown_slides(page) == ["slide_0024", "slide_0025"]
        page.locator("#filter-text").fill("nobody")
        assert page.locator("#slides-none").is_visible()


def test_filter_and_sort_are_painted_at_once(browser: Any, bundle: Path) -> None:
    script = """async (change) => {
      const begin = performance.now();
      if (change.sort) document.querySelector(`th.of-${change.sort} button`).click();
      else {
        const field = document.getElementById(change.field);
        field.value = change.value;
        field.dispatchEvent(new Event("input", { bubbles: true }));
      }
      // The first frame after the change runs before it is painted, the second after.
      await new Promise(requestAnimationFrame);
      await new Promise(requestAnimationFrame);
      return performance.now() - begin;
    }"""
    changes = [
        {"sort": "slide"}, {"field": "filter-text", "value": "7"}, {"sort": "predicted"},
        {"field": "filter-outcome", "value": "right"}, {"field": "filter-text", "value": ""},
        {"sort": "tiles"}, {"field": "filter-outcome", "value": ""},
    ]  # fmt: skip
    with watched_page(browser, bundle) as page:
        open_table(page, bundle)
        took_ms = [page.evaluate(script, change) for change in changes]
    assert statistics.median(took_ms) < PAINTED_MS, took_ms


def test_keyboard_leads_everywhere(browser: Any, bundle: Path) -> None:
    press = "document.activeElement"
    with watched_page(browser, bundle) as page:
        keyboard = page.keyboard
        open_table(page, bundle)
        keyboard.press("?")
        assert page.locator("#help").is_visible()
        keyboard.press("Escape")
        assert not page.locator("#help").is_visible()
        keyboard.press("/")
        assert page.evaluate(f"{press}.id") == "filter-text"
        keyboard.press("Escape")
        for key in ("j", "ArrowDown"):
            keyboard.press(key)
        assert page.evaluate(f"{press}.innerText") == "slide_0003"
        keyboard.press("k")
        assert page.evaluate(f"{press}.innerText") == "slide_0000"
        keyboard.press("Enter")
        wait_until(page, "bagscope.isViewReady() && bagscope.currentSlide().key === 'slide_0000'")
        keyboard.press("g")
        keyboard.press("ArrowRight")
        assert page.evaluate(f"{press}.getAttribute('aria-label')").startswith("Highest 2:")
        keyboard.press("Enter")
        assert page.locator("#marked").is_visible()
        keyboard.press("Escape")
        assert not page.locator("#marked").is_visible()
        keyboard.press("f")
        assert not page.locator("#panel").is_visible()
        assert page.locator("#viewport").bounding_box()["width"] == 1366
        keyboard.press("v")
        keyboard.press("Space")
        assert page.locator("#verdict-choices input:checked").get_attribute("value") == "agree"
        keyboard.press("c")
        page.keyboard.type("jk h ?")
        assert page.locator("#comment").input_value() == "jk h ?"
        keyboard.press("Escape")
        keyboard.press("j")
        wait_until(page, "bagscope.isViewReady() && bagscope.currentSlide().key === 'slide_0003'")
        assert page.locator("#comment").input_value() == ""
        keyboard.press("u")
        wait_until(page, f"{press}.innerText === 'slide_0003'")
        assert page.locator("#progress-text").inner_text() == "1 of 1,000 reviewed"


@pytest.mark.parametrize("place", ["", "#slide/slide_0000"])
def test_tab_reaches_every_control_and_shows_where_it_is(
    browser: Any, bundle: Path, place: str
) -> None:
    with watched_page(browser, bundle) as page:
        page.goto((bundle / "index.html").as_uri() + place)
        if place:
            wait_until(page, "bagscope.isViewReady()")
        wanted = page.evaluate(
            """[...document.querySelectorAll("button, select, input, textarea, a")]
              .filter((one) => one.checkVisibility() && !one.disabled && !one.closest("tbody"))
              .filter((one) => one.type !== "radio" || one.checked).map((one) => one.id)"""
        )
        left = {name for name in wanted if name}
        for _ in range(80):
            page.keyboard.press("Tab")
            name, outline = page.evaluate(
                """(() => {
                  const one = document.activeElement;
                  const seen = one.matches(".choice input") ? one.nextElementSibling : one;
                  return [one.id, getComputedStyle(seen).outlineStyle];
                })()"""
            )
            if name:
                assert outline != "none", name
            left.discard(name)
            if not left:
                break
    assert not left


def test_fits_laptops_and_tablets(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        for place in ("", "#slide/slide_0000"):
            page.goto((bundle / "index.html").as_uri() + place)
            if place:
                wait_until(page, "bagscope.isViewReady()")
            for width, height in SIZES:
                page.set_viewport_size({"width": width, "height": height})
                beyond = page.evaluate(
                    """[...document.querySelectorAll("body *")].filter((one) => {
                      const box = one.getBoundingClientRect();
                      return one.checkVisibility() && box.width > 1 && box.right > innerWidth + 1;
                    }).map((one) => one.outerHTML.slice(0, 80))"""
                )
                assert beyond == [], (width, height)
                if place:
                    assert_all_in_sight(page, width, height)


def assert_all_in_sight(page: Any, width: int, height: int) -> None:
    picture = page.locator("#viewport").bounding_box()
    assert picture["width"] >= 0.6 * width and picture["height"] >= 0.45 * height
    for name in ("#legend", "#scale", "#minimap", "#verdict-choices", "#comment", "#warning"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["y"] >= 0, (name, width, height)
        assert box["y"] + box["height"] <= height, (name, width, height)
    assert page.locator("#legend").bounding_box()["width"] < 0.5 * picture["width"]


# Contrast of each piece of text with what lies behind it, as WCAG 2 reckons it.
CONTRASTS = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!colour.startsWith("rgba") || numbers(colour)[3] === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("body *")]
    .filter((one) => one.checkVisibility() && !one.closest(".unseen, :disabled, canvas"))
    .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .map((one) => {
      const colour = one.namespaceURI.endsWith("svg")
        ? getComputedStyle(one).fill : getComputedStyle(one).color;
      const [a, b] = [light(colour), light(behind(one))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 90)];
    });
})()"""


def test_text_has_contrast(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle) as page:
        for place in ("", "#slide/slide_0000"):
            page.goto((bundle / "index.html").as_uri() + place)
            if place:
                wait_until(page, "bagscope.isViewReady()")
                page.keyboard.press("v")
                page.keyboard.press("Space")
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                contrasts = page.evaluate(CONTRASTS)
                assert len(contrasts) > 30
                assert [text for ratio, text in contrasts if ratio < 4.5] == [], scheme
