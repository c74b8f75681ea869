"""Every differentiable operation of the kernels behind one face, for tests that all must pass.

Shapes: T tiles, `heads` heads of `width` features, 3 branches; cu_seqlens is (B + 1,) int32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bagscope.kernels.causal_conv1d import causal_conv1d
from bagscope.kernels.cross_attention_pool import cross_attention_pool
from bagscope.kernels.gated_attention_pool import gated_attention_pool
from bagscope.kernels.gated_scores import gated_scores
from bagscope.kernels.linear_attention import (
    agent_attention,
    flow_attention,
    inline_attention,
    linear_attention,
)
from bagscope.kernels.nystrom_attention import nystrom_attention
from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.kernels.selective_scan import selective_scan
from bagscope.kernels.ssd_scan import ssd_scan
from bagscope.kernels.varlen_self_attention import varlen_self_attention
from tests.kernels.packed import borders, normal

BRANCHES, STATES = 3, 4
Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        call: takes the inputs by name, returns tensors without infinities.
        per_tile: names of the inputs with one row per tile.
        build: makes the inputs but `cu_seqlens` of (tiles, heads, width).
        pools: whether outputs have one row per bag rather than per tile.
    """

    call: Callable[..., tuple[Tensor, ...]]
    per_tile: tuple[str, ...]
    build: Callable[[int, int, int], Inputs]
    pools: bool = False

    def inputs(
        self,
        lengths: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        heads: int = 2,
        width: int = 8,
        device: str = "cpu",
    ) -> dict[str, Tensor | None]:
        """Return inputs of bags of these lengths; the same numbers in every dtype, but rounded."""
        made = self.build(sum(lengths), heads, width)
        moved: dict[str, Tensor | None] = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in made.items()
        }
        return {**moved, "cu_seqlens": borders(lengths, device)}


