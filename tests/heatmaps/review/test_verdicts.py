"""Verdicts that people exchange as tables, and cells that spreadsheets would compute."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.errors import CohortError
from bagscope.heatmaps.review.spreadsheet import guarded, unguarded
from bagscope.heatmaps.review.verdicts import (
    Verdict,
    agreement,
    kept_verdicts,
    merged,
    read_verdicts,
    verdicts_csv,
)

IDS = {name: name for name in ("a", "b", "c")}


def said(slide: str, verdict: str, reviewer: str = "Ann", comment: str = "") -> Verdict:
    return Verdict(slide_id=slide, verdict=verdict, comment=comment, reviewer=reviewer)


def table(folder: Path, *lines: str) -> Path:
    path = folder / "verdicts.csv"
    text = "\r\n".join(("slide,verdict,comment,reviewer,run", *lines)) + "\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return path


@given(st.text(alphabet="'=+-@\t\r a1", max_size=8))
def test_a_guarded_cell_is_no_formula_and_comes_back(text: str) -> None:
    cell = guarded(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert unguarded(cell) == text


def test_verdicts_come_back_from_their_table(tmp_path: Path) -> None:
    verdicts = (
        said("a", "agree", comment='=HYPERLINK("http://x","y"), "quoted"\nsecond line'),
        said("b", "not assessable", reviewer="@Bo", comment="-1 – Größe"),
        said("c", "", comment="only words"),
    )
    text = verdicts_csv(verdicts, run="abmil")
    for row in csv.reader(io.StringIO(text)):
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row)
    path = tmp_path / "kept.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert kept_verdicts(path) == verdicts
    assert read_verdicts(path, IDS, run="abmil") == verdicts
    assert kept_verdicts(tmp_path / "none.csv") == ()


def test_pseudonyms_are_read_as_the_slides_they_stand_for(tmp_path: Path) -> None:
    path = table(tmp_path, "S-1,Agree,fine,Ann,abmil", "b,disagree,,Ann,")
    found = read_verdicts(path, IDS | {"S-1": "a"}, run="abmil")
    assert found == (said("a", "agree", comment="fine"), said("b", "disagree"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("d,agree,,Ann,abmil", "row 3, column slide: 'd' is no slide of abmil"),
        ("a,maybe,,Ann,abmil", "row 3, column verdict: 'maybe' is none of agree, disagree"),
        ("a,agree,,Ann,other", "row 3, column run: 'other'"),
    ],
)
def test_rows_that_make_no_sense_are_named(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(CohortError, match=told):
        read_verdicts(table(tmp_path, "a,agree,,Ann,abmil", line), IDS, run="abmil")


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("slide,label\na,b\n")
    with pytest.raises(CohortError, match="no column 'verdict'"):
        read_verdicts(path, IDS, run="abmil")


def test_of_each_reviewer_the_newest_verdict_counts() -> None:
    before = (said("a", "agree"), said("a", "disagree", "Bo"), said("b", "agree"))
    found = merged(
        before,
        [
            said("a", "unsure"),
            said("b", "disagree"),
            said("b", "agree"),  # lower in the file: counts
            said("a", "", "Bo"),  # taken back
            said("c", "agree", "Bo"),
            said("c", "", "Cy"),
        ],
    )
    assert found.verdicts == (said("b", "agree"), said("a", "unsure"), said("c", "agree", "Bo"))
    assert (found.added, found.replaced, found.withdrawn, found.same) == (1, 1, 1, 1)


def test_agreement_is_told_for_each_reviewer() -> None:
    verdicts = [
        *(said(str(i), "agree") for i in range(10)),
        *(said(str(i), "disagree") for i in range(10, 12)),
        said("12", "unsure"),
        said("13", "", comment="just words"),
        said("1", "not assessable", ""),
        said("2", "", "Zoe", "nothing"),
    ]
    assert agreement(verdicts) == [
        "A reviewer without a name agrees with the model on 0 of 0 slides (1 not assessable).",
        "Ann agrees with the model on 10 of 12 slides (1 unsure).",
    ]
