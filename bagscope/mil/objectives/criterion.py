"""What every task's loss is able to do, and what they share in being fitted."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope.errors import CohortError, ConfigError
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec
from bagscope.specs import Spec

Array = NDArray[np.float64]


class Criterion(Spec):
    """The loss of one target after seeing the training cases' labels, and how to read its logits.

    Its fields are plain numbers, so that it is stored as JSON and comes back to the same bits.
    """

    is_tempered: ClassVar[bool] = True
    """Whether its logits become probabilities that a temperature calibrates."""

    @staticmethod
    def outputs_of(target: TargetSpec, spec: ObjectiveSpec) -> int:
        """Return the number of logits, known before any label is seen."""
        raise NotImplementedError

    @classmethod
    def fit(cls, target: TargetSpec, spec: ObjectiveSpec, rows: Array) -> Self:
        """Learn from the training cases' labels (n, w), none missing, n at least 1.

        Raises:
            CohortError: labels that nothing can be learned from.
            ConfigError: options that don't go with the target.
        """
        raise NotImplementedError

    def plain(self) -> Self:
        """Return the same loss without what only helps training, as smoothing."""
        return self

    def loss(self, logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """Return the loss of each bag (B,), finite everywhere.

        Args:
            logits: (B, c) float32 or float64, of this target alone.
            labels: (B, w) float64, zero where missing.
            present: (B,) bool, whether a bag has its label; what the others get is not used.
        """
        raise NotImplementedError

    def is_telling(self, labels: Tensor, present: Tensor) -> bool:
        """Return whether the loss of these bags says anything about the logits."""
        return bool(present.any())

    def predict(self, logits: Array) -> Array:
        """Return what is reported of logits (n, c), float64, in the label's own terms."""
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        """Return a name for each column of the predictions."""
        raise NotImplementedError


def single_classes(target: TargetSpec, rows: Array) -> NDArray[np.int64]:
    """Return the class of each training case (n,), at least two of them different.

    Raises:
        CohortError: all cases have one class.
    """
    index = rows[:, 0].astype(np.int64)
    if (index == index[0]).all():
        raise CohortError(
            f"{target.name}: all {len(index)} training cases are of class "
            f"{target.classes[index[0]]!r}; at least two classes are needed to learn from"
        )
    return index


def class_weights(
    target: TargetSpec, spec: ObjectiveSpec, index: NDArray[np.int64]
) -> tuple[float, ...]:
    """Return a weight for each class (k,) that the loss of its bags is multiplied by."""
    explicit = explicit_weights(target, spec)
    if explicit is not None:
        return explicit
    if spec.class_weights == "none":
        return (1.0,) * len(target.classes)
    return balanced_weights(index, target)


def explicit_weights(target: TargetSpec, spec: ObjectiveSpec) -> tuple[float, ...] | None:
    """Return the weights (k,) that the spec gives itself, None where it gives none.

    Raises:
        ConfigError: not one per class.
    """
    given = spec.class_weights
    if isinstance(given, str):
        return None
    if len(given) != len(target.classes):
        raise ConfigError(
            f"objective: class_weights has {len(given)} numbers and {target.name} has "
            f"{len(target.classes)} classes ({', '.join(target.classes)}); give one per class"
        )
    return given


def balanced_weights(index: NDArray[np.int64], target: TargetSpec) -> tuple[float, ...]:
    """Return n / (k · n_c) for each class, whose mean over the n cases is 1.

    Raises:
        CohortError: a class without a case.
    """
    counts = np.bincount(index, minlength=len(target.classes))
    if not counts.all():
        absent = target.classes[int(np.argmin(counts))]
        raise CohortError(
            f"{target.name}: no training case is of class {absent!r}, so balanced weights don't "
            "exist; leave class_weights out, or merge classes"
        )
    return tuple((len(index) / (len(counts) * counts)).tolist())


def as_tensor(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return numbers as a tensor with the dtype and device of another."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)
