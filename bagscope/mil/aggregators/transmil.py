"""TransMIL (Shao et al. 2021): Nyström attention over a bag's tiles and a class token.

x = [class token, ReLU(W x + b), the first tiles again until there is a square]
x ← x + attention(LN x);  x ← PPEG(x) (see `ppeg`);  x ← x + attention(LN x)
logits = Linear(LN x of the class token)

attention = Linear(N V + conv₃₃(V)), N V as in `bagscope.kernels.nystrom_attention`. Of the last one
the class token's row alone is used, and made: the weights of N for that row, whose sum over the
tiles is taken before it is multiplied with what makes values of them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.dispatch import kept_bytes
from bagscope.kernels.gated_scores.cpu import computing_dtype
from bagscope.kernels.linear_attention.halves import gather
from bagscope.kernels.nystrom_attention import (
    head_conv,
    landmark_means,
    nystrom_attention,
    nystrom_first_rows,
)
from bagscope.kernels.segments import bag_of_tile
from bagscope.kernels.varlen_self_attention import varlen_self_attention
from bagscope.mil.aggregators.layers import Projection, draw_seed, linear
from bagscope.mil.aggregators.lean_layers import (
    add_dropped,
    laid_out,
    normed_products,
    normed_rows,
)
from bagscope.mil.aggregators.ppeg import PPEG
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.aggregators.rolling import (
    pulled_through,
    pulled_through_softmax,
    rolled_back,
    shares_of,
)
from bagscope.mil.bags import BagOutput, Bags, segment_softmax
from bagscope.specs import Spec, refuse_unused

LEAST_SHARE = 1e-3
"""Of an even share of the attention: what tiles of less, or of negative weight, are shown with."""


class TransMILOptions(Spec):
    """Options of TransMIL."""

    hidden: int = Field(default=512, ge=1, description="width of a tile in the network")
    heads: int = Field(default=8, ge=1, description="of the attention")
    attention: Literal["nystrom", "exact"] = Field(
        default="nystrom", description="nystrom, or exact: every tile looks at every other"
    )
    landmarks: int = Field(default=256, ge=1, description="of nystrom: means it goes through")
    iterations: int = Field(default=6, ge=1, description="of nystrom's pseudo-inverse")
    taps: int = Field(default=33, ge=1, description="of the convolution beside it, odd")
    ppeg: Literal["stored", "lattice"] = Field(
        default="stored",
        description="tiles that are neighbours: stored (in a square, row by row), lattice (on the "
        "slide)",
    )
    ppeg_sizes: tuple[int, ...] = Field(
        default=(7, 5, 3), min_length=1, description="of PPEG's convolutions, odd"
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="of what an attention adds")
    score_layer: Literal[1, 2] = Field(
        default=1, description="whose attention of the class token is a tile's score"
    )
    faithful_pads: bool = Field(
        default=False, description="of nystrom: zeros in front take part, as published"
    )
    faithful_start: bool = Field(
        default=False,
        description="of nystrom: scale the pseudo-inverse's start over all heads, as published",
    )

    @field_validator("taps", "ppeg_sizes")
    @classmethod
    def _odd(cls, sizes: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if any(
            size % 2 == 0 or size < 1 for size in ([sizes] if isinstance(sizes, int) else sizes)
        ):
            raise ValueError("must be odd")
        return sizes

    @model_validator(mode="after")
    def _of_nystrom(self) -> TransMILOptions:
        names = ("landmarks", "iterations", "faithful_pads", "faithful_start")
        if self.attention == "exact":
            refuse_unused(self, *names, of="attention nystrom", now="attention is exact")
        return self


class Rows(NamedTuple):
    """Where class tokens and tiles lie among the rows.

    Attributes:
        borders: (B + 1,) int32 of the bags' rows.
        first: (B,) the class tokens.
        tile: (T,) the tiles.
        again: (T,) the row that repeats a tile, R where none does.
    """

    borders: Tensor
    first: Tensor
    tile: Tensor
    again: Tensor


class Attention(nn.Module):
    """One layer of attention."""

    def __init__(self, options: TransMILOptions) -> None:
        super().__init__()
        self.options = options
        width = options.hidden
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.taps = nn.Parameter(torch.empty(options.heads, options.taps))
        nn.init.kaiming_uniform_(self.taps, a=math.sqrt(5))
        self.out = nn.Linear(width, width)
        self.how: dict[str, Any] = {
            "landmarks": options.landmarks,
            "iterations": options.iterations,
            "zero_pads": options.faithful_pads,
            "shared_start": options.faithful_start,
        }

    def forward(
        self, x: Tensor, rows: Rows, narrow: torch.dtype, *, with_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return what is added to all rows (R, hidden), and the class tokens' weights (R, H)."""
        # Queries and keys are a third of what a step keeps; two products would make them again.
        fits = 2 * x.numel() * narrow.itemsize <= kept_bytes()
        parts, unkept = normed_products(
            x, self.norm, self.qkv.weight.chunk(3), narrow, unkept=0 if fits else 2
        )
        q, k, v = (part.view(len(x), self.options.heads, -1) for part in parts)
        weights = None
        if self.options.attention == "exact":
            found = varlen_self_attention(q, k, v, rows.borders)
            found = found + head_conv(v, self.taps, rows.borders)
            if with_weights:
                weights = _softmax_rows(q[rows.first], k, rows.borders)
        else:
            with unkept:
                found, weights = nystrom_attention(
                    q, k, v, rows.borders, taps=self.taps, with_first_rows=with_weights, **self.how
                )
        return linear(found.flatten(1), self.out), weights

    def of_class_tokens(self, x: Tensor, rows: Rows, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what is added to the class tokens (B, hidden), and their weights (R, H)."""
        x, unkept = normed_rows(x, self.norm, computing_dtype(x.new_empty(0, dtype=narrow)))
        with unkept:
            return self._of_normed(x, rows)

    def _of_normed(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        heads, half = self.options.heads, self.options.taps // 2
        of_q, of_k, of_v = self.qkv.weight.chunk(3)
        first, k = self._heads(x[rows.first], of_q), self._heads(x, of_k)
        if self.options.attention == "exact":
            weights = _softmax_rows(first, k, rows.borders)
        else:
            means = landmark_means(
                x, rows.borders, self.how["landmarks"], zero_pads=self.how["zero_pads"]
            )
            means = self._heads(means, of_q)
            weights = nystrom_first_rows(first, means, k, rows.borders, **self.how)
        # The convolution at a class token: the taps are more weight for what follows it.
        after = (
            torch.arange(len(x), device=x.device) - rows.first[bag_of_tile(rows.borders, len(x))]
        )
        taps = functional.pad(self.taps, (0, 1))[:, (after + half).clamp(max=2 * half + 1)]
        both = weights + taps.T
        mixed, _ = gather(both[:, None], x.to(both.dtype)[:, None], rows.borders)
        found = torch.einsum("bhc,hdc->bhd", mixed[:, 0], of_v.view(heads, -1, x.shape[1]))
        return linear(found.flatten(1), self.out), weights

    def pulled(self, x: Tensor, rows: Rows, narrow: torch.dtype, weights: Tensor) -> Tensor:
        """Return Σ_i w_i N_ij (R,), the mean over heads; the convolution is left out."""
        parts = linear(self.norm(x).to(narrow), self.qkv)
        q, k, _ = parts.view(len(x), 3, self.options.heads, -1).unbind(1)
        if self.options.attention == "exact":
            return pulled_through_softmax(q, k, weights, rows.borders)

        def attend(values: Tensor) -> Tensor:
            width = values.shape[-1]
            wide = functional.pad(values, (0, q.shape[-1] - width))
            found, _ = nystrom_attention(q, k, wide, rows.borders, **self.how)
            return found[..., :width]

        return pulled_through(attend, weights, q)

    def _heads(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x times a third of the weight, (R, H, d)."""
        found = functional.linear(x, weight.to(x.dtype))
        heads = self.options.heads
        return found.view(len(x), heads, self.options.hidden // heads)


@register(
    "transmil",
    TransMILOptions,
    summary="two layers of Nyström attention with a class token, convolutions between them",
    reference="Shao et al., TransMIL, NeurIPS 2021",
    is_order_free=False,
)
class TransMIL(Aggregator):
    """Attention between tiles, and a class token that reads them."""

    def __init__(self, features: int, outputs: int, options: TransMILOptions) -> None:
        super().__init__()
        if options.hidden % options.heads:
            raise ConfigError(
                f"aggregator transmil: hidden is {options.hidden}, which {options.heads} heads do "
                "not divide; change heads"
            )
        self.options = options
        self.projection = Projection(features, options.hidden)
        self.class_token = nn.Parameter(torch.randn(1, options.hidden))
        self.layers = nn.ModuleList(Attention(options) for _ in range(2))
        self.ppeg = PPEG(options.hidden, options.ppeg_sizes)
        self.norm = nn.LayerNorm(options.hidden)
        self.classifier = nn.Linear(options.hidden, outputs)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; a tile's score is its share of a class token's attention."""
        self._require_places(bags)
        dropout = self.options.dropout if self.training else 0.0
        x, rows, narrow = self._rows(bags)
        first, second = self.layers
        assert isinstance(first, Attention)
        assert isinstance(second, Attention)
        added, weights = first(x, rows, narrow, with_weights=self.options.score_layer == 1)
        x = self._between(add_dropped(x, added, dropout, draw_seed(bags, 1)), rows, bags)
        # Taken first, its gradient, as large as x, comes last.
        token = x[rows.first]
        added, last_weights = second.of_class_tokens(x, rows, narrow)
        token = add_dropped(token, added, dropout, draw_seed(bags, 2))
        embedding = self.norm(token)
        return BagOutput(
            logits=self.classifier(embedding),
            embedding=embedding,
            scores=_scores(last_weights if weights is None else weights, rows, bags),
            score_kind="log_weight",
        )

    def rollout(self, bags: Bags) -> Tensor:
        """Return attention rollout (T,) from the class tokens, without PPEG; see `rolling`."""
        self._require_places(bags)
        start, rows, narrow = self._rows(bags)
        first, second = self.layers
        assert isinstance(first, Attention)
        assert isinstance(second, Attention)
        added, _ = first(start, rows, narrow, with_weights=False)
        _, taken = second.of_class_tokens(self._between(start + added, rows, bags), rows, narrow)
        token = start.new_zeros(len(start)).index_fill(0, rows.first, 1.0)
        found = rolled_back(
            token, [partial(first.pulled, start, rows, narrow), lambda _: taken.mean(1).to(token)]
        )
        assert found is not None, "both products are known"
        found = functional.pad(found, (0, 1))
        return shares_of(found[rows.tile] + found[rows.again], bags.cu_seqlens)

    @property
    def needs_grid(self) -> bool:
        """Return whether tiles without places on a lattice are refused."""
        return self.options.ppeg == "lattice"

    def _rows(self, bags: Bags) -> tuple[Tensor, Rows, torch.dtype]:
        """Return class tokens, projected tiles and what is repeated (R, hidden); where; in what."""
        before = linear(bags.features, self.projection)
        lengths = bags.lengths.tolist()
        added = [0 if self.options.ppeg == "lattice" else _to_square(n) for n in lengths]
        x = laid_out(before, self.class_token, lengths, added, self.norm.weight.dtype)
        repeated = torch.tensor(added, device=x.device)
        starts = functional.pad((bags.lengths + 1 + repeated).cumsum(0), (1, 0))
        bag = bag_of_tile(bags.cu_seqlens, len(before))
        own = torch.arange(len(before), device=x.device) - bags.cu_seqlens.long()[bag]
        tile = starts[bag] + 1 + own
        again = torch.where(own < repeated[bag], tile + bags.lengths[bag], len(x))
        return x, Rows(starts.int(), starts[:-1], tile, again), before.dtype

    def _between(self, x: Tensor, rows: Rows, bags: Bags) -> Tensor:
        if self.options.ppeg == "stored":
            return self.ppeg.in_squares(x, rows.borders)
        return torch.index_copy(x, 0, rows.tile, self.ppeg.on_lattice(x[rows.tile], bags))

    def _require_places(self, bags: Bags) -> None:
        if self.options.ppeg == "lattice" and bags.grid is None:
            raise ConfigError(
                "aggregator transmil looks for neighbours on the lattice, and the tiles of "
                f"{bags.bag_ids[0]} have no places; give features with places, or train with ppeg "
                "stored"
            )


def _to_square(tiles: int) -> int:
    """Return how many tiles are missing in a square."""
    return (math.isqrt(tiles - 1) + 1) ** 2 - tiles if tiles else 0


def _softmax_rows(first: Tensor, k: Tensor, borders: Tensor) -> Tensor:
    """Return the exact weights (R, H) of each bag's first row, queries (B, H, d)."""
    bag = bag_of_tile(borders, len(k))
    exact = torch.promote_types(k.dtype, torch.float32)
    scores = (first.to(exact)[bag] * k.to(exact)).sum(-1) * k.shape[-1] ** -0.5
    return segment_softmax(scores, bag, len(borders) - 1)


def _scores(weights: Tensor, rows: Rows, bags: Bags) -> Tensor:
    """Return the log of each tile's weight over an even share, (T, 1), of (R, H); no gradient."""
    share = functional.pad(weights.detach().mean(1), (0, 1))
    lengths = bags.lengths[bag_of_tile(bags.cu_seqlens, len(rows.tile))]
    share = (share[rows.tile] + share[rows.again]) * lengths
    return share.clamp(min=LEAST_SHARE).log()[:, None]
