"""The contact sheet: what is suspicious, what the page holds, and how it behaves in a browser."""

import base64
import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bagscope.wsi import contact_sheet
from bagscope.wsi.contact_sheet import SheetEntry, SheetLimits, reasons, without_folders, write
from bagscope.wsi.exif_thumbnail import embed

WELL = {"tiles": 900, "tissue_fraction": 0.3, "fragments": 3}


def jpeg(grey: int, side: int = 32) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), grey, np.uint8)).save(encoded, "JPEG")
    return encoded.getvalue()


def page_data(path) -> dict:
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


# --- reasons --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kinds", "text"),
    [
        ({}, [], ""),
        ({"status": "failed", "pen_fraction": 0.5}, ["failed"], "failed"),
        ({"tiles": 0}, ["almost-none"], "no tiles"),
        ({"tiles": 1}, ["almost-none"], "only 1 tile"),
        ({"tiles": 9}, ["almost-none"], "only 9 tiles"),
        ({"tissue_fraction": 0.002}, ["almost-none"], "0.2 % tissue"),
        ({"tissue_fraction": 0.012}, [], ""),
        ({"tissue_fraction": 0.97}, ["almost-all"], "97 % tissue"),
        ({"pen_fraction": 0.05}, ["pen"], "5.0 % pen"),
        ({"blurred_fraction": 0.5}, ["blurred"], "50 % blurred"),
        ({"fragments": 41}, ["fragments"], "41 fragments"),
        ({"fold_fraction": 0.2}, ["folds"], "20 % folds"),
        ({"warnings": ("a", "b")}, ["warnings"], "2 warnings"),
        ({"tiles": 3, "pen_fraction": 0.3}, ["almost-none", "pen"], "only 3 tiles"),
    ],
)
def test_why_a_slide_is_suspicious(changes, kinds, text):
    found = reasons(SheetEntry(slide_id="a", **{**WELL, **changes}))
    assert [reason.kind for reason in found] == kinds
    assert not kinds or found[0].text == text
    assert {reason.kind for reason in found} <= contact_sheet.KINDS.keys()


def test_limits_can_be_moved():
    entry = SheetEntry(slide_id="a", **WELL)
    assert reasons(entry, SheetLimits(few_tiles=1000))[0].kind == "almost-none"
    assert contact_sheet.suspicious([entry, entry], SheetLimits(many_fragments=2)) == 2


# --- the page -------------------------------------------------------------------------------


def test_suspicious_slides_stand_first_and_failed_ones_before_all(tmp_path):
    entries = [
        SheetEntry(slide_id="b-well", **WELL),
        SheetEntry(slide_id="a-well", **WELL),
        SheetEntry(slide_id="pen", **{**WELL, "pen_fraction": 0.2}),
        SheetEntry(
            slide_id="everything",
            tiles=2,
            tissue_fraction=0.9,
            pen_fraction=0.4,
            blurred_fraction=0.9,
            fragments=90,
            fold_fraction=0.9,
        ),
        SheetEntry(slide_id="failed", status="failed", message="x.svs: broken"),
    ]
    write(tmp_path / "sheet.html", entries, title="t")
    order = [entry["id"] for entry in page_data(tmp_path / "sheet.html")["entries"]]
    assert order == ["failed", "everything", "pen", "a-well", "b-well"]


def test_the_page_embeds_the_thumbnail_and_links_the_picture_beside_it(tmp_path):
    small, large = jpeg(20), jpeg(200, 400)
    (tmp_path / "masks").mkdir()
    inside = tmp_path / "masks" / "a b.jpg"
    inside.write_bytes(embed(large, small))
    entries = [
        SheetEntry(slide_id="file", picture=inside),
        SheetEntry(slide_id="no thumbnail", picture=large),
        SheetEntry(slide_id="nothing"),
    ]
    write(tmp_path / "sheet.html", entries, title="t")
    by_id = {entry["id"]: entry for entry in page_data(tmp_path / "sheet.html")["entries"]}
    assert base64.b64decode(by_id["file"]["picture"]) == small
    assert by_id["file"]["href"] == "masks/a b.jpg"
    assert base64.b64decode(by_id["no thumbnail"]["picture"]) == large
    assert by_id["no thumbnail"]["href"] == by_id["nothing"]["picture"] == ""


def test_a_picture_that_lies_elsewhere_is_embedded_but_not_linked(tmp_path):
    elsewhere = tmp_path / "a.jpg"
    elsewhere.write_bytes(jpeg(3))
    write(tmp_path / "deep" / "s.html", [SheetEntry(slide_id="a", picture=elsewhere)], title="t")
    (entry,) = page_data(tmp_path / "deep" / "s.html")["entries"]
    assert entry["href"] == ""
    assert str(tmp_path) not in (tmp_path / "deep" / "s.html").read_text()


def test_the_page_loads_nothing_and_names_no_folder(tmp_path):
    class Sources(html.parser.HTMLParser):
        found: list = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.found += [value for name, value in attrs if name in ("src", "href", "action")]

    message = f"{tmp_path}/x.svs: broken"
    entry = SheetEntry(
        slide_id="a", status="failed", message=message, warnings=(r"C:\data\y.svs is odd",)
    )
    write(tmp_path / "sheet.html", [entry], title="t")
    text = (tmp_path / "sheet.html").read_text()
    Sources().feed(text)
    assert Sources.found == []
    assert not re.search(r"https?:|@import|url\(", text)
    assert "default-src 'none'" in text
    assert str(tmp_path) not in text
    (record,) = page_data(tmp_path / "sheet.html")["entries"]
    assert record["message"] == "x.svs: broken"
    assert record["warnings"] == ["y.svs is odd"]


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_breaks_out_of_the_page(tmp_path_factory, slide_id, title):
    path = tmp_path_factory.getbasetemp() / "hostile.html"
    hostile = f"</script><script>alert(1)</script>{{{{data}}}}{slide_id}"
    write(path, [SheetEntry(slide_id=hostile, **WELL)], title=hostile + title)
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == 2
    assert page_data(path)["entries"][0]["id"] == hostile


