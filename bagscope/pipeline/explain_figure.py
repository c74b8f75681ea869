"""The picture of an explanation: what becomes of the answer as hot tiles go, come and repeat."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bagscope.mil.explain.effects import Controlled
from bagscope.mil.explain.faithfulness import Curves, Faithfulness
from bagscope.mil.explain.question import Array
from bagscope.mil.explain.search import Search
from bagscope.mil.report.drawing import INK, LINE, SERIES, SOFT, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES, _HEIGHT_INCHES = 3.6, 4.0
_DPI = 150
_LETTERS_PER_INCH = 13
_HOT, _SEARCHED = SERIES[1], SERIES[2]
_LABELS = ("random tiles: 95 %", "random tiles: mean", "hottest tiles")
_DASHED = (0, (4, 3))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What is drawn of a case.

    Attributes:
        title: whose explanation it is, and what the model says.
        answer: name of the answer that is followed.
        before: its value for the whole bag.
        column: of the answers.
        is_probability: whether the axis goes from 0 to 1.
        doses: (times, effect) of the hottest tiles.
        dose_share: of the tiles that are repeated.
        high: search for the tiles of highest effect.
        verdict: sentences below.
    """

    title: str
    answer: str
    before: float
    column: int
    is_probability: bool
    faithfulness: Faithfulness | None
    doses: Sequence[tuple[int, Controlled]]
    dose_share: float
    high: Search | None
    verdict: str


def draw(shown: Shown) -> bytes | None:
    """Return the picture as PNG; None where there is nothing to draw."""
    judged = shown.faithfulness
    panels = []
    if judged is not None and judged.deletion is not None:
        panels += ["deletion", "insertion"]
    if shown.doses:
        panels.append("doses")
    if not panels:
        return None
    width = _PANEL_INCHES * max(2, len(panels))
    with canvas(width, _HEIGHT_INCHES) as figure:
        # Ids are long: a title shares its line with nothing.
        heading, body = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 14])[:, 0]
        every = body.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(every, panels, strict=True):
            _frame(axes, shown)
            if panel == "doses":
                _doses(axes, shown)
            else:
                assert judged is not None
                _curves(axes, shown, judged, panel)
        every[0].set_ylabel(shown.answer)
        heading.text(
            0.012,
            0.4,
            shown.title,
            ha="left",
            va="center",
            fontsize=11.5,
            fontweight="bold",
            color=INK,
        )
        handles, labels = every[0].get_legend_handles_labels()
        body.legend(handles, labels, loc="outside upper left", ncols=len(labels))
        lines = textwrap.wrap(shown.verdict, int(width * _LETTERS_PER_INCH))
        body.supxlabel("\n".join(lines), x=0.012, ha="left", fontsize=9.5, color=SOFT)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
        return png.getvalue()


def _frame(axes: Axes, shown: Shown) -> None:
    axes.axhline(shown.before, color=SOFT, linewidth=1, linestyle=_DASHED)
    if shown.is_probability:
        axes.set_ylim(-0.03, 1.03)
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)


def _curves(axes: Axes, shown: Shown, judged: Faithfulness, panel: str) -> None:
    is_deletion = panel == "deletion"
    own = judged.deletion if is_deletion else judged.insertion
    random = judged.random_deletion if is_deletion else judged.random_insertion
    assert own is not None and random is not None
    shares = _percent(own)
    low, high = np.quantile(random.answers, [0.025, 0.975], axis=0)
    axes.fill_between(shares, low, high, color=LINE, linewidth=0, label=_LABELS[0])
    axes.plot(shares, random.answers.mean(axis=0), color=SOFT, label=_LABELS[1])
    axes.plot(shares, own.answers[0], color=_HOT, marker="o", markersize=3.5, label=_LABELS[2])
    if is_deletion and shown.high is not None:
        removed = 100 * np.arange(len(shown.high.answers)) / shown.high.tiles
        axes.plot(
            removed,
            shown.high.answers[:, shown.column],
            color=_SEARCHED,
            linewidth=1.3,
            label="found by search",
        )
    axes.set_title("Hot tiles taken out" if is_deletion else "Hot tiles alone")
    axes.set_xlabel("tiles taken out (%)" if is_deletion else "tiles in the bag (%)")


def _doses(axes: Axes, shown: Shown) -> None:
    places = np.arange(len(shown.doses))
    own = [effect.effect.after[shown.column] for _, effect in shown.doses]
    controls: list[Array] = [effect.controls[:, shown.column] for _, effect in shown.doses]
    low, high = np.quantile(np.stack(controls), [0.025, 0.975], axis=1)
    axes.fill_between(places, low, high, color=LINE, linewidth=0, label=_LABELS[0])
    axes.plot(places, [one.mean() for one in controls], color=SOFT, label=_LABELS[1])
    axes.plot(places, own, color=_HOT, marker="o", markersize=3.5, label=_LABELS[2])
    axes.set_xticks(places, ["none" if not n else f"×{n}" for n, _ in shown.doses])
    axes.set_title("Dose–response")
    axes.set_xlabel(f"copies of the hottest {100 * shown.dose_share:.3g} % in the bag")


def _percent(curves: Curves) -> Array:
    return 100 * curves.shares
