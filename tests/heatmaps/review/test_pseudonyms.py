"""Pseudonyms: stable for who has the table, and for nobody else."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bagscope.artifacts import portable_name_problem
from bagscope.errors import CohortError, ConfigError
from bagscope.heatmaps.review.pseudonyms import (
    Pseudonyms,
    extended,
    read_pseudonyms,
    require_outside,
    write_pseudonyms,
)

IDS = [f"case-{number}" for number in range(300)]


def made(path: Path, slides: list[str], patients: list[str]) -> Pseudonyms:
    table = extended(path, slides, patients)
    write_pseudonyms(path, table)
    return table


def test_a_table_gives_the_same_names_again_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    first = made(path, IDS[:200], IDS[:50])
    content = path.read_bytes()
    assert made(path, IDS[:200], IDS[:50]) == first
    assert path.read_bytes() == content
    grown = made(path, IDS, IDS)
    assert {one: grown.slides[one] for one in first.slides} == first.slides
    assert {one: grown.patients[one] for one in first.patients} == first.patients
    names = [*grown.slides.values(), *grown.patients.values()]
    assert len({name.casefold() for name in names}) == 600
    assert not any(portable_name_problem(name) for name in names)
    assert read_pseudonyms(path) == grown
    # Slides that left the cohort keep theirs.
    assert made(path, IDS[:1], []) == grown


def test_without_the_table_names_can_not_be_had_from_ids(tmp_path: Path) -> None:
    one, other = (made(tmp_path / name, IDS, IDS) for name in ("a.csv", "b.csv"))
    assert not set(one.slides.values()) & set(other.slides.values())
    assert not set(one.slides.values()) & set(one.patients.values())
    assert one.digest({"slide": "case-1"}) != other.digest({"slide": "case-1"})


def test_ids_in_a_sentence_are_replaced_and_words_are_not() -> None:
    table = Pseudonyms(key="0" * 64, slides={"a-1": "S-x", "a-12": "S-y"}, patients={"Doe": "P-z"})
    told = "A-12.svs of doe (not a-1, nor a-123), Doering"
    assert table.scrubbed(told) == "S-y.svs of P-z (not S-x, nor a-123), Doering"


def test_a_table_may_be_made_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("kind,id,pseudonym\nslide,case-0,Alpha\n")
    table = made(path, IDS[:2], [])
    assert table.slides["case-0"] == "Alpha"
    with path.open(newline="") as handle:
        rows = list(csv.reader(handle))
    assert [row[0] for row in rows] == ["kind", "key", "slide", "slide"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("slide,b,alpha", "'alpha' stands for another id already"),
        ("slide,a,Beta", "'a' is empty, or stands there twice"),
        ("slide,b,x/y", "contains '/'"),
        ("slide,b,A", "'A' is somebody's id"),
        ("house,b,Beta", "'house' is none of"),
        ("key,,abc", "64 hexadecimal digits"),
    ],
)
def test_a_table_that_would_mix_people_up_is_refused(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"kind,id,pseudonym\nslide,a,Alpha\n{line}\n")
    with pytest.raises(CohortError, match=told):
        read_pseudonyms(path)


def test_a_table_in_the_review_is_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "review"
    require_outside(tmp_path / "table.csv", bundle)
    for inside in (bundle / "table.csv", bundle / "data" / ".." / "table.csv"):
        with pytest.raises(ConfigError, match="lies in the review"):
            require_outside(inside, bundle)


def test_two_processes_do_not_overwrite_each_others_table(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    mine, theirs = extended(path, IDS[:5], []), extended(path, IDS[:5], [])
    write_pseudonyms(path, theirs)
    with pytest.raises(ConfigError, match="another process"):
        write_pseudonyms(path, mine)
    assert read_pseudonyms(path) == theirs