def test_the_same_entries_give_the_same_bytes_in_any_order(tmp_path):
    entries = [SheetEntry(slide_id=f"s{i}", picture=jpeg(i), **WELL) for i in range(5)]
    write(tmp_path / "a.html", entries, title="t")
    write(tmp_path / "b.html", entries[::-1], title="t")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_decision_is_tied_to_what_it_was_made_on(tmp_path):
    def version(**changes):
        entry = SheetEntry(slide_id="a", **{"picture": jpeg(1), **WELL, **changes})
        write(tmp_path / "s.html", [entry], title="t")
        return page_data(tmp_path / "s.html")["entries"][0]["version"]

    assert version() == version()
    assert len({version(), version(tiles=901), version(picture=jpeg(90))}) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/slides/a.svs: broken", "a.svs: broken"),
        ("can't read '/data/slides/a.svs'", "can't read 'a.svs'"),
        (r"D:\scans\2024\a.svs: broken", "a.svs: broken"),
        ("masks/a.jpg and 3/4 and/or https://host/x/y", None),
    ],
)
def test_folders_are_cut_off(text, expected):
    assert without_folders(text) == (text if expected is None else expected)


def test_writing_needs_no_heavy_library():
    code = (
        "import sys, bagscope.wsi.contact_sheet; "
        "sys.exit(bool({'numpy', 'cv2', 'shapely', 'simplejpeg'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- in a browser ---------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def in_browser(tmp_path, entries, script) -> object:
    """Run `script`, whose value is returned, on the page of `entries`."""
    page = tmp_path / "sheet.html"
    write(page, entries, title="t")
    added = (
        "<script>const press = key => document.body.dispatchEvent("
        "new KeyboardEvent('keydown', {key, bubbles: true}));"
        "const shownIds = () => [...document.querySelectorAll('.card')]"
        ".filter(c => !c.hidden).map(c => c.querySelector('.name').textContent);"
        f"document.title = JSON.stringify((() => {{ {script} }})());</script></body>"
    )
    page.write_text(page.read_text().replace("</body>", added))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]
    return json.loads(html.unescape(title))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_review_by_keyboard_filters_search_and_export(tmp_path):
    entries = [
        SheetEntry(slide_id="lost", status="failed", message='no "mpp", sorry'),
        SheetEntry(slide_id="pen", picture=jpeg(9), **{**WELL, "pen_fraction": 0.2}),
        SheetEntry(slide_id="well-1", picture=jpeg(99), **WELL),
        SheetEntry(slide_id="well-2", picture=jpeg(99), **{**WELL, "tiles": 5000}),
    ]
    got = in_browser(
        tmp_path,
        entries,
        """
        const out = {start: shownIds()};
        press('f'); press('a'); press('j'); press('f'); press('u'); press('ArrowLeft'); press('a');
        out.decisions = Object.fromEntries(data.entries.map(e => [e.id, decisionOf(e)]));
        out.kept = Object.keys(JSON.parse(localStorage.getItem(key))).sort();
        document.querySelector('[name=suspicious]').click(); out.suspicious = shownIds();
        document.querySelector('[name=flagged]').click(); out.flagged = shownIds();
        document.querySelector('[name=all]').click();
        byId('sort').value = 'Most tiles'; byId('sort').dispatchEvent(new Event('change'));
        out.most = shownIds();
        byId('search').value = 'SORRY'; byId('search').dispatchEvent(new Event('input'));
        out.search = shownIds();
        press(' '); out.zoomed = byId('dialog').open; press(' '); out.closed = !byId('dialog').open;
        byId('search').value = 'zzz'; byId('search').dispatchEvent(new Event('input'));
        out.none = !byId('none').hidden; press('a'); press('j');
        out.csv = flaggedCsv(); out.reviewed = byId('reviewed').textContent;
        return out;
        """,
    )
    assert got["start"] == ["lost", "pen", "well-1", "well-2"]
    assert got["decisions"] == {
        "lost": "flagged", "pen": "accepted", "well-1": "accepted", "well-2": "",
    }  # fmt: skip
    assert got["kept"] == ["lost", "pen", "well-1"]
    assert got["suspicious"] == ["lost", "pen"]
    assert got["flagged"] == ["lost"]
    assert got["most"][0] == "well-2"
    assert got["search"] == ["lost"]
    assert got["zoomed"]
    assert got["closed"]
    assert got["none"]
    assert got["reviewed"] == "3 of 4 reviewed"
    (row,) = csv.DictReader(io.StringIO(got["csv"]))
    assert (row["slide_id"], row["status"], row["reasons"]) == ("lost", "failed", "failed")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_decisions_on_a_mask_that_changed_are_dropped(tmp_path):
    got = in_browser(
        tmp_path,
        [SheetEntry(slide_id="a", **WELL), SheetEntry(slide_id="b", **WELL)],
        """
        decisions = {a: {decision: 'accepted', version: data.entries[0].version},
                     b: {decision: 'flagged', version: 'of another mask'}};
        return data.entries.map(decisionOf);
        """,
    )
    assert got == ["accepted", ""]
