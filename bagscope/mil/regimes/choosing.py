"""Which tiles a closer look is worth: clusters of what they look like, and quotas by attention.

So a slide's budget goes to every kind of tile that is attended to, and not to a hundred tiles that
look alike: quota of a cluster ∝ its tiles · their mean attention, and within it the most attended.
Nothing is drawn: equal bags give equal choices, in whatever order their tiles come.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

_ROUNDS = 25
"""Of moving centres; they come to rest earlier on bags of thousands."""


def chosen_tiles(
    features: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    *,
    budget: int,
    clusters: int,
    components: int,
) -> Tensor:
    """Return which tiles are chosen, (T,) bool: `budget` of each bag, or all of a smaller one.

    Args:
        features: (T, D).
        weights: (T,) attention, at least 0.
        cu_seqlens: (B + 1,) borders of the bags.
        budget: tiles of a bag.
        clusters: of a bag's tiles; with 1 it is the most attended tiles that are chosen.
        components: principal ones that tiles are compared by.
    """
    found = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
    for start, stop in pairwise(cu_seqlens.tolist()):
        own = weights[start:stop].double()
        if stop - start <= budget:
            found[start:stop] = True
            continue
        kind = torch.zeros(stop - start, dtype=torch.int64, device=own.device)
        if clusters > 1:
            points = principal(features[start:stop].double(), components)
            kind = clustered(points, own, clusters)
        counts = torch.bincount(kind, minlength=clusters)
        shares = own.new_zeros(clusters).index_add_(0, kind, own)
        quotas = shared_out(shares, counts, budget)
        order = own.argsort(descending=True, stable=True)
        order = order[kind[order].argsort(stable=True)]
        rank = (
            torch.arange(len(order), device=own.device) - (counts.cumsum(0) - counts)[kind[order]]
        )
        found[start + order[rank < quotas[kind[order]]]] = True
    return found


def principal(points: Tensor, components: int) -> Tensor:
    """Return points (n, D) along their principal components: (n, at most `components`)."""
    centred = points - points.mean(0)
    count = min(components, *centred.shape)
    # Of the two Gram matrices the smaller one: both have the components.
    if centred.shape[0] < centred.shape[1]:
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        found: Tensor = vectors[:, -count:] * values[-count:].clamp(min=0).sqrt()
        return found
    axes: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors
    return centred @ axes[:, -count:]


def clustered(points: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Return the cluster (n,) of each point, by k-means.

    The first centre is the heaviest point, each further one the point farthest from those there
    are; then they move to the means of their points.
    """
    centres = [points[weights.argmax()]]
    apart = (points - centres[0]).square().sum(1)
    for _ in range(clusters - 1):
        centres.append(points[apart.argmax()])
        apart = torch.minimum(apart, (points - centres[-1]).square().sum(1))
    middle = torch.stack(centres)
    kind = torch.cdist(points, middle).argmin(1)
    for _ in range(_ROUNDS):
        counts = torch.bincount(kind, minlength=clusters)
        sums = torch.zeros_like(middle).index_add_(0, kind, points)
        # A centre without a point stays where it is.
        middle = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], middle)
        moved = torch.cdist(points, middle).argmin(1)
        if torch.equal(moved, kind):
            break
        kind = moved
    return kind


def shared_out(shares: Tensor, counts: Tensor, budget: int) -> Tensor:
    """Return how much of a budget each gets, (k,) int64: by share, and no more than it has.

    What a full one leaves goes to the others by their shares; remainders to the largest ones.

    Args:
        shares: (k,) at least 0.
        counts: (k,) that each has; together at least the budget.
        budget: that is given away, all of it.
    """
    quotas = torch.zeros_like(counts)
    while True:
        left, room = budget - int(quotas.sum()), counts - quotas
        if left == int(room.sum()):
            return counts
        claims = torch.where(room > 0, shares, 0.0)
        if not float(claims.sum()):
            claims = room.to(shares.dtype)
        exact = left * claims / claims.sum().clamp(min=torch.finfo(claims.dtype).tiny)
        is_full = (exact >= room) & (room > 0)
        if not bool(is_full.any()):
            break
        quotas = torch.where(is_full, counts, quotas)
    given = torch.minimum(exact.floor().long(), room)
    remainders = torch.where(room > given, exact - given, -1.0)
    largest = remainders.argsort(descending=True, stable=True)[: left - int(given.sum())]
    given[largest] += 1
    return quotas + given
