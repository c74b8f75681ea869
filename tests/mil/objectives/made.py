"""What the objectives' tests share: labels and outputs made up on the spot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope.mil.bags import BagOutput
from bagscope.mil.objectives.fitted import FittedObjective
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec

CLASSES = TargetSpec(column="subtype", classes=("a", "b", "c"))
ORDINAL = TargetSpec(column="isup", task="ordinal", classes=("0", "1", "2", "3"))
MULTILABEL = TargetSpec(column="marker", task="multilabel", classes=("p", "q"))
REGRESSION = TargetSpec(column="age", task="regression")
SURVIVAL = TargetSpec(column="os", task="survival", time="months", event="dead")
EVERY = (CLASSES, ORDINAL, MULTILABEL, REGRESSION, SURVIVAL)

Rows = dict[str, NDArray[np.float64]]


def labels(cases: int = 40, seed: int = 0) -> Rows:
    """Return label rows of all targets for this many cases, none missing."""
    draw = np.random.default_rng(seed)
    return {
        "subtype": draw.integers(0, 3, (cases, 1)).astype(float),
        "isup": draw.integers(0, 4, (cases, 1)).astype(float),
        "marker": draw.integers(0, 2, (cases, 2)).astype(float),
        "age": draw.normal(60, 12, (cases, 1)),
        # Whole months: there are ties.
        "os": np.stack([draw.integers(1, 30, cases), draw.integers(0, 2, cases)], 1).astype(float),
    }


def fitted(
    targets: Sequence[TargetSpec], rows: Mapping[str, NDArray[np.float64]], **options: Any
) -> FittedObjective:
    return build_objective(targets, ObjectiveSpec(**options)).fit(rows)


def tensors(rows: Mapping[str, NDArray[np.float64]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values.copy()) for name, values in rows.items()}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return float64 leaves that ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return drawn.requires_grad_()


def output(logits: Tensor, **more: Any) -> BagOutput:
    return BagOutput(
        logits=logits, embedding=logits, scores=logits, score_kind="instance_logit", **more
    )


def per_bag(objective: FittedObjective, logits: Tensor, rows: Rows) -> Tensor:
    """Return the main loss of each bag."""
    return objective(output(logits), tensors(rows), progress=0.0).terms["bag"]


def total(objective: FittedObjective, logits: Tensor, rows: Rows) -> Tensor:
    return objective(output(logits), tensors(rows), progress=0.0).total
