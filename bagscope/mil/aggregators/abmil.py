"""ABMIL: attention-based pooling (Ilse et al. 2018), with one gate or two.

h = act(W x + b), or the tile x     (T, hidden)
e = w·(gate(V h) ⊙ σ(U h)) + c      (T, 1); without `gated` no second factor
a = softmax of e over the bag,  z = Σ a h,  logits = Linear(z)
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional

from bagscope.mil.aggregators.gated_attention import Gate, GatedAttention
from bagscope.mil.aggregators.layers import Activation, Init, draw_seed, xavier
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.specs import Spec


class ABMILOptions(Spec):
    """Options of ABMIL."""

    projection: bool = Field(default=True, description="whether tiles are projected first")
    hidden: int = Field(default=512, ge=1, description="width of the projected tile")
    attention: int = Field(default=128, ge=1, description="width of the attention's hidden layer")
    gated: bool = Field(default=False, description="whether a second, sigmoid gate is there")
    gate: Gate = Field(default="tanh", description="the first gate: tanh or relu")
    activation: Activation = Field(default="relu", description="of the projection: relu or gelu")
    dropout: float = Field(default=0.25, ge=0, lt=1, description="of the projected tile")
    attention_dropout: float = Field(default=0.0, ge=0, lt=1, description="of the gates")
    projection_bias: bool = Field(default=True, description="whether the projection has one")
    attention_bias: bool = Field(default=True, description="whether the attention has one")
    init: Init = Field(default="torch", description="initial weights: torch or xavier")

    @model_validator(mode="after")
    def _used(self) -> ABMILOptions:
        for name in ("hidden", "activation", "dropout"):
            default = type(self).model_fields[name].default
            # No dropout is what it has in any case.
            if not self.projection and getattr(self, name) not in (default, 0.0):
                raise ValueError(f"{name} belongs to the projection, and projection is false")
        return self


@register(
    "abmil",
    ABMILOptions,
    summary="attention pooling, one gate or two",
    reference="Ilse et al., Attention-based Deep Multiple Instance Learning, ICML 2018",
)
class ABMIL(Aggregator):
    """Attention pooling with one branch."""

    def __init__(self, features: int, outputs: int, options: ABMILOptions) -> None:
        super().__init__()
        hidden = options.hidden if options.projection else None
        self.attention = GatedAttention(
            features,
            hidden,
            options.attention,
            gated=options.gated,
            gate=options.gate,
            activation=options.activation,
            dropout=options.dropout,
            gate_dropout=options.attention_dropout,
            projection_bias=options.projection_bias,
            attention_bias=options.attention_bias,
        )
        self.classifier = nn.Linear(hidden or features, outputs)
        if options.init == "xavier":
            xavier(self)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; scores are the attention's logits."""
        found = self.attention(bags)
        embedding = found.pooled[:, 0]
        return BagOutput(
            logits=self.classifier(embedding),
            embedding=embedding,
            scores=found.scores,
            score_kind="log_weight",
            entropy=found.entropy,
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return each tile's score and its class logits at weight 1."""
        weight, bias = self.classifier.weight, self.classifier.bias
        h = self.attention.projected(bags.features.to(weight.dtype), draw_seed(bags))
        return PoolingTerms(
            scores=self.attention(bags).scores,
            values=functional.linear(h, weight)[:, None],
            bias=bias,
        )
