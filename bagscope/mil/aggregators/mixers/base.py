"""What every mixer is: a layer in which the tiles of a bag learn of each other.

A mixer maps rows x (T, width) to what is added to the residual stream (T, width). Its core is a
product A v of weights A, which depend on x, with values v; `pulled` is the product with the
transpose, wᵀ A, for reading out where a prediction came from (see `bagscope.mil.explain.rollout`).

Parameters have the names that they have in the reference code, so that its weights load as they
are.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.layers import linear
from bagscope.mil.aggregators.mixers.rows import Rows, heads_of
from bagscope.mil.aggregators.rolling import pulled_through
from bagscope.specs import Spec

Reads = Literal["both", "forward"]
Norm = Literal["layernorm", "rmsnorm", "simplermsnorm"]


class MixerOptions(Spec):
    """Options of the mixers; each uses some of them."""

    heads: int = Field(default=8, ge=1, description="of attention")
    alibi_um: float = Field(
        default=128.0,
        gt=0,
        description="of alibi: micrometres that count as one step; a step costs head h 2^(-8h/H)",
    )
    radius: int = Field(
        default=3, ge=0, description="of neighbours: steps on the lattice that a tile sees"
    )
    agents: int = Field(default=49, ge=1, description="of agent: how many there are")
    window: int = Field(
        default=0,
        ge=0,
        description="of agent: places along a side of the window that biases are learnt for; 0: "
        "agents are means of consecutive tiles, without biases",
    )
    local: bool = Field(
        default=False, description="of inline: a 3 × 3 kernel on the lattice, made for each bag"
    )
    reads: Reads = Field(
        default="both", description="of lightning: tiles on both sides, or those before (forward)"
    )
    decay: bool = Field(
        default=False, description="of lightning: whether tiles count less the farther they are"
    )
    norm: Norm = Field(
        default="layernorm",
        description="of lightning, after attention: layernorm, rmsnorm or simplermsnorm",
    )


class Mixer(nn.Module):
    """A layer that mixes tiles.

    Attributes:
        uses: options of its own, beside `heads`.
        reads_class: whether a class token's weights can be read out, as non-negative numbers.
        is_causal: whether a row learns of earlier ones alone.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    reads_class: ClassVar[bool] = False

    def __init__(self, width: int, options: MixerOptions, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        if width % options.heads:
            raise ConfigError(
                f"aggregator vit: hidden is {width}, which {options.heads} heads do not divide; "
                "change heads"
            )
        self.heads = options.heads
        self.options = options

    def prepared(self, rows: Rows) -> Rows:
        """Return the rows with what all layers need to know of them, found once."""
        return rows

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what is added to the residual stream (T, width), in the dtype of x."""
        raise NotImplementedError

    def pulled(self, x: Tensor, rows: Rows, weights: Tensor) -> Tensor | None:
        """Return Σ_i w_i A_ij (T,), the mean over heads, of weights (T,); rows of A add up to 1.

        None where that would take a matrix of all pairs.
        """
        raise NotImplementedError

    def class_weights(self, x: Tensor, rows: Rows) -> Tensor:
        """Return how much each bag's class token takes of each row (T,), the mean over heads."""
        raise NotImplementedError


class FusedMixer(Mixer):
    """A mixer whose queries, keys and values come of one linear layer."""

    def __init__(self, width: int, options: MixerOptions, layer: int = 0, layers: int = 1) -> None:
        super().__init__(width, options, layer, layers)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what is added to the residual stream."""
        q, k, v = self.split(x)
        return linear(self.attend(q, k, v, rows).flatten(1).to(x.dtype), self.proj)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return A v (T, H, dv), linear in v."""
        raise NotImplementedError

    def pulled(self, x: Tensor, rows: Rows, weights: Tensor) -> Tensor | None:
        """Return Σ_i w_i A_ij (T,)."""
        q, k, _ = self.split(x)
        return pulled_through(lambda v: self.attend(q, k, v, rows), weights, q)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (T, H, d)."""
        q, k, v = linear(x, self.qkv).chunk(3, 1)
        return heads_of(q, self.heads), heads_of(k, self.heads), heads_of(v, self.heads)
