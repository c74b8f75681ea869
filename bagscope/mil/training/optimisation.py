"""Optimiser, learning rate and running means of weights; each can be stopped and taken up again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bagscope.mil.recipe import OptimiserSpec

Weights = dict[str, Tensor]


def build_optimiser(model: nn.Module, spec: OptimiserSpec) -> torch.optim.Optimizer:
    """Return the optimiser of all weights that learn."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    # Some say by themselves that they are not to shrink, as the rates of a state-space layer.
    steady = [weight for weight in learning if getattr(weight, "no_weight_decay", False)]
    weights: list[Any] = [one for one in learning if not getattr(one, "no_weight_decay", False)]
    if steady:
        weights = [{"params": weights}, {"params": steady, "weight_decay": 0.0}]
    common: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    if spec.name == "radam":
        return torch.optim.RAdam(weights, betas=spec.betas, **common)
    # One call for all weights: with small bags, one call each would cost as much as the bags.
    common["fused"] = True
    if spec.name == "sgd":
        return torch.optim.SGD(weights, momentum=spec.momentum, **common)
    kind = torch.optim.AdamW if spec.name == "adamw" else torch.optim.Adam
    return kind(weights, betas=spec.betas, **common)


@dataclass
class Schedule:
    """The learning rate of each step.

    Attributes:
        steps: of the whole training, as planned.
        warmup_steps: of the linear rise.
        factor: what plateau has left of the rate.
        best: lowest validation loss that plateau has seen.
        bad_epochs: since then.
    """

    spec: OptimiserSpec
    steps: int
    warmup_steps: int
    factor: float = 1.0
    best: float = math.inf
    bad_epochs: int = 0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        spec = self.spec
        if step < self.warmup_steps:
            return spec.lr * (step + 1) / self.warmup_steps
        if spec.schedule == "cosine":
            share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
            return spec.min_lr + (spec.lr - spec.min_lr) * (1 + math.cos(math.pi * share)) / 2
        return max(spec.min_lr, spec.lr * self.factor)

    def after_epoch(self, validation_loss: float) -> None:
        """Take notice of an epoch's validation loss (for plateau)."""
        if validation_loss < self.best:
            self.best, self.bad_epochs = validation_loss, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs >= self.spec.plateau_patience:
            self.factor, self.bad_epochs = self.factor / 2, 0

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs."""
        return {"factor": self.factor, "best": self.best, "bad_epochs": self.bad_epochs}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.factor, self.best = state["factor"], state["best"]
        self.bad_epochs = state["bad_epochs"]


class RunningMean:
    """An exponential mean of a model's weights."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.weights: Weights = {}

    def add(self, model: nn.Module) -> None:
        """Take in the model's weights as they are."""
        # The first weights are random: they are forgotten quickly, then the decay is as asked.
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, weight in model.state_dict().items():
            if name in self.weights and weight.is_floating_point():
                self.weights[name].lerp_(weight.detach(), 1 - decay)
            else:
                self.weights[name] = weight.detach().clone()
        self.count += 1

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs."""
        return {"count": self.count, "weights": self.weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.count, self.weights = state["count"], dict(state["weights"])


def mean_of(several: Iterable[Weights]) -> Weights:
    """Return the plain mean of several models' weights; whole numbers are those of the last."""
    found = list(several)
    return {
        name: torch.stack([weights[name] for weights in found]).mean(0)
        if last.is_floating_point()
        else last
        for name, last in found[-1].items()
    }


def copied(model: nn.Module) -> Weights:
    """Return a model's weights in memory of their own."""
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}