def lattice(tiles: int) -> Tensor:
    """Return distinct places on a square with holes, in no order."""
    side = int((2 * tiles) ** 0.5) + 2
    chosen = torch.randperm(side * side, generator=torch.Generator().manual_seed(5))[:tiles]
    return torch.stack([chosen % side, chosen // side], 1)


def _qkv(tiles: int, heads: int, width: int, *, near: bool = False) -> Inputs:
    made = {n: normal(tiles, heads, width, seed=i, scale=0.5) for i, n in enumerate("qkv")}
    made = {name: value.double() for name, value in made.items()}
    return {**made, "grid": lattice(tiles)} if near else made


def _pool_inputs(tiles: int, heads: int, width: int) -> Inputs:
    q = normal(BRANCHES, heads, width, seed=3, dtype=torch.float64)
    return {**_qkv(tiles, heads, width), "q": q}


def _gate_inputs(tiles: int, heads: int, width: int, *, rows: str = "h") -> Inputs:
    wide, gates = heads * width, width
    shapes = {
        "weight_v": (gates, wide), "bias_v": (gates,), "weight_u": (gates, wide),
        "bias_u": (gates,), "weight_w": (BRANCHES, gates), "bias_w": (BRANCHES,),
    }  # fmt: skip
    made = {rows: normal(tiles, wide, seed=1, dtype=torch.float64)}
    for seed, (name, shape) in enumerate(shapes.items(), 2):
        made[name] = normal(*shape, seed=seed, dtype=torch.float64, scale=shape[-1] ** -0.5)
    return made


def _segment_inputs(tiles: int, heads: int, width: int) -> Inputs:
    return {
        "scores": normal(tiles, BRANCHES, seed=1, dtype=torch.float64, scale=2),
        "h": normal(tiles, heads * width, seed=2, dtype=torch.float64),
    }


def _conv_inputs(tiles: int, heads: int, width: int) -> Inputs:
    wide = heads * width
    shapes = {"x": (tiles, wide), "weight": (wide, 4), "bias": (wide,)}
    return {
        name: normal(*shape, seed=seed, dtype=torch.float64)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def _s6_inputs(tiles: int, heads: int, width: int) -> Inputs:
    wide = heads * width
    shapes = {
        "u": (tiles, wide), "delta": (tiles, wide), "A": (wide, STATES), "B": (tiles, STATES),
        "C": (tiles, STATES), "D": (wide,), "z": (tiles, wide), "delta_bias": (wide,),
    }  # fmt: skip
    made = {
        name: normal(*shape, seed=seed, dtype=torch.float64)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return {**made, "A": -made["A"].abs() - 0.01}


def _ssd_inputs(tiles: int, heads: int, width: int) -> Inputs:
    shapes = {
        "x": (tiles, heads, width), "dt": (tiles, heads), "A": (heads,), "B": (tiles, 1, width),
        "C": (tiles, 1, width), "D": (heads,), "z": (tiles, heads, width),
    }  # fmt: skip
    made = {
        name: normal(*shape, seed=seed, dtype=torch.float64)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return {**made, "dt": made["dt"].abs(), "A": -made["A"].abs() - 0.01}


def _cross(**given: Any) -> tuple[Tensor, ...]:
    pooled, lse, _ = cross_attention_pool(**given)
    return pooled, lse.masked_fill(lse.isinf(), 0)


def _segment(**given: Any) -> tuple[Tensor, ...]:
    pooled, lse, entropy, _ = segment_softmax_pool(**given)
    return pooled, lse.masked_fill(lse.isinf(), 0), entropy


def _gated(**given: Any) -> tuple[Tensor, ...]:
    found = gated_attention_pool(**given)
    return found.pooled, found.lse.masked_fill(found.lse.isinf(), 0), found.entropy


def _near(grid: Tensor, **given: Any) -> tuple[Tensor, ...]:
    return (varlen_self_attention(**given, neighbours=(grid, 2)),)


def _nystrom(**given: Any) -> tuple[Tensor, ...]:
    # Fewer landmarks than the longer bags have tiles, more than the shorter ones.
    return (nystrom_attention(**given, landmarks=9)[0],)


def _one(function: Callable[..., Tensor], **given: Any) -> tuple[Tensor, ...]:
    return (function(**given),)


def _scores(cu_seqlens: Tensor, **given: Any) -> tuple[Tensor, ...]:
    return (gated_scores(**given),)


_QKV = ("q", "k", "v")
OPS = {
    "agent_attention": Op(partial(_one, partial(agent_attention, agents=9)), _QKV, _qkv),
    "causal_conv1d": Op(partial(_one, partial(causal_conv1d, silu=True)), ("x",), _conv_inputs),
    "cross_attention_pool": Op(_cross, ("k", "v"), _pool_inputs, pools=True),
    "flow_attention": Op(partial(_one, flow_attention), _QKV, _qkv),
    "gated_attention_pool": Op(_gated, ("x",), partial(_gate_inputs, rows="x"), pools=True),
    "gated_scores": Op(_scores, ("h",), _gate_inputs),
    "inline_attention": Op(partial(_one, inline_attention), _QKV, _qkv),
    "linear_attention": Op(partial(_one, linear_attention), _QKV, _qkv),
    "neighbourhood_attention": Op(_near, (*_QKV, "grid"), partial(_qkv, near=True)),
    "nystrom_attention": Op(_nystrom, _QKV, _qkv),
    "segment_softmax_pool": Op(_segment, ("scores", "h"), _segment_inputs, pools=True),
    "selective_scan": Op(
        partial(_one, partial(selective_scan, delta_softplus=True)),
        ("u", "delta", "B", "C", "z"),
        _s6_inputs,
    ),
    "ssd_scan": Op(partial(_one, ssd_scan), ("x", "dt", "B", "C", "z"), _ssd_inputs),
    "varlen_self_attention": Op(partial(_one, varlen_self_attention), _QKV, _qkv),
}
