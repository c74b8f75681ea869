from __future__ import annotations

import numpy as np
import pytest
import torch

from bagscope.errors import ArtifactError
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.inference import infer
from bagscope.mil.recipe import BagSpec
from tests.mil.made_bags import DIMENSION, made_source


def test_logits_that_are_no_numbers_are_refused_with_their_case() -> None:
    torch.manual_seed(0)
    model = build_aggregator("mean", DIMENSION, 2, {})
    source = made_source(6)
    assert np.isfinite(infer(model, source, BagSpec()).logits).all()
    source.read(4).features[0] = np.nan
    with pytest.raises(ArtifactError, match="c004: the model's logits are nan, nan"):
        infer(model, source, BagSpec())
