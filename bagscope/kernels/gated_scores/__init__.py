"""Attention logits of every tile, by one or two gates that K branches share.

    e = w·(gate(V h + b_v) ⊙ σ(U h + b_u)) + c     (T, K); without U no second factor

Shapes: h (T, D), V and U (A, D), w (K, A). Memory: logits T K in float32; beyond these, the
activations, 2 T A in the dtype of h, while they fit 1 GiB, else nothing that grows with T: the
backward pass makes them anew. Operations forward: 2 T A (2 D + K), backward twice that.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bagscope.kernels.dispatch import choose, kept_bytes
from bagscope.kernels.gated_scores.cpu import (
    GateSettings,
    GateWeights,
    computing_dtype,
    gated_scores_backward_cpu,
    gated_scores_cpu,
)
from bagscope.kernels.gated_scores.reference import gated_scores_reference
from bagscope.kernels.segment_softmax_pool.cpu import accumulator

Gate = Literal["tanh", "relu"]

_INPUTS = (
    "Tensor h, Tensor weight_v, Tensor? bias_v, Tensor? weight_u, Tensor? bias_u, "
    "Tensor weight_w, Tensor? bias_w, str gate, float dropout_p, SymInt seed"
)
_TENSORS, _SETTINGS = 7, 3


def gated_scores(
    h: Tensor,
    *,
    weight_v: Tensor,
    bias_v: Tensor | None = None,
    weight_u: Tensor | None = None,
    bias_u: Tensor | None = None,
    weight_w: Tensor,
    bias_w: Tensor | None = None,
    gate: Gate = "tanh",
    dropout_p: float = 0.0,
    seed: int = 0,
    keep: Literal["auto", "all", "nothing"] = "auto",
) -> Tensor:
    """Return the raw logits (T, K), float32 or float64, of tiles h (T, D).

    The arguments are those of `gated_attention_pool`.

    Raises:
        ValueError: shapes or options that do not fit.
    """
    weights = GateWeights(weight_v, bias_v, weight_u, bias_u, weight_w, bias_w)
    if h.ndim != 2 or not h.is_floating_point():
        raise ValueError(f"h is {h.dtype} {tuple(h.shape)}; pass floating-point (tiles, features)")
    require_gates(h.shape[1], weights, gate, dropout_p)
    if keep not in ("auto", "all", "nothing"):
        raise ValueError(f"keep is {keep!r}; choose one of auto, all, nothing")
    is_training = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (h, *weights)
    )
    width = len(weight_v) * (1 if weight_u is None else 2)
    fits = len(h) * width * torch.finfo(computing_dtype(h)).bits // 8 <= kept_bytes()
    keeps = is_training and (keep == "all" or (keep == "auto" and fits))
    if wants_reference("gated_scores", h):
        dtype = accumulator(h.dtype)
        return gated_scores_reference(h.to(dtype), *weights.to(dtype), gate, dropout_p, seed)
    scores: Tensor = torch.ops.bagscope.gated_scores(h, *weights, gate, dropout_p, seed, keeps)[0]
    return scores


def wants_reference(op: str, tensor: Tensor) -> bool:
    """Return whether plain torch is asked for; a compiled graph takes the streaming path then.

    The reference's gradients are autograd's own, which custom operators switch off inside them.
    """
    return not torch.compiler.is_compiling() and choose(op, tensor) == "reference"


def require_gates(features: int, weights: GateWeights, gate: str, dropout_p: float) -> None:
    """Refuse gates whose shapes do not fit each other or D features.

    Raises:
        ValueError: names what is wrong.
    """
    v, bias_v, u, bias_u, w, bias_w = weights
    if gate not in get_args(Gate):
        raise ValueError(f"gate is {gate!r}; choose one of {', '.join(get_args(Gate))}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0, below 1")
    if v.ndim != 2 or v.shape[1] != features:
        raise ValueError(f"weight_v is {tuple(v.shape)}; it must be (hidden, {features})")
    if u is not None and u.shape != v.shape:
        raise ValueError(f"weight_u is {tuple(u.shape)}; it must be weight_v's {tuple(v.shape)}")
    if w.ndim != 2 or w.shape[1] != len(v):
        raise ValueError(f"weight_w is {tuple(w.shape)}; it must be (branches, {len(v)})")
    if u is None and bias_u is not None:
        raise ValueError("bias_u is given and weight_u is not; pass both or neither")
    for name, bias, size in (
        ("bias_v", bias_v, len(v)),
        ("bias_u", bias_u, len(v)),
        ("bias_w", bias_w, len(w)),
    ):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"{name} is {tuple(bias.shape)}; it must be ({size},)")


def _split(inputs: tuple[Any, ...]) -> tuple[Tensor, GateWeights, GateSettings]:
    weights = GateWeights(*inputs[1:_TENSORS])
    return inputs[0], weights, GateSettings(*inputs[_TENSORS : _TENSORS + _SETTINGS])


def refused(weights: GateWeights) -> str:
    """Return why the kernels cannot take these weights, empty where they can."""
    columns = len(weights.weight_w)
    return f"{columns} branches; the kernel takes up to 16" if columns > 16 else ""


@torch.library.custom_op(
    "bagscope::gated_scores",
    mutates_args=(),
    schema=f"({_INPUTS}, bool keeps) -> (Tensor, Tensor)",
)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    h, weights, settings = _split(inputs)
    way = choose("gated_scores", h, refuses=refused(weights))
    if way in ("cpu", "reference"):
        return gated_scores_cpu(h, weights, settings, keeps=inputs[-1])
    from bagscope.kernels.gated_scores.triton import gated_scores_triton

    return gated_scores_triton(h, weights, settings, keeps=inputs[-1])


@_forward.register_fake
def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    h, weights, _ = _split(inputs)
    scores = h.new_empty(h.shape[0], weights.weight_w.shape[0], dtype=accumulator(h.dtype))
    return scores, _activations(h, weights, inputs[-1])


def _activations(h: Tensor, weights: GateWeights, keeps: bool) -> Tensor:
    """Return an unwritten tensor of the shape of what is kept."""
    width = weights.weight_v.shape[0] * (1 if weights.weight_u is None else 2)
    return h.new_empty(h.shape[0] if keeps else 0, width, dtype=computing_dtype(h))


@torch.library.custom_op(
    "bagscope::gated_scores_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor kept, Tensor grad) -> Tensor[]",
)
def _backward(*inputs: Any) -> list[Tensor]:
    h, weights, settings = _split(inputs)
    kept, grad = inputs[-2:]
    way = choose("gated_scores", h, refuses=refused(weights))
    if way in ("cpu", "reference"):
        found = gated_scores_backward_cpu(h, weights, settings, kept, grad)
    else:
        from bagscope.kernels.gated_scores.triton import gated_scores_backward_triton

        found = gated_scores_backward_triton(h, weights, settings, kept, grad)
    return [gradient for gradient in found if gradient is not None]


@_backward.register_fake
def _backward_fake(*inputs: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in inputs[:_TENSORS] if tensor is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], output[1])
    ctx.settings = inputs[_TENSORS : _TENSORS + _SETTINGS]


def _through(ctx: Any, grad: Tensor | None, _kept: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (_SETTINGS + 1)
    if grad is None:
        return (*(None,) * _TENSORS, *nothing)
    *tensors, kept = ctx.saved_tensors
    found = iter(torch.ops.bagscope.gated_scores_backward(*tensors, *ctx.settings, kept, grad))
    return (*(None if tensor is None else next(found) for tensor in tensors), *nothing)


_forward.register_autograd(_through, setup_context=_setup_context)
