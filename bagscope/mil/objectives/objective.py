"""From targets and options to an objective that waits for the training cases' labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import CohortError, ConfigError
from bagscope.mil.objectives.classes import ClassesCriterion
from bagscope.mil.objectives.cox import CoxCriterion
from bagscope.mil.objectives.criterion import Criterion
from bagscope.mil.objectives.discrete_time import DiscreteTimeCriterion
from bagscope.mil.objectives.fitted import FittedObjective, Losses, rows_of, slices_of
from bagscope.mil.objectives.multilabel import MultilabelCriterion
from bagscope.mil.objectives.ordinal import OrdinalCriterion
from bagscope.mil.objectives.regression import RegressionCriterion
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec, Task

__all__ = ["FittedObjective", "Losses", "Objective", "build_objective"]

USED_BY: Mapping[str, frozenset[Task]] = {
    "class_weights": frozenset({"classes", "ordinal", "multilabel"}),
    "label_smoothing": frozenset({"classes", "multilabel"}),
    "focal_gamma": frozenset({"classes", "multilabel"}),
    "regression": frozenset({"regression"}),
    "survival": frozenset({"survival"}),
    "bins": frozenset({"survival"}),
    "nll_alpha": frozenset({"survival"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Targets and options that go together; nothing is learned yet.

    Attributes:
        targets: with their classes.
        spec: the options.
    """

    targets: tuple[TargetSpec, ...]
    spec: ObjectiveSpec

    @property
    def outputs(self) -> int:
        """Return the number of logits of all targets."""
        return sum(self._widths)

    @property
    def slices(self) -> Mapping[str, slice]:
        """Return where each target's logits stand."""
        return slices_of(self.targets, self._widths)

    @property
    def needs_batch_of_bags(self) -> bool:
        """Return whether the loss compares the bags of a batch, which then must be many."""
        return any(self._kind(target) is CoxCriterion for target in self.targets)

    def require_step_of(self, bags: int) -> None:
        """Refuse steps of a single bag where the loss compares bags: nothing would be learnt.

        Raises:
            ConfigError: such a loss and such steps.
        """
        if bags < 2 and self.needs_batch_of_bags:
            names = [target.name for target in self.targets if self._kind(target) is CoxCriterion]
            raise ConfigError(
                f"{names[0]}: Cox's loss compares the bags of a step, and bags.bags_per_step is "
                f"{bags}, which teaches nothing; set it to 16 or more, or take survival: nll"
            )

    def fit(self, values: Mapping[str, NDArray[np.float64]]) -> FittedObjective:
        """Learn class weights, time bins and scales.

        Args:
            values: (n, w) label rows by target, of the training cases only, NaN where missing.

        Raises:
            CohortError: labels that nothing can be learned from; says which and why.
            ConfigError: options that don't go with the labels.
        """
        fitted = []
        for target in self.targets:
            rows = np.asarray(rows_of(values, target), dtype=np.float64)
            labelled = rows[~np.isnan(rows).any(1)]
            if not len(labelled):
                raise CohortError(
                    f"{target.name}: none of the {len(rows)} training cases has a label; give "
                    "labels, or leave the target out"
                )
            fitted.append(self._kind(target).fit(target, self.spec, labelled))
        return FittedObjective.model_validate(
            {"targets": self.targets, "spec": self.spec, "criteria": tuple(fitted)}
        )

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(self._kind(target).outputs_of(target, self.spec) for target in self.targets)

    def _kind(self, target: TargetSpec) -> type[Criterion]:
        return _kind_of(target, self.spec)


def build_objective(targets: Sequence[TargetSpec], spec: ObjectiveSpec) -> Objective:
    """Return the objective of targets.

    Args:
        targets: with their classes resolved; at least one.
        spec: the options.

    Raises:
        ConfigError: two targets of one name, or an option that no target makes use of.
    """
    if not targets:
        raise ValueError("no targets; give at least one")
    names = [target.name for target in targets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"target {twice[0]!r} is there twice; give each one once")
    for target in targets:
        if target.task not in ("regression", "survival") and not target.classes:
            raise ValueError(f"{target.name} has no classes; call resolve_classes first")
    tasks = {target.task for target in targets}
    for option, users in USED_BY.items():
        value = getattr(spec, option)
        if value != ObjectiveSpec.model_fields[option].default and not tasks & users:
            raise ConfigError(
                f"objective: {option} is {value!r}, and no target makes use of it (it is for "
                f"{', '.join(sorted(users))}; the targets are {', '.join(sorted(tasks))}); "
                "leave it out"
            )
    return Objective(targets=tuple(targets), spec=spec)


def _kind_of(target: TargetSpec, spec: ObjectiveSpec) -> type[Criterion]:
    if target.task == "survival":
        return CoxCriterion if spec.survival == "cox" else DiscreteTimeCriterion
    kinds: dict[Task, type[Criterion]] = {
        "classes": ClassesCriterion,
        "multilabel": MultilabelCriterion,
        "ordinal": OrdinalCriterion,
        "regression": RegressionCriterion,
    }
    return kinds[target.task]
