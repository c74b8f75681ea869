"""One number per tile for what it does to a prediction, for any aggregator.

    leave one out          F(bag) − F(bag without the tile)
    gradient × input       x · ∂f/∂x, summed over the tile's features
    integrated gradients   (x − x₀) · mean of ∂f/∂x on the way from x₀ to x, likewise; they add up
                           to f(x) − f(x₀) over the bag

F answers a question (probabilities, risks); f is any function of the logits, by default the log
odds of a class, which do not saturate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.explain.pools import BUDGET_TILES, Pool, Rows, packed
from bagscope.mil.explain.question import Array

Target = Callable[[Tensor], Tensor]
"""Logits (B, C) to (B,)."""


def log_odds(column: int) -> Target:
    """Return log p / (1 − p) of a class under the softmax; of a single logit, that logit."""

    def target(logits: Tensor) -> Tensor:
        others = [place for place in range(logits.shape[1]) if place != column]
        own = logits[:, column]
        return own - logits[:, others].logsumexp(1) if others else own

    return target


def leave_one_out(pool: Pool, rows: Rows) -> Array:
    """Return F(bag) − F(bag without the tile) for each of the rows: (n, A).

    Positive where the tile speaks for an answer. NaN of a bag with a single tile.
    """
    whole = pool.answers([rows])
    if len(rows) == 1:
        return np.full_like(whole, np.nan)
    return whole - pool.without_each(rows)


def gradient_times_input(model: Aggregator, bags: Bags, target: Target) -> Array:
    """Return the gradient times the features, summed over these: (T,) float64."""
    features = bags.features.detach()
    return _numpy(_products(model, bags, features, features, target))


def integrated_gradients(
    model: Aggregator,
    bags: Bags,
    target: Target,
    *,
    baseline: Tensor | None = None,
    steps: int = 32,
    budget_tiles: int = BUDGET_TILES,
) -> Array:
    """Return integrated gradients, summed over a tile's features: (T,) float64.

    Args:
        model: any aggregator.
        bags: whose tiles are asked about; each bag's way is its own.
        target: what is explained.
        baseline: x₀, (D,) or (T, D): a tile that says nothing, such as the mean of the training
            tiles; zero where not given.
        steps: points on the way, by Gauss and Legendre's rule.
        budget_tiles: that are worked on at a time; a larger bag is by itself.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    shares, weights = (nodes + 1) / 2, weights / 2
    features = bags.features.detach()
    start = torch.zeros_like(features) if baseline is None else baseline.to(features)
    start = start.expand_as(features)
    borders = bags.cu_seqlens.tolist()
    total = np.zeros(len(features))
    for bag in range(len(bags)):
        rows = np.arange(borders[bag], borders[bag + 1])
        together = max(1, budget_tiles // max(1, len(rows)))
        for first in range(0, steps, together):
            part = slice(first, first + together)
            copies = len(shares[part])
            many = packed(bags, [rows] * copies)
            share = torch.from_numpy(shares[part]).to(features).repeat_interleave(len(rows))
            origin = start[borders[bag] : borders[bag + 1]].repeat(copies, 1)
            away = many.features - origin
            on_the_way = origin + share[:, None] * away
            products = _numpy(_products(model, many, on_the_way, away, target))
            total[rows] += weights[part] @ products.reshape(copies, len(rows))
    return total


def _products(
    model: Aggregator, bags: Bags, features: Tensor, directions: Tensor, target: Target
) -> Tensor:
    """Return ∂f/∂x at the features, times the directions, summed: (T,)."""
    was_training = model.training
    model.eval()
    try:
        # Bags may have come out of inference mode, whose tensors take no part in gradients.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = features.detach().clone().requires_grad_()
            grid = None if bags.grid is None else bags.grid.clone()
            moved = replace(bags, features=leaf, cu_seqlens=bags.cu_seqlens.clone(), grid=grid)
            value = target(model(moved).logits).sum()
            (gradient,) = torch.autograd.grad(value, leaf)
    finally:
        model.train(was_training)
    return (gradient * directions).sum(1, dtype=torch.float64)


def _numpy(values: Tensor) -> Array:
    return np.asarray(values.cpu().numpy(), np.float64)
