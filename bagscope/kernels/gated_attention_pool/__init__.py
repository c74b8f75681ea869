"""Gated attention pooling, from the tiles' features to one vector per bag and branch.

    h = act(x Wᵀ + b)                              (T, D), left out without a projection
    e = w·(gate(V h + b_v) ⊙ σ(U h + b_u)) + c     (T, K) raw logits; without U no second factor
    a = softmax of e over each bag                  masked tiles weigh exactly zero
    pooled = Σ a h (B,K,D),  lse = log Σ exp e (B,K),  entropy = lse - Σ a e (B,K)

Memory: logits T K, and per bag K (D + 4), in float32. Beyond these either nothing that grows with
T (`keep="nothing"`: the backward pass projects again), or h, T D, and the gates' activations,
2 T A, in the bag's dtype (`keep="all"`). Operations forward: 2 T D (F + 2 A + K), backward twice
that, and once more what is not kept.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bagscope.kernels.dispatch import choose, kept_bytes
from bagscope.kernels.gated_attention_pool.cpu import (
    OutputGradients,
    Outputs,
    Problem,
    gated_attention_pool_backward_cpu,
    gated_attention_pool_cpu,
)
from bagscope.kernels.gated_attention_pool.reference import gated_attention_pool_reference
from bagscope.kernels.gated_scores import Gate, refused, require_gates, wants_reference
from bagscope.kernels.gated_scores.cpu import GateSettings, GateWeights, cast, computing_dtype
from bagscope.kernels.segment_softmax_pool import accumulator, require_mask
from bagscope.kernels.segments import require_borders

Activation = Literal["relu", "gelu", "identity"]
Keep = Literal["auto", "all", "nothing"]

_FORWARD, _BACKWARD = (
    "bagscope::gated_attention_pool",
    "bagscope::gated_attention_pool_backward",
)
_INPUTS = (
    "Tensor x, Tensor cu_seqlens, Tensor? projection_weight, Tensor? projection_bias, "
    "Tensor weight_v, Tensor? bias_v, Tensor? weight_u, Tensor? bias_u, "
    "Tensor weight_w, Tensor? bias_w, Tensor? mask, "
    "str activation, str gate, float dropout_p, float projection_dropout_p, SymInt seed"
)
_TENSORS, _SETTINGS = 11, 5
"""How many of `_INPUTS` are tensors, and how many are not."""


class PooledBags(NamedTuple):
    """pooled (B,K,D), raw logits scores (T,K), lse (B,K), entropy (B,K): float32 or float64."""

    pooled: Tensor
    scores: Tensor
    lse: Tensor
    entropy: Tensor


def gated_attention_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    projection: tuple[Tensor, Tensor | None] | None = None,
    activation: Activation = "relu",
    weight_v: Tensor,
    bias_v: Tensor | None = None,
    weight_u: Tensor | None = None,
    bias_u: Tensor | None = None,
    weight_w: Tensor,
    bias_w: Tensor | None = None,
    gate: Gate = "tanh",
    dropout_p: float = 0.0,
    projection_dropout_p: float = 0.0,
    seed: int = 0,
    mask: Tensor | None = None,
    keep: Keep = "auto",
) -> PooledBags:
    """Pool every bag by gated attention.

    Products are done in the dtype of x (float16 on a processor: float32), sums in float32; the
    parameters may be of a wider dtype, as master weights are, and get their gradients in it.

    Args:
        x: (T, F), or (T, D) without a projection.
        cu_seqlens: (B + 1,) int32.
        projection: weight (D, F) and bias (D,).
        activation: what follows the projection.
        weight_v: V, (A, D).
        bias_v: (A,).
        weight_u: U, (A, D); None for attention with one gate.
        bias_u: (A,).
        weight_w: w, (K, A).
        bias_w: c, (K,).
        gate: V's activation.
        dropout_p: dropout of each gate's activations.
        projection_dropout_p: dropout of h.
        seed: what both draw from.
        mask: (T, K), True where a tile is left out of a branch.
        keep: what the forward pass keeps for the backward pass; "auto" keeps what fits 1 GiB.

    Raises:
        ValueError: shapes or options that do not fit.
    """
    weight, bias = projection or (None, None)
    weights = GateWeights(weight_v, bias_v, weight_u, bias_u, weight_w, bias_w)
    _require(x, weight, bias, weights, activation, projection_dropout_p)
    require_gates(weight_v.shape[1], weights, gate, dropout_p)
    require_mask(mask, len(x), len(weight_w))
    keeps_h, keeps_gates = _kept(x, weight, bias, weights, keep)
    if wants_reference("gated_attention_pool", x):
        require_borders(cu_seqlens, len(x))
        dtype = accumulator(x.dtype)
        plain = gated_attention_pool_reference(
            x.to(dtype),
            cu_seqlens,
            cast(weight, dtype),
            cast(bias, dtype),
            *weights.to(dtype),
            mask,
            activation=activation,
            gate=gate,
            dropout_p=dropout_p,
            projection_dropout_p=projection_dropout_p,
            seed=seed,
        )
        return PooledBags(*plain)
    found = torch.ops.bagscope.gated_attention_pool(
        x,
        cu_seqlens,
        weight,
        bias,
        *weights,
        mask,
        activation,
        gate,
        dropout_p,
        projection_dropout_p,
        seed,
        keeps_h,
        keeps_gates,
    )
    return PooledBags(*found[:4])


def _require(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weights: GateWeights,
    activation: str,
    dropout_p: float,
) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; pass floating-point (tiles, features)")
    if activation not in get_args(Activation):
        known = ", ".join(get_args(Activation))
        raise ValueError(f"activation is {activation!r}; choose one of {known}")
    features = weights.weight_v.shape[-1]
    wanted = (features, x.shape[1])
    if weight is None:
        if x.shape[1] != features:
            raise ValueError(f"x has {x.shape[1]} features and weight_v takes {features}")
        if dropout_p:
            raise ValueError(f"projection_dropout_p is {dropout_p} and there is no projection")
    elif tuple(weight.shape) != wanted or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"the projection's weight is {tuple(weight.shape)}; it must be {wanted}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"projection_dropout_p is {dropout_p}; it must be at least 0, below 1")


def _kept(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, weights: GateWeights, keep: str
) -> tuple[bool, bool]:
    """Return whether h and whether the gates' activations are kept for the backward pass."""
    if keep not in get_args(Keep):
        raise ValueError(f"keep is {keep!r}; choose one of {', '.join(get_args(Keep))}")
    inputs = (x, weight, bias, *weights)
    is_training = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in inputs
    )
    if keep == "nothing" or not is_training:
        return False, False
    size = torch.finfo(computing_dtype(x)).bits // 8
    h_bytes = 0 if weight is None else len(x) * len(weight) * size
    gates = 1 if weights.weight_u is None else 2
    gate_bytes = len(x) * gates * len(weights.weight_v) * size
    # h first: it saves the larger product of the two.
    has_h = keep == "all" or h_bytes <= kept_bytes()
    return has_h and weight is not None, keep == "all" or h_bytes + gate_bytes <= kept_bytes()


