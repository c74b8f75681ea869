"""CLAM's loss on tiles: what a class attends to most should look like it, the least should not.

For a bag of class y and a = its attention, with k no more than half of the bag:
    class y:       the k highest by a → 1, the k lowest → 0      ℓ_y over 2k tiles
    other classes: the k highest by a → 0, with `subtyping`      ℓ_c over k tiles
    loss = Σ_c ℓ_c, divided by the number of classes with `subtyping`

Attention chooses tiles and gets no gradient; the tiles' projection does. The chosen tiles are
projected once more, 2 k of each bag and column, since the fused pooling keeps none.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.segment_softmax_pool import accumulator
from bagscope.mil.aggregators.gated_attention import GatedAttention
from bagscope.mil.aggregators.layers import draw_seed
from bagscope.mil.bags import Bags

TileLoss = Literal["svm", "ce"]
_HARD_RATIO = 1000.0
"""Where a row's best score leads by τ·log of this, the smooth maximum is the hard one."""


class InstanceLoss(nn.Module):
    """A classifier of tiles for every class, and the loss of the tiles that attention chooses."""

    def __init__(
        self, hidden: int, classes: int, *, k: int, subtyping: bool, tile_loss: TileLoss
    ) -> None:
        super().__init__()
        self.classifier = nn.Linear(hidden, 2 * classes)
        self.classes = classes
        self.k = k
        self.subtyping = subtyping
        self.tile_loss = tile_loss

    def forward(self, bags: Bags, scores: Tensor, attention: GatedAttention) -> Tensor | None:
        """Return the loss (B,), 0 where the class is missing; None where no class is known.

        Args:
            bags: with a single target that is a class.
            scores: (T, 1) the attention of all classes, or (T, C) of each of them.
            attention: whose projection the tiles go through.
        """
        labels = bags.class_index
        # A single output is a number or a risk, never one of several classes.
        if labels is None or self.classes < 2:
            return None
        rows, is_there = chosen_tiles(scores.detach(), bags.cu_seqlens, self.k)
        tiles = bags.features[rows.flatten()]
        h = attention.projected(tiles, draw_seed(bags, use=2))
        logits = self.classifier(h.to(accumulator(h.dtype)))
        logits = logits.view(*rows.shape, self.classes, 2)
        if scores.shape[1] == 1:
            logits = logits[:, :, :, 0]
        else:
            logits = logits.diagonal(dim1=3, dim2=4).movedim(-1, 3)
        highest, lowest = logits.unbind(1)
        counts = is_there.sum(1, keepdim=True)
        as_own = self._summed(highest, 1, is_there) + self._summed(lowest, 0, is_there)
        parts = as_own / (2 * counts).clamp_min(1)
        is_own = labels[:, None] == torch.arange(self.classes, device=labels.device)
        if not self.subtyping:
            return torch.where(is_own, parts, 0.0).sum(1)
        as_other = self._summed(highest, 0, is_there) / counts.clamp_min(1)
        is_known = (labels >= 0) & (labels < self.classes)
        return torch.where(is_own, parts, as_other).mean(1) * is_known

    def _summed(self, logits: Tensor, target: int, is_there: Tensor) -> Tensor:
        """Return each class's loss (B, C) over tiles: logits (B, k, C, 2), is_there (B, k)."""
        flat = logits.flatten(0, -2)
        targets = torch.full((len(flat),), target, device=flat.device)
        if self.tile_loss == "svm":
            losses = smooth_svm(flat, targets)
        else:
            losses = functional.cross_entropy(flat, targets, reduction="none")
        return (losses.view(logits.shape[:-1]) * is_there[:, :, None]).sum(1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chosen_tiles(scores: Tensor, cu_seqlens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the rows with the highest and the lowest scores of each bag, and which of them count.

    Args:
        scores: (T, K).
        cu_seqlens: (B + 1,) int32.
        k: how many of each; no more than half of a bag, so that no tile is both.

    Returns:
        rows (B, 2, k, K), highest first, and is_there (B, k).
    """
    bags = len(cu_seqlens) - 1
    rows = torch.zeros(bags, 2, k, scores.shape[1], dtype=torch.int64, device=scores.device)
    for bag, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        count = min(k, (stop - start) // 2)
        for side, largest in enumerate((True, False)):
            found = scores[start:stop].topk(count, dim=0, largest=largest).indices
            rows[bag, side, :count] = start + found
    counts = (cu_seqlens.diff() // 2).clamp_max(k)
    return rows, torch.arange(k, device=scores.device) < counts[:, None]


def smooth_svm(scores: Tensor, targets: Tensor, *, tau: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return the smooth top-1 SVM loss of each row (R,).

    τ·log Σ_j exp((s_j + α·[j ≠ y] − s_y)/τ), and its hard maximum where s leads clearly.

    Args:
        scores: (R, C).
        targets: (R,) int64.
        tau: how smooth the maximum is.
        alpha: margin by which the right class is to lead.
    """
    own = scores.gather(1, targets[:, None])
    margins = scores - own + alpha
    margins = margins.scatter(1, targets[:, None], 0.0)
    best, second = scores.detach().topk(2, dim=1).values.unbind(1)
    is_hard = best - second >= tau * math.log(_HARD_RATIO)
    smooth = tau * (margins / tau).logsumexp(1)
    return torch.where(is_hard, margins.amax(1), smooth)
