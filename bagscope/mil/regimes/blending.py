"""Several losses of one batch as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bagscope.mil.objectives.fitted import Losses


def blended(parts: Sequence[tuple[float, Losses]]) -> Losses:
    """Return the weighted sum of losses of the same bags, term by term.

    Args:
        parts: weights and losses; a bag takes part in a term where it does so in every one.
    """
    first = parts[0][1]
    return Losses(
        total=torch.stack([weight * losses.total for weight, losses in parts]).sum(),
        terms={
            name: torch.stack([weight * losses.terms[name] for weight, losses in parts]).sum(0)
            for name in first.terms
        },
        present={
            name: torch.stack([losses.present[name] for _, losses in parts]).all(0)
            for name in first.present
        },
        weights=first.weights,
    )
