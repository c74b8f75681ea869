"""A viewer of runs whose data were made up, over slides that are real."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bagscope.errors import SchemaError
from bagscope.heatmaps.review.live.reader import CutWanted, SlideAt, SlideFacts, Wanted
from bagscope.heatmaps.review.live.readers import SlideReaders
from bagscope.heatmaps.review.live.served import PageFiles, ServedRun
from bagscope.heatmaps.review.live.server import Viewer

PAGE = PageFiles(
    index=b"<!doctype html><title>page</title>",
    assets={"app.css": b"body {}", "app.js": b"let page;", "LICENSE.txt": b"BSD"},
)


class MadeData:
    """Says what it was asked; counts how often."""

    def __init__(self, slides: Mapping[str, SlideAt | None]) -> None:
        self.slides = slides
        self.asked: list[str] = []

    def slide_at(self, key: str) -> SlideAt | None:
        return self.slides[key]

    def cohort_script(self) -> bytes:
        self.asked.append("cohort")
        return b"bagscope.cohort({});"

    def slide_script(self, key: str, facts: SlideFacts | None) -> bytes:
        self.asked.append(key)
        if key == "damaged":
            raise SchemaError("/home/someone/runs/abmil/scores/damaged.h5: is no score file")
        return f"bagscope.slide({key!r}, {facts.width_l0 if facts else None});".encode()

    def gallery_tile(self, key: str, name: str) -> Wanted | None:
        at = self.slides[key]
        if at is None or name != "7.jpg":
            return None
        return CutWanted(slide=at, x_l0=128, y_l0=256, extent_l0=128.0, tile_px=64)


def made_viewer(
    slides: Mapping[str, Path | None],
    readers: SlideReaders,
    *,
    runs: tuple[str, ...] = ("abmil",),
    cache_mib: float = 8.0,
) -> Viewer:
    """Return a viewer of runs of the same slides."""
    places = {key: None if path is None else SlideAt(path=path) for key, path in slides.items()}
    served = {name: ServedRun(name=name, about="3 slides", data=MadeData(places)) for name in runs}
    return Viewer(served, PAGE, readers, cache_mib=cache_mib)
