"""The scores of a whole bag, which weights add up to 1 over: a patient's slides taken together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import SchemaError

if TYPE_CHECKING:
    from bagscope.mil.score_file import ScoreFile


def slides_of_bag(file: ScoreFile) -> tuple[str, ...]:
    """Return the slides whose tiles were in one bag with a file's."""
    return tuple(file.fields.get("slides", (file.slide_id,)))


def bag_scores(file: ScoreFile, beside: Mapping[str, ScoreFile]) -> NDArray[np.float32]:
    """Return the scores (N, K) of a file's whole bag.

    Args:
        file: of one slide.
        beside: the files of its bag's other slides, by slide.

    Raises:
        SchemaError: one of them is missing, or of another answer.
    """
    return np.concatenate([one.scores for one in _bag(file, beside)])


def member_bag_scores(file: ScoreFile, beside: Mapping[str, ScoreFile]) -> NDArray[np.float32]:
    """Return each member's scores (M, N, K) of a file's whole bag.

    Raises:
        SchemaError: as `bag_scores`, or a file has none, being of an older bagscope.
    """
    parts = []
    for one in _bag(file, beside):
        if one.member_scores is None:
            raise SchemaError(
                f"the scores of {one.slide_id} are of an older bagscope, which kept the members' "
                "mean alone; predict anew"
            )
        parts.append(one.member_scores)
    return np.concatenate(parts, axis=1)


def _bag(file: ScoreFile, beside: Mapping[str, ScoreFile]) -> list[ScoreFile]:
    found = []
    for slide_id in slides_of_bag(file):
        other = file if slide_id == file.slide_id else beside.get(slide_id)
        if other is None or other.fields != file.fields:
            what = "missing" if other is None else "of another model, or of other features"
            raise SchemaError(
                f"the scores of {slide_id}, a slide of the same patient, are {what}, and weights "
                "add up to 1 over both; predict anew"
            )
        found.append(other)
    return found
