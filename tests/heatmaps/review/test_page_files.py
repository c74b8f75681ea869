"""The files of the review page: all there, all named, none reaching out, and in the wheel."""

from __future__ import annotations

import importlib.resources
import re
import zipfile
from pathlib import Path

import pytest

PAGE = Path(str(importlib.resources.files("bagscope.heatmaps.review") / "page"))
ROOT = Path(__file__).parents[3]


def own_scripts() -> list[Path]:
    return [path for path in sorted(PAGE.glob("*.js")) if not path.name.startswith("openseadragon")]


def test_the_page_names_every_file_once_and_no_other() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="assets/([^"]+)"', html)
    assert sorted(named) == sorted(
        path.name for path in PAGE.iterdir() if path.name != "index.html"
    )


def test_nothing_in_the_page_asks_a_network_or_writes_markup() -> None:
    for path in [PAGE / "index.html", PAGE / "app.css", *own_scripts()]:
        text = path.read_text(encoding="utf-8")
        without_names = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import", without_names), path.name
        assert not re.search(
            r"fetch\(|XMLHttpRequest|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(",
            text,
        ), path.name


def test_scripts_keep_to_the_house_size() -> None:
    assert len(own_scripts()) > 10
    for path in own_scripts():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path.name


@pytest.mark.slow
def test_the_wheel_carries_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel_builder = pytest.importorskip("hatchling.builders.wheel")
    monkeypatch.chdir(ROOT)
    builder = wheel_builder.WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as carried:
        names = set(carried.namelist())
    for path in PAGE.iterdir():
        assert path.relative_to(ROOT).as_posix() in names
