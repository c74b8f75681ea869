"""Gated attention pooling, streamed: the bag passes once forward and once backward.

Per chunk of rows: projection, gates, logits, and the running softmax of each bag. What outlives a
chunk is its logits, and on request its projection and its gates' activations; the backward pass
reads these, or makes them anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bagscope.kernels.dispatch import own_arithmetic
from bagscope.kernels.gated_attention_pool.reference import PROJECTION_SEED
from bagscope.kernels.gated_scores.cpu import (
    Gates,
    GateSettings,
    GateWeights,
    add_product,
    cast,
    computing_dtype,
    linear,
    unwritten,
)
from bagscope.kernels.gated_scores.dropout import chunk_dropout
from bagscope.kernels.segment_softmax_pool.cpu import Pool, PoolGradient, accumulator, masked
from bagscope.kernels.segments import CHUNK_ROWS, pieces


class Problem(NamedTuple):
    """All that both passes are given. Shapes: x (T,F) or (T,D), mask (T,K)."""

    x: Tensor
    cu_seqlens: Tensor
    projection_weight: Tensor | None
    projection_bias: Tensor | None
    weights: GateWeights
    mask: Tensor | None
    activation: str
    settings: GateSettings
    projection_dropout_p: float


class Outputs(NamedTuple):
    """What the forward pass found, and what it kept for the backward pass (or (0, ...) of it)."""

    pooled: Tensor
    scores: Tensor
    lse: Tensor
    entropy: Tensor
    kept_h: Tensor
    kept_gates: Tensor


class OutputGradients(NamedTuple):
    """The gradients of the outputs, None where an output was not used."""

    pooled: Tensor | None
    scores: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None


class Hidden:
    """The projection h = act(x Wᵀ + b), with dropout, of a chunk.

    What is kept of it is what its gradient needs: the input of a GELU, the output of all else.
    """

    def __init__(self, problem: Problem, like: Tensor, rows: int) -> None:
        assert problem.projection_weight is not None
        self.weight = problem.projection_weight.to(like.dtype)
        self.bias = cast(problem.projection_bias, like.dtype)
        self.activation = problem.activation
        self.dropout_p = problem.projection_dropout_p
        self.seed = problem.settings.seed ^ PROJECTION_SEED
        self.before = like.new_empty(rows, len(self.weight))
        is_changed_after = self.activation == "gelu" or self.dropout_p > 0
        self.after = torch.empty_like(self.before) if is_changed_after else self.before
        self.dropped: Tensor | None = None
        self.grad_weight = unwritten(self.weight, accumulator(like.dtype), rows)
        self.grad_bias = self.grad_weight.new_zeros(len(self.weight))
        self.is_first = True

    def project(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Return what is kept of a chunk x (R,F), written into `out` where given."""
        before = self.before[: len(x)] if out is None else out
        linear(x, self.weight, self.bias, before)
        return before.relu_() if self.activation == "relu" else before

    def finish(self, before: Tensor, start: int) -> Tensor:
        """Return h (R,D) from what is kept of the chunk that begins at row `start`."""
        found, after = before, self.after[: len(before)]
        if self.activation == "gelu":
            found = torch.ops.aten.gelu.out(before, out=after)
        if self.dropout_p:
            rows, columns = before.shape
            self.dropped = chunk_dropout(rows, columns, self.dropout_p, self.seed, start, before)
            found = torch.mul(found, self.dropped, out=after)
        return found

    def backward(self, x: Tensor, before: Tensor, grad: Tensor, grad_x: Tensor | None) -> None:
        """Add the parameters' gradients of a chunk from that of h, which is used up."""
        if self.dropped is not None:
            grad.mul_(self.dropped)
        if self.activation == "relu":
            torch.ops.aten.threshold_backward.grad_input(grad, before, 0, grad_input=grad)
        elif self.activation == "gelu":
            torch.ops.aten.gelu_backward.grad_input(grad, before, grad_input=grad)
        add_product(self.grad_weight, grad, x, is_first=self.is_first)
        self.is_first = False
        self.grad_bias += grad.sum(0, dtype=self.grad_bias.dtype)
        if grad_x is not None:
            torch.mm(grad, self.weight, out=grad_x)

    def gradients(self, problem: Problem) -> list[Tensor | None]:
        """Return the gradients of weight and bias in their dtypes, None for an absent bias."""
        weight, bias = problem.projection_weight, problem.projection_bias
        return [
            None if weight is None else self.grad_weight.to(weight.dtype),
            None if bias is None else self.grad_bias.to(bias.dtype),
        ]


