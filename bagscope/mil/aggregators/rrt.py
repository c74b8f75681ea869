"""RRT-MIL (Tang et al. 2024): tiles are embedded anew by their region, then pooled by attention.

h = act(W x + b)                     (T, hidden)
h ← h + R-MSA(LN h)                  inside each of g² regions, `layers` times
h ← h + CR-MSA(LN h)                 between the regions, then LN
e = w·gate(V h)                      (T, 1), without biases
a = softmax of e over the bag,  z = Σ a h,  logits = Linear(z)

R-MSA and CR-MSA stand in region_layers.py.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.gated_attention import Gate
from bagscope.mil.aggregators.layers import Activation, Projection, draw_seed, xavier
from bagscope.mil.aggregators.mamba import Way
from bagscope.mil.aggregators.region_layers import (
    CrossRegionAttention,
    RegionAttention,
    lattice_regions,
    stored_regions,
)
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.aggregators.rolling import Product, rolled_back, shares_of
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms, segment_softmax
from bagscope.specs import Spec


class RRTOptions(Spec):
    """Options of RRT-MIL."""

    hidden: int = Field(default=512, ge=1, description="width of the projected tile")
    attention: int = Field(default=128, ge=1, description="width of the pooling's hidden layer")
    layers: int = Field(default=1, ge=0, description="layers of attention inside regions")
    heads: int = Field(default=8, ge=1, description="heads of attention inside regions")
    regions: int = Field(default=8, ge=1, description="regions along a side; a bag has its square")
    epeg: int = Field(
        default=15, ge=0, description="taps of the convolution of attention's logits; 0 for none"
    )
    representatives: int = Field(
        default=3, ge=0, description="of a region, in attention between regions; 0 for none of it"
    )
    cross_heads: int = Field(default=8, ge=1, description="heads of attention between regions")
    shortcut: bool = Field(
        default=False,
        description="whether the projected tile is added once more before the pooling",
    )
    places: Literal["stored", "lattice"] = Field(
        default="stored",
        description="what regions are cut of: a square filled in stored order, or the lattice",
    )
    gate: Gate = Field(default="relu", description="of the pooling: relu or tanh")
    activation: Activation = Field(default="relu", description="of the projection: relu or gelu")
    dropout: float = Field(default=0.25, ge=0, lt=1, description="of the projected tile")
    faithful_pads: bool = Field(
        default=False,
        description="let the zeros that fill up the square take part in attention, as the "
        "published code does",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RRTOptions:
        if self.epeg and self.epeg % 2 == 0:
            raise ValueError(f"epeg is {self.epeg}, and has no middle; choose an odd number, or 0")
        if self.faithful_pads and self.places == "lattice":
            raise ValueError("faithful_pads has no meaning with places lattice: nothing is filled")
        return self


@register(
    "rrt",
    RRTOptions,
    summary="attention inside regions and between them, then attention pooling",
    reference="Tang et al., Feature Re-Embedding, CVPR 2024",
    is_order_free=False,
)
class RRT(Aggregator):
    """Regional attention, then attention pooling with one branch."""

    def __init__(self, features: int, outputs: int, options: RRTOptions) -> None:
        super().__init__()
        hidden = options.hidden
        for name in ("heads", "cross_heads"):
            if hidden % getattr(options, name):
                raise ConfigError(
                    f"aggregator rrt: hidden is {hidden}, no multiple of the "
                    f"{getattr(options, name)} {name}; change {name}"
                )
        self.options = options
        self.projection = Projection(
            features, hidden, activation=options.activation, dropout=options.dropout
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(options.layers))
        self.mixers = nn.ModuleList(
            RegionAttention(hidden, options.heads, options.epeg) for _ in range(options.layers)
        )
        has_cross = options.representatives > 0
        self.cross_norm = nn.LayerNorm(hidden) if has_cross else None
        self.cross = (
            CrossRegionAttention(hidden, options.cross_heads, options.representatives)
            if has_cross
            else None
        )
        self.norm = nn.LayerNorm(hidden)
        self.v = nn.Linear(hidden, options.attention, bias=False)
        self.w = nn.Linear(options.attention, 1, bias=False)
        self.classifier = nn.Linear(hidden, outputs)
        xavier(self)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; scores are the attention's logits, of tiles that know of others."""
        found = self._pooled(self._hidden(bags), bags)
        embedding = found.pooled[:, 0]
        return BagOutput(
            logits=self.classifier(embedding),
            embedding=embedding,
            scores=found.scores,
            score_kind="log_weight",
            entropy=found.entropy,
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return each tile's score and its class logits at weight 1, beside the tiles it has."""
        h = self._hidden(bags)
        return PoolingTerms(
            scores=self._pooled(h, bags).scores,
            values=functional.linear(h, self.classifier.weight)[:, None],
            bias=self.classifier.bias,
        )

    def rollout(self, bags: Bags) -> Tensor:
        """Return attention rollout (T,) from the pooling through the regions; see `rolling`."""
        products: list[Product] = []
        last = self._pooled(self._hidden(bags, products), bags).scores[:, 0]
        bag = bag_of_tile(bags.cu_seqlens, len(last))
        weights = segment_softmax(last[:, None], bag, len(bags))[:, 0]
        found = rolled_back(weights, products)
        assert found is not None, "every product is known"
        if self.options.shortcut:
            found = (found + weights) / 2
        return shares_of(found, bags.cu_seqlens)

    def _hidden(self, bags: Bags, products: list[Product] | None = None) -> Tensor:
        """Return tiles embedded anew (T, hidden), float32, in the order of the bags.

        What each layer does to weights on their way back is added to `products`.
        """
        h = self.projection(bags.features, draw_seed(bags) if self.training else 0)
        narrow, h = h.dtype, h.to(self.norm.weight.dtype)
        embedded, regions = h, self._regions(bags)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            assert isinstance(mixer, RegionAttention)
            x = norm(h).to(narrow)
            h = h + mixer(x, regions)
            if products is not None:
                products.append(partial(mixer.pulled, x, regions))
        if self.cross is not None and self.cross_norm is not None:
            x = self.cross_norm(h).to(narrow)
            h = h + self.cross(x, regions, len(bags))
            if products is not None:
                products.append(partial(self.cross.pulled, x, regions, len(bags)))
        if self.options.shortcut:
            h = h + embedded
        found: Tensor = self.norm(h)
        return found

    @property
    def needs_grid(self) -> bool:
        """Return whether tiles without places on a lattice are refused."""
        return self.options.places == "lattice"

    def _regions(self, bags: Bags) -> Way:
        side = self.options.regions
        if self.options.places == "stored":
            return stored_regions(
                bags.cu_seqlens, len(bags.features), side, is_filled=self.options.faithful_pads
            )
        if bags.grid is None:
            raise ConfigError(
                f"aggregator rrt cuts regions of the lattice, and the tiles of {bags.bag_ids[0]} "
                "have no places on one; give features with places, or train with places stored"
            )
        return lattice_regions(bags.grid, bags.cu_seqlens, side)

    def _pooled(self, h: Tensor, bags: Bags) -> PooledBags:
        return gated_attention_pool(
            h,
            bags.cu_seqlens,
            weight_v=self.v.weight,
            weight_w=self.w.weight,
            gate=self.options.gate,
        )
