"""What reviewers say, kept by the browser and carried by CSV, in a real browser."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.heatmaps.review import page_test_bundle as made
from tests.heatmaps.review.browsing import chromium, wait_until, watched_page

COLUMNS = ["slide", "verdict", "comment", "reviewer", "run"]
COMMENT = '=HYPERLINK("http://x"), "quoted"; two\nlines – ä'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdicts")
    rows = [made.cohort_row(number, correct=None) for number in range(4)]
    rows[1]["verdict"] = {"verdict": "unsure", "comment": "Cut badly.", "reviewer": "Dr B"}
    slides = [made.slide_data(row["key"], np.empty((0, 2)), []) for row in rows]
    made.write_bundle(folder, made.cohort_data(rows), slides, {})
    return folder


def open_slide(page: Any, bundle: Path, key: str) -> None:
    page.goto((bundle / "index.html").as_uri() + f"#slide/{key}")
    wait_until(page, f"bagscope.isViewReady() && bagscope.currentSlide().key === '{key}'")


def judge(page: Any, verdict: str, comment: str, reviewer: str = "Dr A") -> None:
    page.locator("#slide-reviewer").fill(reviewer)
    page.get_by_role("radio", name=verdict, exact=True).check()
    page.locator("#comment").fill(comment)
    page.keyboard.press("Escape")


def exported(page: Any) -> str:
    with page.expect_download() as download:
        page.locator("#export").click()
    assert download.value.suggested_filename == "abmil-verdicts.csv"
    return Path(download.value.path()).read_text(encoding="utf-8-sig")


def brought_in(page: Any, text: str, encoding: str = "utf-8") -> None:
    file = {"name": "verdicts.csv", "mimeType": "text/csv", "buffer": text.encode(encoding)}
    page.locator("#import-file").set_input_files(file)


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_verdicts_make_the_round_trip(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle, accept_downloads=True) as page:
        open_slide(page, bundle, "slide_0000")
        judge(page, "disagree", COMMENT, reviewer="+Dr A")
        # Kept by the browser: it is there again after loading anew.
        page.reload()
        wait_until(page, "bagscope.isViewReady()")
        assert page.locator("#comment").input_value() == COMMENT
        assert page.get_by_role("radio", name="disagree", exact=True).is_checked()
        page.keyboard.press("u")
        text = exported(page)
        assert "disagree" in page.locator("#slides-body").inner_text()
    first, second = parsed(text)
    assert list(first) == COLUMNS
    assert first == {
        "slide": "slide_0000", "verdict": "disagree", "comment": "'" + COMMENT,
        "reviewer": "'+Dr A", "run": "abmil",
    }  # fmt: skip
    assert (second["slide"], second["verdict"]) == ("slide_0001", "unsure")

    # To a colleague's browser, by way of a spreadsheet that saves with semicolons.
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, delimiter=";")
    writer.writeheader()
    writer.writerows([first, second])
    for foreign in (text, "\ufeff" + out.getvalue()):
        with watched_page(browser, bundle) as page:
            page.goto((bundle / "index.html").as_uri())
            brought_in(page, foreign)
            wait_until(page, "document.getElementById('storage-note').innerText !== ''")
            assert page.locator("#storage-note").inner_text() == "2 verdicts imported."
            open_slide(page, bundle, "slide_0000")
            assert page.locator("#comment").input_value() == COMMENT
            assert page.get_by_role("radio", name="disagree", exact=True).is_checked()


def test_an_import_replaces_ones_own_only_when_confirmed(browser: Any, bundle: Path) -> None:
    text = (
        "slide,verdict,comment,reviewer\r\nslide_0000,agree,theirs,Dr C\r\nslide_0002,agree,,\r\n"
    )
    with watched_page(browser, bundle) as page:
        open_slide(page, bundle, "slide_0000")
        judge(page, "unsure", "mine")
        page.keyboard.press("u")
        for answer, comment, said in (
            ("dismiss", "mine", "1 verdict imported."),
            ("accept", "theirs", "2 verdicts imported."),
        ):
            page.once("dialog", lambda dialog, answer=answer: getattr(dialog, answer)())
            brought_in(page, text)
            wait_until(page, f"document.getElementById('storage-note').innerText === '{said}'")
            open_slide(page, bundle, "slide_0000")
            assert page.locator("#comment").input_value() == comment
            page.keyboard.press("u")
        brought_in(page, "slide,verdict,comment,reviewer\nnobody,agree,,\nslide_0003,perhaps,,\n")
        wait_until(
            page, "document.getElementById('storage-note').innerText.includes('Left out: 2')"
        )
        brought_in(page, "slide,comment\nslide_0000,x\n")
        page.locator("#fault").wait_for()
        assert 'no column "verdict"' in page.locator("#fault").inner_text()


def test_a_verdict_of_the_bundle_can_be_taken_back(browser: Any, bundle: Path) -> None:
    with watched_page(browser, bundle, accept_downloads=True) as page:
        page.goto((bundle / "index.html").as_uri())
        assert "unsure" in page.locator("#slides-body").inner_text()
        brought_in(page, "slide,verdict,comment,reviewer\nslide_0001,,,Dr B\n")
        wait_until(page, "!document.getElementById('slides-body').innerText.includes('unsure')")
        (row,) = parsed(exported(page))
    assert (row["slide"], row["verdict"], row["comment"]) == ("slide_0001", "", "")


def test_a_browser_that_keeps_nothing_says_so(browser: Any, bundle: Path) -> None:
    refuse = "Storage.prototype.setItem = () => { throw new DOMException('no', 'SecurityError'); }"
    with watched_page(browser, bundle, accept_downloads=True) as page:
        page.add_init_script(refuse)
        page.goto((bundle / "index.html").as_uri())
        assert "keeps nothing" in page.locator("#storage-note").inner_text()
        open_slide(page, bundle, "slide_0003")
        judge(page, "not assessable", "")
        page.keyboard.press("u")
        assert parsed(exported(page))[-1]["verdict"] == "not assessable"
