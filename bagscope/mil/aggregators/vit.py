"""A slide transformer: layers in which the tiles of a bag learn of each other, then pooling.

h = act(W x + b)                            (T, hidden)
h ← h + mixer(LN h),  h ← h + MLP(LN h)     `layers` times (see `mixers`), then LN
e = w·tanh(V h) + c,  a = softmax of e over the bag,  z = Σ a h,  logits = Linear(z)

With `pooling: class` a learnt token is put in front of every bag, and z is what became of it; with
`mean` every tile weighs the same.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.layers import (
    Activation,
    Projection,
    affine,
    draw_seed,
    dropped,
    linear,
)
from bagscope.mil.aggregators.mixers import MIXERS, Mixer, MixerName, MixerOptions, Rows
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.aggregators.rolling import rolled_back, shares_of
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms, segment_softmax
from bagscope.specs import refuse_unused

Pooling = Literal["attention", "mean", "class"]
_SPREAD = 0.02
_SEEDS = 1 << 62


class ViTOptions(MixerOptions):
    """Options of the slide transformer."""

    hidden: int = Field(default=256, ge=1, description="width of the projected tile")
    layers: int = Field(default=2, ge=1, description="number of layers")
    mixer: MixerName = Field(default="softmax", description="how tiles learn of each other")
    mlp: int = Field(
        default=2, ge=0, description="inner width over hidden of the layers' MLP; 0: none"
    )
    pooling: Pooling = Field(default="attention", description="attention, mean or class")
    attention: int = Field(default=128, ge=1, description="width of the pooling's hidden layer")
    activation: Activation = Field(default="gelu", description="of the projection: relu or gelu")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the projected tile")
    layer_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="of what a mixer or an MLP adds"
    )

    @model_validator(mode="after")
    def _used(self) -> ViTOptions:
        if self.pooling != "attention":
            now = f"pooling is {self.pooling}"
            refuse_unused(self, "attention", of="pooling attention", now=now)
        return self


class Block(nn.Module):
    """One layer of the residual stream."""

    def __init__(self, options: ViTOptions, layer: int) -> None:
        super().__init__()
        hidden, inner = options.hidden, options.mlp * options.hidden
        self.norm = nn.LayerNorm(hidden)
        self.mixer: Mixer = MIXERS[options.mixer](hidden, options, layer, options.layers)
        self.mlp_norm = nn.LayerNorm(hidden) if inner else None
        self.up = nn.Linear(hidden, inner) if inner else None
        self.down = nn.Linear(inner, hidden) if inner else None
        self.dropout = options.layer_dropout

    def mixed(self, h: Tensor, narrow: torch.dtype) -> Tensor:
        """Return what the mixer works on."""
        found: Tensor = self.norm(h).to(narrow)
        return found

    def forward(self, h: Tensor, rows: Rows, narrow: torch.dtype, seed: int) -> Tensor:
        """Return the residual stream (T, hidden) after the layer."""
        h = h + self._dropped(self.mixer(self.mixed(h, narrow), rows), seed)
        if self.mlp_norm is None or self.up is None or self.down is None:
            return h
        inner = functional.gelu(linear(self.mlp_norm(h).to(narrow), self.up))
        return h + self._dropped(linear(inner, self.down), seed + 1)

    def _dropped(self, x: Tensor, seed: int) -> Tensor:
        return dropped(x, self.dropout, seed) if self.training else x


@register(
    "vit",
    ViTOptions,
    summary="transformer over a bag's tiles, with exact or cheaper attention, then pooling",
    reference="Vaswani et al., Attention Is All You Need, NeurIPS 2017, as pathology uses it",
    is_order_free=False,
)
class ViT(Aggregator):
    """Layers that mix tiles, and a pooling."""

    def __init__(self, features: int, outputs: int, options: ViTOptions) -> None:
        super().__init__()
        _require(options)
        self.options = options
        hidden = options.hidden
        self.projection = Projection(
            features, hidden, activation=options.activation, dropout=options.dropout
        )
        self.blocks = nn.ModuleList(Block(options, layer) for layer in range(options.layers))
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, outputs)
        if options.pooling == "attention":
            self.v = nn.Linear(hidden, options.attention)
            self.w = nn.Linear(options.attention, 1)
        elif options.pooling == "class":
            self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, hidden), std=_SPREAD))

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; scores are those of tiles that know of others."""
        rows = self._rows(bags)
        pooling = self.options.pooling
        inputs: list[Tensor] = []
        h = self._hidden(bags, rows, inputs if pooling == "class" else None)
        entropy: Tensor | None = None
        if pooling == "attention":
            found = self._pooled(h, bags)
            embedding, scores, entropy = found.pooled[:, 0], found.scores, found.entropy
        elif pooling == "mean":
            equal = h.new_zeros(len(h), 1)
            embedding = segment_softmax_pool(equal, h, bags.cu_seqlens).pooled[:, 0]
            scores = functional.linear(h, self.classifier.weight, self.classifier.bias)
        else:
            embedding = h[rows.cu_seqlens[:-1].long()]
            taken = self._blocks()[-1].mixer.class_weights(inputs[-1], rows)[rows.tiles()]
            scores = taken.clamp_min(torch.finfo(taken.dtype).tiny).log()[:, None]
        return BagOutput(
            logits=self.classifier(embedding),
            embedding=embedding,
            scores=scores,
            score_kind="instance_logit" if pooling == "mean" else "log_weight",
            entropy=entropy,
        )

    @property
    def needs_grid(self) -> bool:
        """Return whether tiles are told apart by their places."""
        options = self.options
        by_lattice = options.mixer == "neighbours" or options.window > 0 or options.local
        return by_lattice or self.needs_micrometres

    @property
    def needs_micrometres(self) -> bool:
        """Return whether tiles are told apart by their places in micrometres."""
        return self.options.mixer == "alibi"

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return each tile's score and its class logits at weight 1, beside the tiles it has."""
        if self.options.pooling == "class":
            return None
        h = self._hidden(bags, self._rows(bags))
        is_mean = self.options.pooling == "mean"
        return PoolingTerms(
            scores=h.new_zeros(len(h), 1) if is_mean else self._pooled(h, bags).scores,
            values=functional.linear(h, self.classifier.weight)[:, None],
            bias=self.classifier.bias,
        )

    def rollout(self, bags: Bags) -> Tensor | None:
        """Return attention rollout (tiles,), which adds up to 1 over a bag; see `explain.rollout`.

        None of a mixer whose weights can't be read out in linear memory.
        """
        rows = self._rows(bags)
        inputs: list[Tensor] = []
        h = self._hidden(bags, rows, inputs)
        if self.options.pooling == "attention":
            bag = bag_of_tile(bags.cu_seqlens, len(h))
            weights = segment_softmax(self._pooled(h, bags).scores, bag, len(bags))[:, 0]
        elif self.options.pooling == "mean":
            lengths = bags.lengths.long()
            weights = (1 / lengths.to(h.dtype)).repeat_interleave(lengths, output_size=len(h))
        else:
            first = rows.cu_seqlens[:-1].long()
            weights = h.new_zeros(len(h)).index_fill(0, first, 1.0)
        products = [
            partial(block.mixer.pulled, x, rows)
            for block, x in zip(self._blocks(), inputs, strict=True)
        ]
        found = rolled_back(weights, products)
        if found is None or not rows.class_tokens:
            return found
        return shares_of(found[rows.tiles()], bags.cu_seqlens)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _rows(self, bags: Bags) -> Rows:
        rows = Rows.of(bags, 1 if self.options.pooling == "class" else 0)
        return self._blocks()[0].mixer.prepared(rows)

    def _hidden(self, bags: Bags, rows: Rows, inputs: list[Tensor] | None = None) -> Tensor:
        """Return the normed residual stream (T, hidden), float32.

        `inputs`, where given, gets what the mixer of each layer works on.
        """
        draws = self.training and (self.options.dropout or self.options.layer_dropout)
        seed = draw_seed(bags) if draws else 0
        h = self.projection(bags.features, seed)
        narrow, h = h.dtype, h.to(self.norm.weight.dtype)
        if rows.class_tokens:
            h = rows.with_class_tokens(h, self.token)
        for place, block in enumerate(self._blocks()):
            if inputs is not None:
                inputs.append(block.mixed(h, narrow))
            h = block(h, rows, narrow, (seed + 2 * place + 1) * 1_000_003 % _SEEDS)
        found: Tensor = self.norm(h)
        return found

    def _pooled(self, h: Tensor, bags: Bags) -> PooledBags:
        weight_v, bias_v = affine(self.v)
        weight_w, bias_w = affine(self.w)
        return gated_attention_pool(
            h, bags.cu_seqlens,
            weight_v=weight_v, bias_v=bias_v, weight_w=weight_w, bias_w=bias_w,
        )  # fmt: skip


def _require(options: ViTOptions) -> None:
    """Refuse options that another one makes void.

    Raises:
        ConfigError: names them.
    """
    kind = MIXERS[options.mixer]
    fields = MixerOptions.model_fields
    for name in sorted(set(fields) - {"heads"} - kind.uses):
        if getattr(options, name) != fields[name].default:
            raise ConfigError(
                f"aggregator vit: {name} is no option of mixer {options.mixer}; leave it out"
            )
    if options.pooling == "class" and not kind.reads_class:
        readable = ", ".join(name for name, one in MIXERS.items() if one.reads_class)
        raise ConfigError(
            f"aggregator vit: pooling class reads its scores from the class token's attention, "
            f"which mixer {options.mixer} does not tell; choose pooling attention or mean, or one "
            f"of {readable}"
        )
