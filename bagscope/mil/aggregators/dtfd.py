"""DTFD-MIL (Zhang et al. 2022): pseudo-bags learn by themselves, a second tier pools what they say.

h = relu(W x)                                          (T, hidden), no bias
a = softmax of w·(tanh(V h) ⊙ σ(U h)) over the pseudo-bag that a tile is dealt into
tier 1:  z_g = Σ a h,  logits_g = Linear(z_g)          each to be right by itself
CAM:     W_c · (a_i h_i)                               (T, C), what a tile adds to tier 1's logits
tier 2:  gated attention over the distilled, logits = Linear₂(Σ b f)

distilled f:  afs: z_g;  maxs: h of the m tiles of each pseudo-bag whose CAM says most for a class;
maxmins: and of the m least. Tier 2 teaches tier 1 nothing: f has no gradient in training.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.kernels.gated_scores import gated_scores
from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.mil.aggregators.layers import Projection, affine, draw_seed
from bagscope.mil.aggregators.pseudo_bags import Dealt, deal, extremes
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec


class DTFDOptions(Spec):
    """Options of DTFD-MIL."""

    hidden: int = Field(default=512, ge=1, description="width of the projected tile")
    attention: int = Field(default=128, ge=1, description="width of both tiers' gates")
    pseudo_bags: int = Field(default=4, ge=1, description="that a bag is dealt into")
    distil: Literal["afs", "maxs", "maxmins"] = Field(
        default="afs",
        description="what tier 2 sees: pseudo-bags' vectors (afs), or their best tiles (maxs), "
        "or their best and least ones (maxmins)",
    )
    total_tiles: int | None = Field(
        default=None,
        ge=1,
        description="maxs, maxmins: best tiles of a bag; one of each pseudo-bag if not set",
    )
    rank_by: Literal["last", "predicted"] | None = Field(
        default=None,
        description="maxs, maxmins: the class that tiles are best for: last (if not set), or "
        "tier 1's answer (predicted)",
    )
    split: Literal["random", "stored"] = Field(
        default="random", description="how tiles are dealt: at random, or in stored order"
    )
    inference_splits: int = Field(
        default=1, ge=1, description="deals that a prediction is the mean of"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the projected tile")

    @model_validator(mode="after")
    def _used(self) -> DTFDOptions:
        if self.distil == "afs" and (self.total_tiles is not None or self.rank_by is not None):
            raise ValueError("total_tiles and rank_by belong to maxs and maxmins; distil is afs")
        if self.total_tiles is not None and self.total_tiles < self.pseudo_bags:
            raise ValueError(
                f"total_tiles is {self.total_tiles}, less than one of each of the "
                f"{self.pseudo_bags} pseudo_bags; raise it"
            )
        if self.split == "stored" and self.inference_splits > 1:
            raise ValueError("inference_splits belongs to split: random; stored has one alone")
        return self


class _Told(NamedTuple):
    """What one deal says: logits (B, G, C), CAM (T, C), tier 2's answer, log a_i b_g(i) of afs."""

    branches: Tensor
    cam: Tensor
    second: PooledBags
    log_weights: Tensor | None


class Tier(nn.Module):
    """Gated attention and a classifier of what it pools."""

    def __init__(self, hidden: int, width: int, outputs: int) -> None:
        super().__init__()
        self.v = nn.Linear(hidden, width)
        self.u = nn.Linear(hidden, width)
        self.w = nn.Linear(width, 1)
        self.classifier = nn.Linear(hidden, outputs)

    @property
    def gates(self) -> dict[str, Any]:
        """Return what the operations on gates take."""
        pairs = {"v": affine(self.v), "u": affine(self.u), "w": affine(self.w)}
        return {
            f"{what}_{name}": tensor
            for name, pair in pairs.items()
            for what, tensor in zip(("weight", "bias"), pair, strict=True)
        }


