"""Attention logits of a chunk of rows and their gradients, in buffers that chunks share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bagscope.kernels.dispatch import own_arithmetic
from bagscope.kernels.gated_scores.dropout import chunk_dropout, gate_dropout
from bagscope.kernels.segment_softmax_pool.cpu import accumulator
from bagscope.kernels.segments import CHUNK_ROWS


class GateWeights(NamedTuple):
    """V, U (A, D) and w (K, A) with their biases; no U, no second gate."""

    weight_v: Tensor
    bias_v: Tensor | None
    weight_u: Tensor | None
    bias_u: Tensor | None
    weight_w: Tensor
    bias_w: Tensor | None

    def to(self, dtype: torch.dtype) -> GateWeights:
        """Return the same weights in a dtype."""
        return GateWeights(
            self.weight_v.to(dtype),
            cast(self.bias_v, dtype),
            cast(self.weight_u, dtype),
            cast(self.bias_u, dtype),
            self.weight_w.to(dtype),
            cast(self.bias_w, dtype),
        )


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a tensor that may be absent in a dtype."""
    return None if tensor is None else tensor.to(dtype)


class GateSettings(NamedTuple):
    """V's activation ("tanh" or "relu"), the gates' dropout and its seed."""

    gate: str = "tanh"
    dropout_p: float = 0.0
    seed: int = 0


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the products: the bag's own, but float32 for float16 on a processor.

    Float16 products run there at a hundredth of the speed of any other.
    """
    is_half_on_cpu = tensor.dtype == torch.float16 and tensor.device.type == "cpu"
    return torch.float32 if is_half_on_cpu else tensor.dtype


def joined(weights: GateWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return V over U (A or 2A, D) and their biases, so that one product serves both."""
    if weights.weight_u is None:
        return weights.weight_v.to(dtype), cast(weights.bias_v, dtype)
    both = torch.cat((weights.weight_v, weights.weight_u)).to(dtype)
    if weights.bias_v is None and weights.bias_u is None:
        return both, None
    biases = [
        weight.new_zeros(len(weight)) if bias is None else bias
        for weight, bias in (
            (weights.weight_v, weights.bias_v),
            (weights.weight_u, weights.bias_u),
        )
    ]
    return both, torch.cat(biases).to(dtype)


class Gates:
    """The gates of one call: weights in the computing dtype, and buffers for a chunk.

    Args:
        weights: parameters, in any dtype.
        settings: activation and dropout.
        like: a chunk's device and computing dtype.
        rows: the largest chunk.
        with_gradients: also hold what `backward` sums up.
    """

    def __init__(
        self,
        weights: GateWeights,
        settings: GateSettings,
        like: Tensor,
        rows: int,
        *,
        with_gradients: bool = False,
    ) -> None:
        self.settings = settings
        self.weight, self.bias = joined(weights, like.dtype)
        self.sums = accumulator(like.dtype)
        self.width = len(weights.weight_v)
        self.is_gated = weights.weight_u is not None
        self.dropout_p = gate_dropout(settings.dropout_p, self.is_gated)
        self.w = weights.weight_w.to(self.sums)
        self.c = cast(weights.bias_w, self.sums)
        self.z = like.new_empty(rows, len(self.weight))
        self.product = like.new_empty(rows, self.width)
        if with_gradients:
            self.w_computing = self.w.to(like.dtype)
            self.dg = torch.empty_like(self.product)
            self.grad_weight = unwritten(self.weight, self.sums, rows)
            self.grad_bias = self.grad_weight.new_zeros(len(self.weight))
            self.is_first = True
            self.grad_w = torch.zeros_like(self.w)
            self.grad_c = self.w.new_zeros(len(self.w))

    def activations(self, h: Tensor, out: Tensor) -> None:
        """Write both gates' activations of a chunk h (R, D) into out (R, A or 2A)."""
        linear(h, self.weight, self.bias, out)
        first = out[:, : self.width]
        if self.settings.gate == "tanh":
            first.tanh_()
        else:
            first.relu_()
        if self.is_gated:
            out[:, self.width :].sigmoid_()

    def multiplied(self, z: Tensor, dropped: Tensor | None) -> Tensor:
        """Return the product of the gates' activations, (R, A)."""
        if not self.is_gated:
            return z if dropped is None else torch.mul(z, dropped, out=self.product[: len(z)])
        found = torch.mul(z[:, : self.width], z[:, self.width :], out=self.product[: len(z)])
        return found if dropped is None else found.mul_(dropped)

    def dropout(self, rows: int, start: int) -> Tensor | None:
        """Return the chunk's mask of zeros and scales, None without dropout."""
        if not self.dropout_p:
            return None
        seed = self.settings.seed
        return chunk_dropout(rows, self.width, self.dropout_p, seed, start, self.z)

    def forward(self, h: Tensor, start: int, out: Tensor, kept: Tensor | None) -> None:
        """Write the logits of rows from `start` into out (R, K); the activations into `kept`."""
        z = self.z[: len(h)] if kept is None else kept
        self.activations(h, z)
        product = self.multiplied(z, self.dropout(len(h), start)).to(self.sums)
        linear(product, self.w, self.c, out)

    def backward(
        self, h: Tensor, start: int, grad: Tensor, kept: Tensor | None, grad_h: Tensor
    ) -> None:
        """Add the weights' gradients of a chunk, and that of h (R, D) to grad_h."""
        z = self.z[: len(h)] if kept is None else kept
        if kept is None:
            self.activations(h, z)
        dropped = self.dropout(len(h), start)
        product = self.multiplied(z, dropped)
        self.grad_w.addmm_(grad.T, product.to(self.sums))
        self.grad_c += grad.sum(0)
        dz = self._through_gates(grad, z, dropped)
        add_product(self.grad_weight, dz, h, is_first=self.is_first)
        self.is_first = False
        self.grad_bias += dz.sum(0, dtype=self.sums)
        grad_h.addmm_(dz, self.weight)

    def _through_gates(self, grad: Tensor, z: Tensor, dropped: Tensor | None) -> Tensor:
        """Return the gradient of what the activations were applied to, (R, A or 2A)."""
        rows, width = len(z), self.width
        dg = torch.mm(grad.to(z.dtype), self.w_computing, out=self.dg[:rows])
        if dropped is not None:
            dg.mul_(dropped)
        # Where the activations are not kept they lie in the same buffer, and each is read in the
        # very pass that writes over it.
        dz = self.z[:rows]
        before = dg
        if self.is_gated:
            second, product = z[:, width:], self.product[:rows]
            torch.mul(dg, z[:, :width], out=product)
            before = dg.mul_(second)
            torch.ops.aten.sigmoid_backward.grad_input(product, second, grad_input=dz[:, width:])
        first = z[:, :width]
        if self.settings.gate == "tanh":
            torch.ops.aten.tanh_backward.grad_input(before, first, grad_input=dz[:, :width])
        else:
            torch.ops.aten.threshold_backward.grad_input(before, first, 0, grad_input=dz[:, :width])
        return dz

    def gradients(self, weights: GateWeights) -> list[Tensor | None]:
        """Return the gradients in the parameters' order and dtypes, None for absent ones."""
        first, second = self.grad_weight[: self.width], self.grad_weight[self.width :]
        bias, second_bias = self.grad_bias[: self.width], self.grad_bias[self.width :]
        found = (first, bias, second, second_bias, self.grad_w, self.grad_c)
        # Halves of one tensor must not be handed out as two that share memory.
        return [
            None if weight is None else grad.to(weight.dtype, copy=self.is_gated and place < 4)
            for place, (grad, weight) in enumerate(zip(found, weights, strict=True))
        ]


