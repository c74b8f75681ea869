"""How figures look, and how they become SVG and PNG: one drawing, for light and dark pages.

Figures are drawn in the colours of a light page. In an SVG that goes into a page each of these
colours is replaced by the page's own variable, so that it follows the reader's theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE, CARD = "#1c2127", "#5d6772", "#d8dde3", "#ffffff"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#a5568c", "#8a6d00", "#3f8fbf", "#7a4a2b", "#56626e")
"""Told apart by readers who see colours differently (after Okabe and Ito), dark enough on white."""
_VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    CARD: "var(--card)",
    **{colour: f"var(--s{place})" for place, colour in enumerate(SERIES)},
}
_PNG_DPI = 200
_PARAMETERS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": CARD,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    # A class may be called "$x$".
    "text.parse_math": False,
    # Names inside the SVG follow from its content, so that the same figure gives the same bytes.
    "svg.hashsalt": "bagscope",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure, ready to be written and to be shown.

    Attributes:
        name: of its files.
        title: for people.
        caption: what it shows and what to beware of.
        svg: a file of its own.
        png: the same as pixels.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes

    @property
    def inline(self) -> str:
        """Return the SVG as an element of a page, in the page's colours."""
        element = self.svg[self.svg.index("<svg") :]
        element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
        for colour, variable in _VARIABLES.items():
            element = element.replace(colour, variable)
        # Several figures share a page, and their inner names must not meet.
        element = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', element)
        element = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", element)
        element = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{self.name}-\1"', element)
        label = self.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        return element.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of so many inches, in the house's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_PARAMETERS):  # type: ignore[arg-type]  # keys as literals
        yield Figure(figsize=(width, height), layout="constrained")


def picture(figure: Figure, *, name: str, title: str, caption: str) -> Picture:
    """Return a drawn figure as a picture; call it inside `canvas`."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    # The places are found; finding them again is what drawing mostly costs.
    figure.set_layout_engine("none")
    figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return Picture(name=name, title=title, caption=caption, svg=svg.getvalue(), png=png.getvalue())


def unit_square(axes: Axes, x: str, y: str) -> None:
    """Set axes to [0, 1] on both sides, as squares, with a light grid."""
    axes.set(xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), xlabel=x, ylabel=y)
    axes.set_aspect("equal", adjustable="box")
    axes.grid(True)
    axes.set_axisbelow(True)


def diagonal(axes: Axes) -> None:
    """Draw the line from corner to corner."""
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
