"""Where what lies in a review: the same names for the folder and for the live server.

index.html, assets/                              the page, the same for every run
data/cohort.js                                   the table of slides
slides/<key>/slide.js, thumb.jpg                 a slide; its key is its id or its pseudonym
slides/<key>/picture_files/<level>/<col>_<row>.jpg
slides/<key>/tiles/<name>.jpg                    the gallery
slides/<key>/facts.json, complete.json           for bagscope: what was made, and of what
complete.json                                    written last
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from bagscope.artifacts import COMPLETE_NAME

INDEX_NAME = "index.html"
ASSETS_NAME = "assets"
COHORT_NAME = "data/cohort.js"
SLIDES_NAME = "slides"
SLIDE_SCRIPT_NAME = "slide.js"
FACTS_NAME = "facts.json"
THUMB_NAME = "thumb.jpg"
PICTURE_NAME = "picture_files"
TILES_NAME = "tiles"
ROOT_NAMES = frozenset({INDEX_NAME, ASSETS_NAME, "data", SLIDES_NAME, COMPLETE_NAME})
"""What lies in a review's own folder, and nothing else."""
_PAGE = Path(__file__).with_name("page")


def page_files() -> dict[str, Path]:
    """Return the page's own files by their place in a review."""
    found = {}
    for path in sorted(_PAGE.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            name = path.relative_to(_PAGE).as_posix()
            found[name if name == INDEX_NAME else f"{ASSETS_NAME}/{name}"] = path
    return found


def slide_url(key: str, name: str) -> str:
    """Return the relative address of one of a slide's files; a key may hold `#` or `%`."""
    return f"{SLIDES_NAME}/{quote(key, safe='')}/{name}"


def picture_name(level: int, column: int, row: int) -> str:
    """Return a picture tile's place in its slide's folder."""
    return f"{PICTURE_NAME}/{level}/{column}_{row}.jpg"
