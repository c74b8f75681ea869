"""What PackMIL is asked to do, and what it can't go with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from bagscope.errors import ConfigError
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.hyperslides import GRADES, Benign
from bagscope.mil.targets import TargetSpec, Task
from bagscope.specs import Spec

TERM = "residual"
ResidualLoss = Literal["focal", "bce", "ce", "asl", "nll"]
_FITTING: Mapping[ResidualLoss, frozenset[Task]] = {
    "focal": frozenset({"classes", "multilabel"}),
    "bce": frozenset({"classes", "multilabel"}),
    "ce": frozenset({"classes", "ordinal"}),
    "asl": frozenset({"classes", "ordinal"}),
    "nll": frozenset({"survival"}),
}
_DEFAULT: Mapping[Task, ResidualLoss] = {
    "classes": "focal",
    "multilabel": "focal",
    "ordinal": "ce",
    "survival": "nll",
}


class PackMILOptions(Spec):
    """Options of PackMIL."""

    share: float = Field(
        default=0.5, ge=0, lt=1, description="of a bag's tiles in the main part; 0 packs whole bags"
    )
    capacity: int = Field(
        default=2400, ge=1, description="tiles of a pack; twice as many where a bag is longer"
    )
    shortest: int = Field(
        default=128, ge=0, description="tiles, after compression, of a bag that is split"
    )
    borrow: bool = Field(
        default=False, description="whether a part below `shortest` takes tiles of the other one"
    )
    downsampler: Literal["none", "random", "max"] = Field(
        default="none", description="how r tiles become one: none, random or max"
    )
    r: int = Field(
        default=1,
        ge=1,
        description="tiles that become one; without a downsampler, only packs are measured by it",
    )
    residual: Literal["auto", "none", "focal", "bce", "ce", "asl", "nll"] = Field(
        default="auto",
        description="loss of hyperslides: focal, bce, ce, asl (asymmetric), nll (survival), none, "
        "or what goes with the target",
    )
    use_counts: bool = Field(
        default=False, description="whether a bag counts in a hyperslide's label by its tiles there"
    )
    grade: bool = Field(
        default=False, description="whether classes are ISUP grades, merged by Gleason's patterns"
    )
    benign: Benign | None = Field(
        default=None,
        description="grade: of benign bags: alone (if not set), zero, or published, which calls "
        "nothing but benign bags grade 1",
    )
    dual: bool = Field(
        default=False, description="whether hyperslides have a linear predictor of their own"
    )
    norm: Literal["none", "batch"] = Field(
        default="none", description="of the tiles, before the aggregator: none or batch"
    )
    ban_norm: bool = Field(
        default=True, description="norm: whether hyperslides go around it, as published"
    )

    @model_validator(mode="after")
    def _used(self) -> PackMILOptions:
        if self.downsampler != "none" and self.r == 1:
            raise ValueError("a downsampler makes one of r tiles, and r is 1; set it to 2 or more")
        if self.share == 0 and self.residual not in ("auto", "none"):
            raise ValueError(f"residual is {self.residual}, and share 0 leaves none; raise share")
        if self.share == 0 and self.borrow:
            raise ValueError("borrow is of the parts of a bag, and share 0 makes none; raise share")
        if not self.has_residual:
            for name in ("use_counts", "grade", "dual"):
                if getattr(self, name):
                    raise ValueError(f"{name} is of hyperslides, and there are none; leave it out")
        if self.benign is not None and not self.grade:
            raise ValueError("benign belongs to grade: true, and grade is false")
        if not self.ban_norm and (self.norm == "none" or not self.has_residual):
            raise ValueError("ban_norm is of hyperslides and a norm; leave it out")
        return self

    @property
    def has_residual(self) -> bool:
        """Return whether there are hyperslides."""
        return self.share > 0 and self.residual != "none"

    def loss_of(self, task: Task) -> ResidualLoss:
        """Return the loss of hyperslides for a task that has one."""
        if self.residual == "auto" or self.residual == "none":
            return "asl" if self.grade else _DEFAULT[task]
        return self.residual


def refuse_packing(
    options: PackMILOptions, recipe: TrainSpec, targets: Sequence[TargetSpec]
) -> None:
    """Refuse steps of one bag, and targets that hyperslides have no label for.

    Raises:
        ConfigError: says which.
    """
    if recipe.bags.bags_per_step < 2:
        raise ConfigError(
            "regime packmil packs the bags of a step, and bags.bags_per_step is 1; set it to 8 or "
            "more"
        )
    if options.has_residual:
        _refuse_unlabelled(options, recipe, targets)
    elif TERM in recipe.objective.terms:
        raise ConfigError(
            f"objective.terms gives {TERM} a weight, and regime packmil has no hyperslides with "
            "these options; leave it out"
        )


def _refuse_unlabelled(
    options: PackMILOptions, recipe: TrainSpec, targets: Sequence[TargetSpec]
) -> None:
    """Refuse targets that make no label for a hyperslide."""
    otherwise = "or residual: none"
    if len(targets) > 1:
        raise ConfigError(
            f"regime packmil labels hyperslides by one target, and there are {len(targets)}; train "
            f"on one, {otherwise}"
        )
    (target,) = targets
    if target.task == "regression":
        raise ConfigError(
            f"regime packmil: a hyperslide has no label for {target.name}, a regression; take "
            "classes or an order of them, " + otherwise
        )
    if target.task == "survival" and recipe.objective.survival == "cox":
        raise ConfigError(
            "regime packmil: hyperslides are judged in bins of time, which Cox's loss has none of; "
            f"take survival: nll, {otherwise}"
        )
    if options.grade and not (target.is_categorical and len(target.classes) == GRADES):
        has = f"{len(target.classes)} classes" if target.classes else "no classes"
        raise ConfigError(
            f"regime packmil: grade: true takes the classes for ISUP grades 0 to 5, and "
            f"{target.name} ({target.task}) has {has}; name a target of six classes in order, or "
            "leave grade out"
        )
    loss = options.loss_of(target.task)
    if target.task not in _FITTING[loss]:
        users = ", ".join(sorted(_FITTING[loss]))
        raise ConfigError(
            f"regime packmil: residual: {loss} is for {users}, and {target.name} is of task "
            f"{target.task}; take {_DEFAULT[target.task]}, or leave residual out"
        )
