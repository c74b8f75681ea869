"""Whether a heatmap can be believed, in words: what its score file says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bagscope.heatmaps.choices import ScaleName

if TYPE_CHECKING:
    from bagscope.artifacts import Json
    from bagscope.mil.score_file import ScoreFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What is known of a heatmap's faithfulness.

    Attributes:
        score: 0 is no better than random order, 1 the most there can be; None where not known.
        warning: why the heatmap is not to be believed; empty where it can be, or nobody knows.
        text: a sentence for people, the warning apart.
        entry: of the score file; empty where nothing was judged.
    """

    score: float | None
    warning: str
    text: str
    entry: Mapping[str, Json] = field(default_factory=dict)

    @property
    def sentences(self) -> tuple[str, ...]:
        """Return what to write beside the heatmap, the warning first."""
        return (self.warning, self.text) if self.warning else (self.text,)


def judgement_of(file: ScoreFile, scale: ScaleName, column: str) -> Judgement:
    """Return what a score file says of one of its heatmaps.

    Args:
        file: of the slide.
        scale: that is shown; all but contributions and rollout tell tiles apart as the usual one
            does.
        column: whose numbers are shown; empty where they are the same for all classes.
    """
    told = file.faithfulness
    if told is None:
        return _unknown("its scores are of an older bagscope; predict anew")
    basis = {"contribution": "contributions", "rollout": "rollout"}.get(scale, "scores")
    for entry in told["judged"]:
        if (entry["basis"], entry["column"]) == (basis, column):
            return _of(entry)
    if told["forward_passes"] is not None and not told["unjudged"]:
        return _unknown("of this model only the usual heatmap of a case is judged")
    return _unknown(told["unjudged"] or "no answer of the model is about these numbers alone")


def agreement_text(file: ScoreFile) -> str:
    """Return how far models agree on a file's tiles, as a sentence; empty of a single one."""
    found = None if file.faithfulness is None else file.faithfulness["agreement"]
    if found is None or found["rank_correlation"] is None:
        return ""
    # Older files compare the members that answered, and do not count them.
    models, seen = found.get("models", len(file.members)), found.get("saw_the_case", 0)
    whose = f" ({seen} of them saw this case in training)" if seen else ""
    return (
        f"Agreement of {models} models{whose}: rank correlation "
        f"{found['rank_correlation']:.2f}; {found['top_overlap']:.0%} of their top "
        f"{found['top_tiles']:.0f} tiles are shared (by chance {found['chance_overlap']:.0%})."
    )


def _of(entry: Mapping[str, Json]) -> Judgement:
    score = entry["score"]
    if score is None:
        why = "a single tile has nothing to be compared with"
        return Judgement(
            score=None, warning="", text=f"Faithfulness not judged: {why}.", entry=entry
        )
    text = (
        f"Faithfulness {score:z.2f} (0: chance, 1: the most there can be; p = "
        f"{entry['chance']:.2g} against random orders), of the {entry['answer']}."
    )
    return Judgement(score=score, warning=entry["warning"], text=text, entry=entry)


def _unknown(why: str) -> Judgement:
    return Judgement(score=None, warning="", text=f"Faithfulness not judged: {why}.")