def gated_attention_pool_cpu(problem: Problem, *, keeps_h: bool, keeps_gates: bool) -> Outputs:
    """Return the outputs in one pass over x."""
    x, cu_seqlens, weights = problem.x, problem.cu_seqlens, problem.weights
    tiles, rows = len(x), min(len(x), CHUNK_ROWS)
    like = x.new_empty(0, dtype=computing_dtype(x))
    features, columns = weights.weight_v.shape[1], len(weights.weight_w)
    hidden = None if problem.projection_weight is None else Hidden(problem, like, rows)
    gates = Gates(weights, problem.settings, like, rows)
    pool = Pool(len(cu_seqlens) - 1, columns, features, like)
    scores = torch.empty(tiles, columns, dtype=gates.sums, device=x.device)
    kept_h = like.new_empty(tiles if keeps_h else 0, features)
    kept_gates = like.new_empty(tiles if keeps_gates else 0, len(gates.weight))
    with own_arithmetic():
        for start, stop, parts in pieces(cu_seqlens):
            h = x[start:stop].to(like.dtype)
            if hidden is not None:
                before = hidden.project(h, kept_h[start:stop] if keeps_h else None)
                h = hidden.finish(before, start)
            kept = kept_gates[start:stop] if keeps_gates else None
            gates.forward(h, start, scores[start:stop], kept)
            pool.add(masked(scores, problem.mask, start, stop, gates.sums), h, parts, start)
    pooled, lse, entropy, _ = pool.finish()
    return Outputs(pooled, scores, lse, entropy, kept_h, kept_gates)


def gated_attention_pool_backward_cpu(
    problem: Problem, outputs: Outputs, grads: OutputGradients, *, needs_x: bool
) -> list[Tensor | None]:
    """Return the gradients of x, the projection's two and the gates' six parameters."""
    x, weights = problem.x, problem.weights
    rows = min(len(x), CHUNK_ROWS)
    like = x.new_empty(0, dtype=computing_dtype(x))
    hidden = None if problem.projection_weight is None else Hidden(problem, like, rows)
    gates = Gates(weights, problem.settings, like, rows, with_gradients=True)
    gradient = PoolGradient(
        outputs.pooled, outputs.lse, outputs.entropy, (grads.pooled, grads.lse, grads.entropy)
    )
    grad_x = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    grad_h = like.new_empty(rows, weights.weight_v.shape[1])
    grad_rows = like.new_empty(rows, x.shape[1]) if needs_x and hidden is not None else None
    with own_arithmetic():
        for start, stop, parts in pieces(problem.cu_seqlens):
            count = stop - start
            seen = h = x[start:stop].to(like.dtype)
            before = h
            if hidden is not None:
                kept = outputs.kept_h[start:stop]
                before = kept if len(kept) else hidden.project(seen, None)
                h = hidden.finish(before, start)
            e = masked(outputs.scores, problem.mask, start, stop, gates.sums)
            wide, grad_here = h.to(gates.sums), grad_h[:count]
            if gradient.g is None:
                grad_here.zero_()
            grad_e = torch.empty_like(e)
            for bag, first, last in parts:
                here = slice(first - start, last - start)
                grad_e[here], a = gradient.piece(bag, e[here], wide[here])
                gradient.spread(a, bag, grad_here[here])
            if grads.scores is not None:
                grad_e += grads.scores[start:stop]
            kept_gates = outputs.kept_gates[start:stop]
            gates.backward(h, start, grad_e, kept_gates if len(kept_gates) else None, grad_here)
            if hidden is not None:
                found = None if grad_rows is None else grad_rows[:count]
                hidden.backward(seen, before, grad_here, found)
                if found is not None:
                    grad_x[start:stop] = found
            elif needs_x:
                grad_x[start:stop] = grad_here
    own: list[Tensor | None] = [grad_x if needs_x else None]
    own += [None, None] if hidden is None else hidden.gradients(problem)
    return [*own, *gates.gradients(weights)]