def unwritten(weight: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """Return room for a weight's gradient: the first chunk writes it, zeros where none comes."""
    return (torch.empty_like if rows else torch.zeros_like)(weight, dtype=dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x weightᵀ + bias into out."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool = False) -> None:
    """Add aᵀ b to a total that may be of a wider dtype; the first time, write it."""
    if total.dtype == a.dtype:
        total.addmm_(a.T, b, beta=0 if is_first else 1)
    elif is_first:
        total.copy_(a.T @ b)
    else:
        total += a.T @ b


def gated_scores_cpu(
    h: Tensor, weights: GateWeights, settings: GateSettings, *, keeps: bool
) -> tuple[Tensor, Tensor]:
    """Return the logits (T, K) and the kept activations (T, A or 2A), or (0, ...) of them."""
    dtype = computing_dtype(h)
    like = h.new_empty(0, dtype=dtype)
    with own_arithmetic():
        gates = Gates(weights, settings, like, min(len(h), CHUNK_ROWS))
        scores = torch.empty(len(h), len(weights.weight_w), dtype=gates.sums, device=h.device)
        kept = like.new_empty(len(h) if keeps else 0, len(gates.weight))
        for start in range(0, len(h), CHUNK_ROWS):
            here = slice(start, min(start + CHUNK_ROWS, len(h)))
            gates.forward(h[here].to(dtype), start, scores[here], kept[here] if keeps else None)
    return scores, kept


def gated_scores_backward_cpu(
    h: Tensor, weights: GateWeights, settings: GateSettings, kept: Tensor, grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients of h and of the weights, in one pass over h."""
    dtype = computing_dtype(h)
    like = h.new_empty(0, dtype=dtype)
    with own_arithmetic():
        rows = min(len(h), CHUNK_ROWS)
        gates = Gates(weights, settings, like, rows, with_gradients=True)
        grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        for start in range(0, len(h), CHUNK_ROWS):
            here = slice(start, min(start + CHUNK_ROWS, len(h)))
            buffer = grad_h[here] if dtype == h.dtype else like.new_empty(grad_h[here].shape)
            buffer.zero_()
            seen = kept[here] if len(kept) else None
            gates.backward(h[here].to(dtype), start, grad[here].to(gates.sums), seen, buffer)
            if buffer.dtype != h.dtype:
                grad_h[here] = buffer
    return [grad_h, *gates.gradients(weights)]
