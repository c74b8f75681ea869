"""What INS remembers of earlier tiles: a queue to contrast with, and a prototype per class.

E width of an embedding, Q rows of the queue, C classes, t tiles of a step. All embeddings have
length 1. Everything is a buffer, so that it is saved with the weights and a training goes on with
it. It changes between steps alone: within a step every bag sees the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

NO_CLASS = -1
"""Of a row that the queue was filled with at the beginning: it is unlike all classes."""


class ContrastMemory(nn.Module):
    """The queue (Q, E) with the class of each row, and the prototypes (C, E)."""

    queue: Tensor
    queue_class: Tensor
    place: Tensor
    prototypes: Tensor

    def __init__(
        self, width: int, classes: int, rows: int, *, momentum: float, faithful_queue: bool
    ) -> None:
        super().__init__()
        self.momentum = momentum
        # Rows of length 1; the published code gives that length to the columns.
        random = functional.normalize(torch.randn(rows, width), dim=0 if faithful_queue else 1)
        self.register_buffer("queue", random)
        self.register_buffer("queue_class", torch.full((rows,), NO_CLASS))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("prototypes", torch.zeros(classes, width))

    def votes(self, q: Tensor, candidates: Tensor) -> Tensor:
        """Return the class (t,) whose prototype is most like each tile, among its candidates.

        Args:
            q: (t, E).
            candidates: (t, C) bool.
        """
        likeness = (q @ self.prototypes.T).softmax(1)
        return (likeness * candidates).argmax(1)

    def instance_contrast(self, q: Tensor, k: Tensor, temperature: float) -> Tensor:
        """Return each tile's loss (t,): its own second view is to be found among the queue."""
        own = (q * k).sum(1, keepdim=True)
        logits = torch.cat([own, q @ self.queue.T], 1) / temperature
        return logits.logsumexp(1) - logits[:, 0]

    def class_contrast(
        self, q: Tensor, k: Tensor, classes: Tensor, bag: Tensor, temperature: float
    ) -> Tensor:
        """Return each tile's loss (t,): what has its class is to be found among all else.

        All else is the other tiles of its bag, their second views and the queue.

        Args:
            q: (t, E) first views.
            k: (t, E) second views.
            classes: (t,) that the tiles are taken for.
            bag: (t,) that they are of.
            temperature: of the likeness.
        """
        beside = bag[:, None] == bag
        itself = torch.eye(len(q), dtype=torch.bool, device=q.device)
        queued = beside.new_ones(len(q), len(self.queue))
        is_there = torch.cat([beside & ~itself, beside, queued], 1)
        logits = q @ torch.cat([q, k, self.queue]).T / temperature
        logits = logits.masked_fill(~is_there, -torch.inf)
        is_alike = is_there & (classes[:, None] == torch.cat([classes, classes, self.queue_class]))
        found = torch.where(is_alike, logits - logits.logsumexp(1, keepdim=True), 0.0)
        # Never without one: its own second view has its class.
        return -found.sum(1) / is_alike.sum(1)

    @torch.no_grad()
    def learn(self, q: Tensor, k: Tensor, classes: Tensor) -> None:
        """Take in the tiles of a step, in their order: the prototypes first views, the queue k.

        μ_c ← m μ_c + (1 − m) q for each tile of class c in turn, then length 1.
        """
        decay = self.momentum
        for number in range(len(self.prototypes)):
            own = q[classes == number]
            ages = torch.arange(len(own) - 1, -1, -1, device=q.device)
            added = (1 - decay) * (decay**ages)[:, None] * own
            self.prototypes[number] = decay ** len(own) * self.prototypes[number] + added.sum(0)
        self.prototypes.copy_(functional.normalize(self.prototypes, dim=1))
        rows, count = len(self.queue), len(k)
        places = (self.place + torch.arange(count, device=k.device))[-rows:] % rows
        self.queue[places] = k[-rows:]
        self.queue_class[places] = classes[-rows:]
        self.place.copy_((self.place + count) % rows)


def kept_share(progress: float, warm_up: float, epochs: int, first: float, last: float) -> float:
    """Return how much of its first soft target a tile has kept by now: Π φ_e.

    s ← φ_e s + (1 − φ_e) onehot(vote), once in every epoch e after the warm-up, where φ falls
    linearly from `first` to `last`; for a tile whose vote stays the same.
    """
    kept = 1.0
    for epoch in range(min(int(progress * epochs) + 1, epochs)):
        if epoch / epochs >= warm_up:
            kept *= first + (last - first) * epoch / epochs
    return kept
