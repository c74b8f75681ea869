"""Several branches of attention over one bag, and what they say together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.gated_attention import GatedAttention
from bagscope.mil.bags import Bags

Mask = Callable[[Tensor], Tensor]
"""Takes the logits (T, K) and gives them back with those of masked tiles far below all others."""

_COLUMNS = 16
"""As many as the pooling's kernel takes at a time."""


class Branched(NamedTuple):
    """What M branches with H heads each make of B bags.

    Attributes:
        each: (B, M, D) a vector per branch.
        together: (B, D) the vector of the mean attention.
        scores: (T, M, H) logits of attention, as they went into the softmax.
        lse: (B, M, H) the logarithm of their summed exponentials.
        entropy: (B, M · H).
    """

    each: Tensor
    together: Tensor
    scores: Tensor
    lse: Tensor
    entropy: Tensor

    def log_weights(self, cu_seqlens: Tensor) -> Tensor:
        """Return the logarithm of every branch's and head's attention: (T, M, H)."""
        return self.scores - self.lse[bag_of_tile(cu_seqlens, len(self.scores))]

    def diversity(self, cu_seqlens: Tensor) -> Tensor:
        """Return the mean cosine of two branches' attention: (B,), the mean over heads too."""
        branches, heads = self.scores.shape[1:]
        weights = self.log_weights(cu_seqlens).exp().flatten(1)
        # Σ a a' is what attention a pools of the column a'. For all pairs at once: on small bags,
        # a call costs more than its products.
        pooled = torch.cat(
            [
                segment_softmax_pool(part.contiguous(), weights, cu_seqlens).pooled
                for part in torch.split(self.scores.flatten(1), _COLUMNS, 1)
            ],
            1,
        )
        pooled = pooled.view(-1, branches, heads, branches, heads)
        gram = pooled.diagonal(dim1=2, dim2=4).movedim(3, 1)
        norms = gram.diagonal(dim1=2, dim2=3).sqrt()
        cosines = gram / (norms[..., :, None] * norms[..., None, :])
        first, second = torch.triu_indices(branches, branches, offset=1, device=gram.device)
        return cosines[..., first, second].mean((1, 2))


class GatedBranches(nn.Module):
    """Branches that share both gates and have a row of the last layer each; one head."""

    def __init__(self, attention: GatedAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, bags: Bags, mask: Mask | None) -> Branched:
        """Return what the branches say; fused into one pass where nothing is masked."""
        if mask is None:
            pooled, scores, lse, entropy = self.attention(bags)
        else:
            # The mask needs the scores of all tiles first, so h is kept between the two.
            h = self.attention.projected(bags.features)
            scores = mask(self.attention.scores(h, bags))
            pooled, lse, entropy, _ = segment_softmax_pool(scores, h, bags.cu_seqlens)
        together = pooled.mean(1)
        return Branched(pooled, together, scores[:, :, None], lse[:, :, None], entropy)
