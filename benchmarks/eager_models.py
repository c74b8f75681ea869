"""Gated ABMIL, CLAM-SB and ACMIL as one writes them down: eager torch, one bag, all its defaults.

What `bench_training.py` compares with. Layers carry the names of ours, so that weights load into
both and the two can be held to the same output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class EagerAttention(nn.Module):
    """h and the logits of gated attention, of every tile."""

    def __init__(
        self, features: int, hidden: int, width: int, branches: int, dropout: float, bias: bool
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(features, hidden, bias=bias)
        self.v = nn.Linear(hidden, width)
        self.u = nn.Linear(hidden, width)
        self.w = nn.Linear(width, branches)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return h (T, hidden) and logits (T, branches)."""
        h = self.dropout(functional.relu(self.projection(x)))
        v = self.dropout(torch.tanh(self.v(h)))
        u = self.dropout(torch.sigmoid(self.u(h)))
        return h, self.w(v * u)


class EagerABMIL(nn.Module):
    """Gated ABMIL 512/256 with dropout ¼."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.attention = EagerAttention(features, 512, 256, 1, 0.25, bias=True)
        self.classifier = nn.Linear(512, outputs)

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (1, C), and the loss of a label (1,), 0 without one."""
        h, scores = self.attention(x)
        logits = self.classifier(scores.softmax(0).T @ h)
        return logits, _loss(logits, label)


class EagerCLAM(nn.Module):
    """CLAM-SB, small, with the smooth SVM on eight tiles at either end."""

    def __init__(self, features: int, outputs: int, k: int = 8) -> None:
        super().__init__()
        self.attention = EagerAttention(features, 512, 256, 1, 0.25, bias=True)
        self.classifier = nn.Linear(512, outputs)
        self.judges = nn.ModuleList(nn.Linear(512, 2) for _ in range(outputs))
        self.k = k

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (1, C), and the loss of a label (1,), 0 without one."""
        h, scores = self.attention(x)
        weights = scores.softmax(0)
        logits = self.classifier(weights.T @ h)
        if label is None:
            return logits, logits.new_zeros(())
        highest = weights[:, 0].topk(self.k).indices
        lowest = (-weights[:, 0]).topk(self.k).indices
        targets = torch.arange(2).flip(0).repeat_interleave(self.k)
        judged = self.judges[int(label)](h[torch.cat([highest, lowest])])
        wrong = functional.one_hot(1 - targets, 2)
        own = judged.gather(1, targets[:, None])
        tiles = (judged + wrong - own).logsumexp(1).mean()
        return logits, 0.7 * _loss(logits, label) + 0.3 * tiles


class EagerACMIL(nn.Module):
    """ACMIL-GA with five branches, six of each one's ten most attended tiles masked."""

    def __init__(self, features: int, outputs: int, branches: int = 5) -> None:
        super().__init__()
        self.attention = EagerAttention(features, 512, 128, branches, 0.0, bias=False)
        self.branch_classifiers = nn.ModuleList(nn.Linear(512, outputs) for _ in range(branches))
        self.classifier = nn.Linear(512, outputs)

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (1, C), and the loss of a label (1,), 0 without one."""
        h, scores = self.attention(x)
        scores = scores.T
        if self.training:
            highest = scores.topk(10, dim=1).indices
            drawn = torch.rand(highest.shape).argsort(1)[:, :6]
            mask = torch.ones_like(scores).scatter(1, highest.gather(1, drawn), 0.0)
            scores = scores.masked_fill(mask == 0, -1e9)
        weights = scores.softmax(1)
        pooled = weights @ h
        logits = self.classifier(weights.mean(0, keepdim=True) @ h)
        if label is None:
            return logits, logits.new_zeros(())
        semantic = [
            _loss(judge(pooled[[branch]]), label)
            for branch, judge in enumerate(self.branch_classifiers)
        ]
        alike = [
            functional.cosine_similarity(weights[i], weights[j], dim=0)
            for i in range(len(weights))
            for j in range(i + 1, len(weights))
        ]
        return logits, _loss(logits, label) + torch.stack(semantic).mean() + torch.stack(
            alike
        ).mean()


EAGER = {"abmil_gated": EagerABMIL, "clam_sb": EagerCLAM, "acmil": EagerACMIL}


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return the largest difference over the largest value."""
    scale = float(truth.abs().max())
    return float((found.double() - truth.double()).abs().max()) / scale if scale else math.inf


def _loss(logits: Tensor, label: Tensor | None) -> Tensor:
    return logits.new_zeros(()) if label is None else functional.cross_entropy(logits, label)
