"""The regime of a task in a sequence: what it may change, and what keeps it off earlier ones.

The first task trains all weights. Of a later one, only its adapters and its head learn: the head is
whatever depends on the number of logits, and every task has its own.
"""

from __future__ import annotations

import dataclasses

import torch
from pydantic import Field
from torch import nn

from bagscope.mil.bags import Bags
from bagscope.mil.continual.adapters import adapt, adapters_of
from bagscope.mil.objectives.fitted import Losses
from bagscope.mil.regimes.regime import BuildInner, Judge, Regime
from bagscope.mil.regimes.registry import register_regime
from bagscope.mil.training.optimisation import Weights
from bagscope.specs import Spec

NAME = "owlora"
INNER = "inner."


class OWLoRAOptions(Spec):
    """Options of a task in a sequence."""

    earlier: int = Field(default=0, ge=0, description="tasks that were learnt before this one")
    rank: int = Field(default=8, ge=1, description="of an adapter")
    penalty: float = Field(default=10.0, ge=0, description="weight of its orthogonality")


@register_regime(
    NAME,
    OWLoRAOptions,
    summary="a task after others: adapters that read where earlier ones do not",
    reference="CoMEL, ICCV 2025; a reconstruction from what is public",
    terms=("orthogonality",),
)
class OWLoRA(Regime):
    """An aggregator that has learnt other tasks, and learns one more."""

    def __init__(
        self, features: int, outputs: int, options: OWLoRAOptions, build_inner: BuildInner
    ) -> None:
        super().__init__()
        self.options = options
        self.inner = build_inner(features, outputs)
        self.head = heads_of(self.inner, build_inner(features, outputs + 1))
        if options.earlier:
            for name, parameter in self.inner.named_parameters():
                if name not in self.head:
                    parameter.requires_grad_(False)
        body = _without(self.inner, self.head)
        for layer in body:
            adapt(layer, options.earlier, options.rank)

    def begin_from(self, before: Weights) -> None:
        """Take the body of the task before, and turn the new adapters away from the earlier ones.

        Args:
            before: the weights of this regime after that task.
        """
        own = self.state_dict()
        taken = {
            name: value
            for name, value in before.items()
            if name in own and name.removeprefix(INNER) not in self.head
        }
        self.load_state_dict({**own, **taken})
        for adapters in adapters_of(self):
            adapters.turn_away()

    def losses(self, bags: Bags, judge: Judge) -> Losses:
        """Return what a batch costs, with what the newest adapters share with the earlier ones."""
        output = self.inner(bags)
        if self.options.earlier:
            shared = torch.stack([adapters.penalty() for adapters in adapters_of(self)]).sum()
            term = (self.options.penalty * shared).expand(len(bags))
            output = dataclasses.replace(output, losses={**output.losses, "orthogonality": term})
        return judge(output, bags.targets or {}, bags.lengths)


def heads_of(model: nn.Module, other: nn.Module) -> frozenset[str]:
    """Return the names of the weights whose shapes differ between two models of unlike outputs."""
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    return frozenset(
        name for name, value in model.state_dict().items() if shapes.get(name) != value.shape
    )


def _without(model: nn.Module, head: frozenset[str]) -> list[nn.Linear]:
    """Return the linear layers that are no part of the head."""
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and f"{name}.weight" not in head
    ]
