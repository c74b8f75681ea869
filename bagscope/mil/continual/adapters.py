"""Orthogonal weighted low-rank adapters (OWLoRA) on linear layers.

    weight of a layer at task t = W + Σ_{1≤τ≤t} ω_τ B_τ A_τ         B (out, r), A (r, in)

W is learnt with the first task and then kept; each later task has an adapter of its own, and those
before it are kept. A reads from directions that earlier tasks do not read from: it starts there,
and the penalty Σ_{τ<t} ‖A_τ A_tᵀ‖² holds it there. Of the first task, which has no adapter, A_0 are
the directions along which it changed W most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bagscope.mil.training.optimisation import Weights

_ORIGINAL, _FIRST = ".parametrizations.weight.original", ".parametrizations.weight.0.first"
_SPREAD = 1e-6
"""Of what is left of a direction beside the earlier ones, below which it is none."""


class Adapters(nn.Module):
    """The adapters of one layer: from W to the weight with them."""

    first: Tensor

    def __init__(self, weight: Tensor, tasks: int, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        rank = min(rank, outputs, inputs)
        self.register_buffer("first", weight.new_zeros(rank, inputs))
        self.a = nn.ParameterList(
            nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5) for _ in range(tasks)
        )
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(outputs, rank)) for _ in range(tasks))
        self.share = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(tasks))
        for kept in (self.a, self.b, self.share):
            for parameter in list(kept)[:-1]:
                parameter.requires_grad_(False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return W + Σ ω B A."""
        for a, b, share in zip(self.a, self.b, self.share, strict=True):
            weight = weight + share * (b @ a)
        return weight

    def penalty(self) -> Tensor:
        """Return Σ_{τ<t} ‖A_τ A_tᵀ‖², 0 before there is an adapter."""
        if not len(self.a):
            return self.first.sum() * 0
        earlier = torch.cat([self.first, *list(self.a)[:-1]])
        shared: Tensor = (earlier @ self.a[-1].T).square().sum()
        return shared

    @torch.no_grad()
    def turn_away(self) -> None:
        """Take from the newest A what lies along the earlier ones, where something else is left."""
        earlier = torch.cat([self.first, *list(self.a)[:-1]]).double()
        _, sizes, directions = torch.linalg.svd(earlier, full_matrices=False)
        used = directions[sizes > _SPREAD]
        newest = self.a[-1]
        rest = newest.double() - newest.double() @ used.T @ used
        if float(rest.norm()) > _SPREAD:
            newest.copy_(rest)


def adapt(model: nn.Module, tasks: int, rank: int) -> None:
    """Give every linear layer of a model adapters, for so many tasks after the first one."""
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear):
            adapters = Adapters(layer.weight, tasks, rank)
            parametrize.register_parametrization(layer, "weight", adapters)


def adapters_of(model: nn.Module) -> Iterator[Adapters]:
    """Yield the adapters of all layers."""
    return (module for module in model.modules() if isinstance(module, Adapters))


def plain_weights(model: nn.Module) -> Weights:
    """Return the weights of the same model without adapters, which they are added into."""
    found = {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if "parametrizations." not in name
    }
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            found[f"{name}.weight".lstrip(".")] = layer.weight.detach().clone()
    return found


def with_first_directions(weights: Weights, before: Weights) -> Weights:
    """Return a first task's weights with A_0 of every layer, from the weights that it began with.

    A_0 are the leading right singular vectors of the change.
    """
    found = dict(weights)
    for name, value in weights.items():
        if name.endswith(_ORIGINAL):
            place = name.removesuffix(_ORIGINAL) + _FIRST
            change = (value - before[name]).double()
            directions = torch.linalg.svd(change, full_matrices=False).Vh
            found[place] = directions[: len(weights[place])].to(value.dtype)
    return found