@register(
    "dtfd",
    DTFDOptions,
    summary="pseudo-bags learn by themselves, a second tier pools what they say",
    reference="Zhang et al., DTFD-MIL, CVPR 2022",
    is_order_free=False,
)
class DTFD(Aggregator):
    """Two tiers of gated attention."""

    def __init__(self, features: int, outputs: int, options: DTFDOptions) -> None:
        super().__init__()
        self.options = options
        hidden = options.hidden
        self.projection = Projection(features, hidden, bias=False, dropout=options.dropout)
        self.first = Tier(hidden, options.attention, outputs)
        self.second = Tier(hidden, options.attention, outputs)

    def forward(self, bags: Bags) -> BagOutput:
        """Return tier 2's logits, tier 1's as branches; scores are the CAM's class logits."""
        told = self._told(self._hidden(bags), bags)
        embedding = torch.stack([one.second.pooled[:, 0] for one in told]).mean(0)
        return BagOutput(
            logits=self.second.classifier(embedding),
            embedding=embedding,
            scores=torch.stack([one.cam for one in told]).mean(0),
            score_kind="instance_logit",
            branch_logits=torch.cat([one.branches for one in told], 1),
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return a column for each deal: log a_i b_g(i), and tier 2's class logits of a tile.

        None where tier 2 sees tiles: they are chosen, not weighed.
        """
        if self.options.distil != "afs":
            return None
        h = self._hidden(bags)
        columns = [one.log_weights for one in self._told(h, bags) if one.log_weights is not None]
        weight, bias = self.second.classifier.weight, self.second.classifier.bias
        values = functional.linear(h.to(weight.dtype), weight) / len(columns)
        return PoolingTerms(
            scores=torch.stack(columns, 1),
            values=values[:, None].expand(-1, len(columns), -1),
            bias=bias,
        )

    def _hidden(self, bags: Bags) -> Tensor:
        h: Tensor = self.projection(bags.features, draw_seed(bags) if self.training else 0)
        return h

    def _told(self, h: Tensor, bags: Bags) -> list[_Told]:
        scores = gated_scores(h, **self.first.gates)
        weight = self.first.classifier.weight
        tile_logits = functional.linear(h, weight.to(h.dtype)).to(scores.dtype)
        options = self.options
        if options.split == "stored":
            uses: list[int | None] = [None]
        else:
            uses = [1] if self.training else list(range(1, options.inference_splits + 1))
        deals = [
            deal(bags, options.pseudo_bags, use=use, in_training=self.training) for use in uses
        ]
        return [self._of_deal(h, scores, tile_logits, dealt, bags) for dealt in deals]

    def _of_deal(
        self, h: Tensor, scores: Tensor, tile_logits: Tensor, dealt: Dealt, bags: Bags
    ) -> _Told:
        """Return what both tiers say of one deal: h (T, hidden), scores (T, 1), logits (T, C)."""
        bag, group, sizes = dealt
        groups = sizes.shape[1]
        is_elsewhere = group[:, None] != torch.arange(groups, device=h.device)
        # A branch for each pseudo-bag, so that no tile has to move.
        columns = scores.expand(-1, groups).contiguous()
        z, lse, _, _ = segment_softmax_pool(columns, h, bags.cu_seqlens, mask=is_elsewhere)
        log_a = scores[:, 0] - lse[bag, group]
        cam = log_a.exp()[:, None] * tile_logits
        # With fewer tiles than pseudo-bags, those that have one are taken in turn for the rest.
        filled = (sizes > 0).sum(1, keepdim=True).clamp_min(1)
        turn = torch.arange(groups, device=h.device) % filled
        logits = self.first.classifier(z)
        branches = logits.gather(1, turn[:, :, None].expand_as(logits))
        if self.options.distil == "afs":
            second = self._second(z, sizes > 0)
            log_b = second.scores.view(sizes.shape) - second.lse
            return _Told(branches, cam, second, log_a + log_b[bag, group])
        rows, are_there = extremes(
            self._evidence(cam, branches, dealt),
            dealt,
            (self.options.total_tiles or groups) // groups,
            with_lowest=self.options.distil == "maxmins",
        )
        distilled = h[rows.flatten(1)].to(scores.dtype)
        return _Told(branches, cam, self._second(distilled, are_there.flatten(1)), None)

    def _evidence(self, cam: Tensor, branches: Tensor, dealt: Dealt) -> Tensor:
        """Return what tiles are ranked by (T,): the log-probability of a class in the CAM."""
        cam = cam.detach()
        if cam.shape[1] == 1:
            return cam[:, 0]
        found = cam.log_softmax(1)
        if self.options.rank_by != "predicted":
            return found[:, -1]
        answers = branches.detach().mean(1).argmax(1)
        return found.gather(1, answers[dealt.bag][:, None])[:, 0]

    def _second(self, distilled: Tensor, are_there: Tensor) -> PooledBags:
        """Return tier 2's pooling of rows (B, M, hidden), of which some (B, M) are there."""
        if self.training:
            distilled = distilled.detach()
        bags, most = are_there.shape
        borders = torch.arange(bags + 1, dtype=torch.int32, device=distilled.device) * most
        return gated_attention_pool(
            distilled.flatten(0, 1), borders, mask=~are_there.view(-1, 1), **self.second.gates
        )