def _problem(inputs: tuple[Any, ...]) -> Problem:
    x, cu_seqlens, weight, bias, v, bias_v, u, bias_u, w, bias_w, mask = inputs[:_TENSORS]
    activation, gate, dropout_p, projection_dropout_p, seed = inputs[_TENSORS:]
    weights = GateWeights(v, bias_v, u, bias_u, w, bias_w)
    settings = GateSettings(gate, dropout_p, seed)
    return Problem(
        x, cu_seqlens, weight, bias, weights, mask, activation, settings, projection_dropout_p
    )


@torch.library.custom_op(
    _FORWARD,
    mutates_args=(),
    schema=f"({_INPUTS}, bool keeps_h, bool keeps_gates)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    *given, keeps_h, keeps_gates = inputs
    problem = _problem(tuple(given))
    require_borders(problem.cu_seqlens, len(problem.x))
    way = choose("gated_attention_pool", problem.x, refuses=refused(problem.weights))
    if way in ("cpu", "reference"):
        return tuple(gated_attention_pool_cpu(problem, keeps_h=keeps_h, keeps_gates=keeps_gates))
    from bagscope.kernels.gated_attention_pool.triton import gated_attention_pool_triton

    return tuple(gated_attention_pool_triton(problem, keeps_h=keeps_h, keeps_gates=keeps_gates))


@_forward.register_fake
def _forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    *given, keeps_h, keeps_gates = inputs
    problem = _problem(tuple(given))
    features, columns = problem.weights.weight_v.shape[1], problem.weights.weight_w.shape[0]
    bags, x = problem.cu_seqlens.shape[0] - 1, problem.x
    sums = accumulator(x.dtype)
    return (
        x.new_empty(bags, columns, features, dtype=sums),
        x.new_empty(x.shape[0], columns, dtype=sums),
        x.new_empty(bags, columns, dtype=sums),
        x.new_empty(bags, columns, dtype=sums),
        *_nothing_kept(problem, keeps_h, keeps_gates),
    )


def _nothing_kept(problem: Problem, keeps_h: bool, keeps_gates: bool) -> tuple[Tensor, Tensor]:
    """Return unwritten tensors of the shapes of what is kept."""
    x, weights = problem.x, problem.weights
    dtype, tiles = computing_dtype(x), x.shape[0]
    width = weights.weight_v.shape[0] * (1 if weights.weight_u is None else 2)
    return (
        x.new_empty(tiles if keeps_h else 0, weights.weight_v.shape[1], dtype=dtype),
        x.new_empty(tiles if keeps_gates else 0, width, dtype=dtype),
    )


@torch.library.custom_op(
    _BACKWARD,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor pooled, Tensor scores, Tensor lse, Tensor entropy, Tensor kept_h, "
    "Tensor kept_gates, Tensor? grad_pooled, Tensor? grad_scores, Tensor? grad_lse, "
    "Tensor? grad_entropy, bool needs_x) -> Tensor[]",
)
def _backward(*inputs: Any) -> list[Tensor]:
    problem = _problem(inputs[: _TENSORS + _SETTINGS])
    rest = inputs[_TENSORS + _SETTINGS :]
    outputs, grads, needs_x = Outputs(*rest[:6]), OutputGradients(*rest[6:10]), rest[10]
    way = choose("gated_attention_pool", problem.x, refuses=refused(problem.weights))
    if way in ("cpu", "reference"):
        found = gated_attention_pool_backward_cpu(problem, outputs, grads, needs_x=needs_x)
    else:
        from bagscope.kernels.gated_attention_pool.triton import (
            gated_attention_pool_backward_triton,
        )

        found = gated_attention_pool_backward_triton(problem, outputs, grads, needs_x=needs_x)
    return [grad for grad in found if grad is not None]


@_backward.register_fake
def _backward_fake(*inputs: Any) -> list[Tensor]:
    problem = _problem(inputs[: _TENSORS + _SETTINGS])
    return [
        tensor.new_empty(tensor.shape)
        for tensor in _learned(problem, needs_x=inputs[-1])
        if tensor is not None
    ]


def _learned(problem: Problem, *, needs_x: bool) -> list[Tensor | None]:
    """Return what gets a gradient, in the order of the gradients."""
    first = problem.x if needs_x else None
    return [first, problem.projection_weight, problem.projection_bias, *problem.weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Outputs that the loss leaves alone get no gradient of zeros as large as themselves.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.settings = inputs[_TENSORS : _TENSORS + _SETTINGS]


def _through(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    given = (*saved[:_TENSORS], *ctx.settings)
    needs_x = bool(ctx.needs_input_grad[0])
    found = iter(
        torch.ops.bagscope.gated_attention_pool_backward(
            *given, *saved[_TENSORS:], *grads[:4], needs_x
        )
    )
    learned = [
        None if tensor is None else next(found)
        for tensor in _learned(_problem(given), needs_x=needs_x)
    ]
    return (learned[0], None, *learned[1:], None, *(None,) * (_SETTINGS + 2))


_forward.register_autograd(_through, setup_context=_setup_context)
