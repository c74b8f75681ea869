"""What each tile adds to the logits of a model that pools by attention.

    logit_c = bias_c + Σ_i c_ic,   c_ic = Σ_k a_ik v_ikc

with a_ik the weight of tile i in column k, which add up to 1 over the bag, and v_ikc what the tile
would add at weight 1. This holds of the bag as it is, also behind layers that mix tiles.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import Bags, PoolingTerms
from bagscope.mil.explain.question import Array


def whole_terms(
    model: Aggregator, bags: Bags, dtype: torch.dtype = torch.float64
) -> PoolingTerms | None:
    """Return what a model adds up of bags as they are; None where it is no such sum."""
    precise = copy.deepcopy(model).to(dtype).eval()
    with torch.inference_mode():
        return precise.pooling_terms(bags.to(bags.features.device, dtype))


def contributions(terms: PoolingTerms, bag_lengths: Sequence[int]) -> Array:
    """Return what each tile adds to each logit: (T, C); with the bias they add up to it."""
    scores = terms.scores.detach().double().cpu().numpy()
    values = terms.values.detach().double().cpu().numpy()
    added = np.empty((len(scores), values.shape[2]))
    start = 0
    for length in bag_lengths:
        bag = np.s_[start : start + length]
        weights = np.exp(scores[bag] - scores[bag].max(axis=0, initial=-np.inf))
        weights /= weights.sum(axis=0)
        added[bag] = np.einsum("tk,tkc->tc", weights, values[bag])
        start += length
    return added
