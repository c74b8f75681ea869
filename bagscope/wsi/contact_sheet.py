"""One page on which a person reviews the masks of a whole cohort, suspicious ones first.

`contact_sheet.html` stands beside this module as it reaches the reader, but for its data. The page
written from it holds everything it shows and may not load from a network; where the overview
pictures lie beside it, it shows them in full size.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagscope.artifacts import canonical_json, write_text
from bagscope.wording import counted
from bagscope.wsi.exif_thumbnail import extract

_TEMPLATE = Path(__file__).with_name("contact_sheet.html")
_FOLDERS = re.compile(r"""(?<![\w.:/\\])(?:[A-Za-z]:[/\\]|/)(?:[^\s/\\:;,'"()]+[/\\])+""")


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetEntry:
    """What the sheet shows of one slide.

    Attributes:
        slide_id: the slide.
        picture: its overview as JPEG, file or bytes; None where there is none. Its embedded
            thumbnail is what goes into the page, the whole picture where it has none.
        tiles: how many tiles were kept.
        tissue_fraction: tissue, of the scanned area.
        pen_fraction: pen marks, of the scanned area.
        fold_fraction: folds, of the tissue.
        blurred_fraction: out-of-focus tissue, of the tissue.
        fragments: pieces of tissue.
        status: "done", "skipped" or "failed".
        message: why it failed; empty otherwise.
        warnings: sentences for the reader.
    """

    slide_id: str
    picture: Path | bytes | None = None
    tiles: int = 0
    tissue_fraction: float = 0.0
    pen_fraction: float = 0.0
    fold_fraction: float = 0.0
    blurred_fraction: float = 0.0
    fragments: int = 0
    status: str = "done"
    message: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetLimits:
    """From where on a slide is suspicious. A needle biopsy fills about 1 % of its scan."""

    few_tiles: int = 10
    little_tissue: float = 0.003
    much_tissue: float = 0.85
    much_pen: float = 0.02
    much_fold: float = 0.10
    much_blur: float = 0.30
    many_fragments: int = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why a slide deserves a look: `kind` for filters, `text` for people, `weight` for order."""

    kind: str
    text: str
    weight: int


KINDS: dict[str, str] = {
    "failed": "Failed",
    "almost-none": "Almost none",
    "almost-all": "Almost all",
    "pen": "Pen",
    "blurred": "Blurred",
    "fragments": "Fragments",
    "folds": "Folds",
    "warnings": "Warnings",
}
"""Kinds of reasons, as the page's filters are named and ordered."""


def reasons(entry: SheetEntry, limits: SheetLimits | None = None) -> tuple[Reason, ...]:
    """Return why a slide is suspicious, weightiest first; nothing where all looks well."""
    at = limits or SheetLimits()
    if entry.status == "failed":
        return (Reason(kind="failed", text="failed", weight=1000),)
    found = []
    if entry.tiles == 0:
        found.append(Reason(kind="almost-none", text="no tiles", weight=90))
    elif entry.tiles < at.few_tiles:
        text = f"only {counted(entry.tiles, 'tile')}"
        found.append(Reason(kind="almost-none", text=text, weight=80))
    elif entry.tissue_fraction < at.little_tissue:
        text = f"{_percent(entry.tissue_fraction)} tissue"
        found.append(Reason(kind="almost-none", text=text, weight=80))
    if entry.tissue_fraction > at.much_tissue:
        text = f"{_percent(entry.tissue_fraction)} tissue"
        found.append(Reason(kind="almost-all", text=text, weight=70))
    if entry.pen_fraction > at.much_pen:
        found.append(Reason(kind="pen", text=f"{_percent(entry.pen_fraction)} pen", weight=60))
    if entry.blurred_fraction > at.much_blur:
        text = f"{_percent(entry.blurred_fraction)} blurred"
        found.append(Reason(kind="blurred", text=text, weight=50))
    if entry.fragments > at.many_fragments:
        text = f"{entry.fragments} fragments"
        found.append(Reason(kind="fragments", text=text, weight=40))
    if entry.fold_fraction > at.much_fold:
        found.append(Reason(kind="folds", text=f"{_percent(entry.fold_fraction)} folds", weight=30))
    if entry.warnings:
        more = len(entry.warnings)
        text = "warning" if more == 1 else f"{more} warnings"
        found.append(Reason(kind="warnings", text=text, weight=10))
    return tuple(found)


def write(
    path: Path,
    entries: Iterable[SheetEntry],
    *,
    title: str,
    limits: SheetLimits | None = None,
) -> None:
    """Write the contact sheet, atomically; the same entries give the same bytes.

    Args:
        path: the page to write, usually `contact_sheet.html` in the tiling's folder.
        entries: one per slide, in any order.
        title: what the page is of, such as the tiling's name.
        limits: from where on a slide is suspicious.
    """
    listed = [_record(path.parent, entry, limits) for entry in entries]
    listed.sort(key=lambda record: (-record["weight"], record["id"].casefold(), record["id"]))
    data = {"title": title, "kinds": KINDS, "entries": listed}
    # "<" would end the script element that carries the data if it stood before "/script".
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    content = {"title": html.escape(title), "heading": html.escape(title), "data": text}
    page = _TEMPLATE.read_text(encoding="utf-8")
    page = re.sub(r"\{\{(title|heading|data)\}\}", lambda place: content[place[1]], page)
    write_text(path, page)


def _record(folder: Path, entry: SheetEntry, limits: SheetLimits | None) -> dict[str, Any]:
    """Return what the page needs to know of one slide."""
    jpeg = entry.picture.read_bytes() if isinstance(entry.picture, Path) else entry.picture or b""
    small = extract(jpeg) or jpeg
    why = reasons(entry, limits)
    facts = {
        "id": entry.slide_id,
        "tiles": entry.tiles,
        "tissue": round(entry.tissue_fraction, 5),
        "pen": round(entry.pen_fraction, 5),
        "fold": round(entry.fold_fraction, 5),
        "blurred": round(entry.blurred_fraction, 5),
        "fragments": entry.fragments,
        "status": entry.status,
        "message": without_folders(entry.message),
        "warnings": [without_folders(warning) for warning in entry.warnings],
    }
    # A decision made on the page holds for as long as what it was made on stays the same.
    version = hashlib.sha256(canonical_json(facts) + jpeg).hexdigest()[:12]
    return {
        **facts,
        "version": version,
        "weight": sum(reason.weight for reason in why),
        "reasons": [{"kind": reason.kind, "text": reason.text} for reason in why],
        "picture": base64.b64encode(small).decode(),
        "href": _relative(folder, entry.picture),
    }


def _relative(folder: Path, picture: Path | bytes | None) -> str:
    """Return the picture's place relative to the page; empty where it lies elsewhere."""
    if not isinstance(picture, Path) or not picture.is_relative_to(folder):
        return ""
    return picture.relative_to(folder).as_posix()


def without_folders(text: str) -> str:
    """Return a sentence with absolute paths cut down to file names: pages travel, hosts don't."""
    return _FOLDERS.sub("", text)


def _percent(fraction: float) -> str:
    digits = 0 if fraction >= 0.0995 else 1 if fraction >= 0.00095 else 2
    return f"{100 * fraction:.{digits}f} %"


def suspicious(entries: Sequence[SheetEntry], limits: SheetLimits | None = None) -> int:
    """Return how many slides have at least one reason for a look."""
    return sum(bool(reasons(entry, limits)) for entry in entries)
