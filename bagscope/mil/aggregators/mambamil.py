"""MambaMIL (Yang et al. 2024): state-space layers over a bag's tiles, then attention pooling.

h = GELU(W x + b)                            (T, hidden)
h ← h + mixer(LN h), a few times             (see `mamba`), then LN
e = w·tanh(V h) + c                          (T, 1)
a = softmax of e over the bag,  z = Σ a h,  logits = Linear(z)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.kernels.varlen_self_attention.hilbert import hilbert_index
from bagscope.mil.aggregators.layers import Projection, affine, draw_seed, xavier
from bagscope.mil.aggregators.mamba import CoreName, Mixer, Way, Ways, reordered, strided
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec, refuse_unused

Order = Literal["stored", "raster", "hilbert"]


class MambaMILOptions(Spec):
    """Options of MambaMIL."""

    hidden: int = Field(default=512, ge=1, description="width of the projected tile")
    attention: int = Field(default=128, ge=1, description="width of the attention's hidden layer")
    layers: int = Field(default=2, ge=1, description="number of state-space layers")
    ways: Ways = Field(
        default="sr",
        description="along which the tiles are read: plain, bi (and backwards), sr (and every "
        "rate-th), cross (and by columns of the lattice)",
    )
    rate: int = Field(default=5, ge=1, description="of sr: how many segments a bag is dealt into")
    core: CoreName = Field(default="mamba", description="mamba (S6) or mamba2 (SSD)")
    states: int = Field(default=16, ge=1, le=256, description="of every channel, or head")
    expand: int = Field(default=2, ge=1, description="inner width over hidden")
    head: int = Field(default=64, ge=1, description="width of a head of mamba2")
    order: Order = Field(
        default="stored", description="of the tiles: stored, raster (rows) or hilbert"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the projected tile")
    faithful_init: bool = Field(
        default=False,
        description="draw the mixers' linear layers by Xavier too, as the published code does: "
        "first steps are then 0.69 in place of 0.001 to 0.1",
    )

    @model_validator(mode="after")
    def _used(self) -> MambaMILOptions:
        if self.ways != "sr":
            refuse_unused(self, "rate", of="ways sr", now=f"ways is {self.ways}")
        if self.core != "mamba2":
            refuse_unused(self, "head", of="core mamba2", now=f"core is {self.core}")
        return self


@register(
    "mambamil",
    MambaMILOptions,
    summary="state-space layers along two orders of the tiles, then attention pooling",
    reference="Yang et al., MambaMIL, MICCAI 2024",
    is_order_free=False,
)
class MambaMIL(Aggregator):
    """State-space layers, then attention pooling with one branch."""

    def __init__(self, features: int, outputs: int, options: MambaMILOptions) -> None:
        super().__init__()
        if options.core == "mamba2" and options.expand * options.hidden % options.head:
            raise ConfigError(
                f"aggregator mambamil: expand · hidden is {options.expand * options.hidden}, which "
                f"heads of {options.head} do not divide; change head"
            )
        self.options = options
        hidden = options.hidden
        self.projection = Projection(features, hidden, activation="gelu", dropout=options.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(options.layers))
        self.norm = nn.LayerNorm(hidden)
        self.v = nn.Linear(hidden, options.attention)
        self.w = nn.Linear(options.attention, 1)
        self.classifier = nn.Linear(hidden, outputs)
        xavier(self)
        self.mixers = nn.ModuleList(
            Mixer(
                hidden,
                ways=options.ways,
                core=options.core,
                states=options.states,
                expand=options.expand,
                head=options.head,
            )
            for _ in range(options.layers)
        )
        if options.faithful_init:
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

    @property
    def needs_grid(self) -> bool:
        """Return whether tiles are read by their places."""
        return self.options.order != "stored" or self.options.ways == "cross"

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return each tile's score and its class logits at weight 1, beside the tiles it has."""
        h = self._hidden(bags)
        return PoolingTerms(
            scores=self._pooled(h, bags).scores,
            values=functional.linear(h, self.classifier.weight)[:, None],
            bias=self.classifier.bias,
        )

    def _hidden(self, bags: Bags) -> Tensor:
        """Return the normed residual stream (T, hidden), float32, in the order of the bags."""
        h = self.projection(bags.features, draw_seed(bags) if self.training else 0)
        narrow, h = h.dtype, h.to(self.norm.weight.dtype)
        borders = bags.cu_seqlens
        first = self._order(bags, self.options.order)
        if first is not None:
            h = h[first]
        other = self._second_way(bags, first)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            h = h + mixer(norm(h).to(narrow), borders, other)
        found: Tensor = self.norm(h)
        return found if first is None else found[torch.argsort(first)]

    def _second_way(self, bags: Bags, first: Tensor | None) -> Way | None:
        if self.options.ways == "sr":
            return strided(bags.cu_seqlens, self.options.rate)
        if self.options.ways != "cross":
            return None
        columns = self._order(bags, "columns")
        assert columns is not None, "only the stored order is none"
        if first is not None:
            columns = torch.argsort(first)[columns]
        return reordered(columns, bags.cu_seqlens)

    def _order(self, bags: Bags, name: Order | Literal["columns"]) -> Tensor | None:
        """Return the rows (T,) in an order, each bag's within its borders; None as they are."""
        if name == "stored":
            return None
        if bags.grid is None:
            raise ConfigError(
                f"aggregator mambamil reads tiles by their places ({name}), and those of "
                f"{bags.bag_ids[0]} have none; give features with places, or train with order "
                "stored and ways sr, bi or plain"
            )
        column, row = bags.grid.long().unbind(1)
        lengths = bags.lengths.long()
        bag = torch.arange(len(lengths), device=row.device).repeat_interleave(
            lengths, output_size=len(row)
        )
        if name == "hilbert":
            least = torch.full((len(lengths), 2), torch.iinfo(torch.int64).max, device=row.device)
            least = least.scatter_reduce(0, bag[:, None].expand(-1, 2), bags.grid.long(), "amin")
            own = bags.grid.long() - least[bag]
            keys = [hilbert_index(own[:, 0], own[:, 1])]
        else:
            keys = [column, row] if name == "raster" else [row, column]
        order = torch.arange(len(row), device=row.device)
        for key in (*keys, bag):
            order = order[torch.argsort(key[order], stable=True)]
        return order

    def _pooled(self, h: Tensor, bags: Bags) -> PooledBags:
        gates: dict[str, Any] = dict(
            zip(("weight_v", "bias_v"), affine(self.v), strict=True)
        ) | dict(zip(("weight_w", "bias_w"), affine(self.w), strict=True))
        return gated_attention_pool(h, bags.cu_seqlens, **gates)
