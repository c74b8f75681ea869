"""Attention rollout of a model's tiles: one number each, which add up to 1 over a bag.

It says where the weight of the last layer came from, through all layers before it (see
`bagscope.mil.aggregators.rolling`); a model that has it offers `rollout(bags)`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.explain.question import Array


def tile_rollout(model: Aggregator, bags: Bags) -> Array | None:
    """Return a model's rollout (T,) in evaluation; None where it has none."""
    was_training = model.training
    model.eval()
    try:
        # Bags may have come out of inference mode, whose tensors take no part in gradients.
        with torch.inference_mode(False), torch.no_grad():
            found = model.rollout(_outside_of_inference(bags))
    finally:
        model.train(was_training)
    return None if found is None else np.asarray(found.cpu().numpy(), np.float64)


def _outside_of_inference(bags: Bags) -> Bags:
    names = ("features", "cu_seqlens", "coords_l0", "grid", "tile_slide", "tile_um", "mpp_l0")
    fresh: dict[str, Any] = {
        name: None if (value := getattr(bags, name)) is None else value.clone() for name in names
    }
    return replace(bags, **fresh)
