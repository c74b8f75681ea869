"""What aggregators are made of: the projection of every tile, products in the dtype of the bag.

Parameters are float32, features may be narrower. A product is done in the dtype of the features
(float16 on a processor: in float32, which is faster there), its gradients reach the parameters in
float32.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from bagscope.kernels.gated_scores.cpu import computing_dtype
from bagscope.kernels.gated_scores.dropout import tile_dropout
from bagscope.mil.bags import Bags

Activation = Literal["relu", "gelu"]
Init = Literal["torch", "xavier"]
_SEEDS = 1 << 62
"""The kernels take seeds of 64 bits with a sign."""


class Projection(nn.Linear):
    """h = dropout(act(W x + b)), the same for every tile."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        bias: bool = True,
        activation: Activation = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(features, hidden, bias=bias)
        self.activation = activation
        self.dropout = dropout

    def forward(self, features: Tensor, seed: int = 0) -> Tensor:
        """Return h (T, hidden) of features (T, D); `seed` keys the draws of dropout."""
        h = linear(features, self)
        # In place: a product's gradients do not need what it gave.
        h = functional.relu_(h) if self.activation == "relu" else functional.gelu(h)
        return dropped(h, self.dropout, seed) if self.training else h


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return a linear layer's output, computed in the dtype of x."""
    dtype = computing_dtype(x)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return functional.linear(x.to(dtype), layer.weight.to(dtype), bias)


def affine(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return a linear layer's weight and bias."""
    return layer.weight, layer.bias


def in_parts(x: Tensor, parts: int) -> Tensor:
    """Return x (..., D) with its last axis in equal parts: (..., parts, D / parts)."""
    return x.reshape(*x.shape[:-1], parts, x.shape[-1] // parts)


def xavier(module: nn.Module) -> None:
    """Set weights of all linear layers by Xavier's normal rule and their biases to zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def draw_seed(bags: Bags, use: int = 0) -> int:
    """Return what one of several uses of randomness in a step draws from."""
    return ((bags.seed * 1_000_003 + bags.step) * 7 + use) % _SEEDS


def dropped(h: Tensor, p: float, seed: int) -> Tensor:
    """Return h (rows, columns) after dropout whose draws `seed` alone decides."""
    return h * tile_dropout(len(h), h.shape[1], p, seed, h) if p else h
