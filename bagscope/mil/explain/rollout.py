"""Attention rollout of a model's tiles: one number each, which add up to 1 over a bag.

It says where the weight of the last layer came from, through all layers before it (see
`bagscope.mil.aggregators.rolling`); a model that has it offers `rollout(bags)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.explain.question import Array


def tile_rollout(model: Aggregator, bags: Bags) -> Array | None:
    """Return a model's rollout (T,) in evaluation; None where it has none."""
    if type(model).rollout is Aggregator.rollout:
        return None
    was_training = model.training
    model.eval()
    try:
        # Bags may have come out of inference mode, whose tensors take no part in gradients.
        with torch.inference_mode(False), torch.no_grad():
            found = model.rollout(_outside_of_inference(bags))
    finally:
        model.train(was_training)
    return None if found is None else np.asarray(found.cpu().numpy(), np.float64)


def mean_ratios(each: Sequence[Array | None]) -> NDArray[np.float32] | None:
    """Return the members' mean rollout of one bag (n,), times n: 1 is what all would have alike.

    None where one of them has none.
    """
    there = [one for one in each if one is not None]
    if not there or len(there) < len(each):
        return None
    return np.asarray(np.mean(there, axis=0) * len(there[0]), np.float32)


def _outside_of_inference(bags: Bags) -> Bags:
    names = ("features", "cu_seqlens", "coords_l0", "grid", "tile_slide", "tile_um", "mpp_l0")
    fresh: dict[str, Any] = {name: _fresh(getattr(bags, name)) for name in names}
    return replace(bags, **fresh)


def _fresh(tensor: Tensor | None) -> Tensor | None:
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor
