"""What a regime ranks tiles by, of any aggregator."""

from __future__ import annotations

from torch import Tensor

from bagscope.mil.bags import BagOutput


def own_scores(output: BagOutput) -> Tensor:
    """Return the scores (T, K) that tiles are ranked by: columns of attention, or one of logits.

    Of logits, the highest over the classes counts.
    """
    if output.score_kind == "log_weight":
        return output.scores
    return output.scores.amax(1, keepdim=True)
