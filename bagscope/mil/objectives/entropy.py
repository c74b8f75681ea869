"""The reward for attention that spreads (AEM, Zhang et al. 2024): λ_t · Σ_i a_i log a_i.

The sum over a bag's tiles, its mean over the columns of attention. It is minimised, so entropy
grows. It is at most log N in size: the same λ pulls harder on large bags, unless `per_log_n`.

cosine: λ_t = λ_end + ½ (λ_0 - λ_end) (1 + cos(π progress))
"""

from __future__ import annotations

import math

from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.bags import BagOutput
from bagscope.mil.objectives.spec import EntropySpec


def entropy_weight(spec: EntropySpec, progress: float) -> float:
    """Return λ_t at a share of the training, from 0 to 1."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is {progress}; it goes from 0 to 1")
    if spec.schedule == "constant":
        return spec.weight
    return spec.end + 0.5 * (spec.weight - spec.end) * (1 + math.cos(math.pi * progress))


def negative_entropy(spec: EntropySpec, output: BagOutput, lengths: Tensor | None) -> Tensor:
    """Return Σ a log a of each bag (B,), before its weight.

    Args:
        spec: of the term.
        output: of an aggregator that reports the entropy of its attention.
        lengths: (B,) tiles of each bag, for `per_log_n`.

    Raises:
        ConfigError: the aggregator reports none.
    """
    if output.entropy is None:
        raise ConfigError(
            "objective: entropy has a weight, and the aggregator reports no entropy of attention; "
            "take one that pools by attention, or leave entropy out"
        )
    term = -output.entropy.mean(1)
    if not spec.per_log_n:
        return term
    if lengths is None:
        raise ValueError("entropy.per_log_n needs the bags' lengths; pass lengths=bags.lengths")
    # One tile has no entropy, and its logarithm nothing to divide by.
    return term / lengths.to(term).clamp(min=2).log()
