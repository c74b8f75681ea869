"""What the viewer serves: runs, their slides under the names of addresses, the page's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from bagscope.heatmaps.review.live.reader import SlideAt, SlideFacts, Wanted


class RunData(Protocol):
    """What is found out of a run when a page asks for it; called from threads."""

    def slide_at(self, key: str) -> SlideAt | None:
        """Return where a slide lies, None where nothing says.

        Raises:
            KeyError: the run has no such slide.
            BagscopeError: the run can't be opened.
        """
        ...

    def cohort_script(self) -> bytes:
        """Return the script with the table of slides.

        Raises:
            BagscopeError: it can't be made.
        """
        ...

    def slide_script(self, key: str, facts: SlideFacts | None) -> bytes:
        """Return the script of one slide.

        Args:
            key: of a slide of the run.
            facts: what a worker said of the slide's file, None where it can't be read.

        Raises:
            BagscopeError: it can't be made.
        """
        ...

    def gallery_tile(self, key: str, name: str) -> Wanted | None:
        """Return what is to be read for a picture of the gallery, None where there is no such.

        Raises:
            BagscopeError: the slide's scores can't be read.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedRun:
    """A run to look at.

    Attributes:
        name: of the run, a part of its addresses.
        about: a few words for the list of runs.
        data: what the page asks for.
    """

    name: str
    about: str
    data: RunData


@dataclass(frozen=True, kw_only=True, slots=True)
class PageFiles:
    """The files of the page, read when the viewer starts: no request names a path.

    Attributes:
        index: `index.html`.
        assets: content by name.
    """

    index: bytes
    assets: Mapping[str, bytes]
