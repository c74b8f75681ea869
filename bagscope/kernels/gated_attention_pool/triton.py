"""Gated attention pooling on a GPU: large chunks of rows through the kernels of its two halves.

The projection is torch's product. Each chunk is pooled for itself, with the borders clamped to it,
and merged into what the chunks before it gave; nothing asks the device for a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagscope.kernels.gated_attention_pool.cpu import Hidden, OutputGradients, Outputs, Problem
from bagscope.kernels.gated_scores.triton import CHUNK_TILES, Gates
from bagscope.kernels.segment_softmax_pool.cpu import FourTensors
from bagscope.kernels.segment_softmax_pool.triton import (
    segment_softmax_pool_backward_triton,
    segment_softmax_pool_triton,
)


def gated_attention_pool_triton(problem: Problem, *, keeps_h: bool, keeps_gates: bool) -> Outputs:
    """Return the outputs; x is read once."""
    x, weights = problem.x, problem.weights
    tiles, features = len(x), weights.weight_v.shape[1]
    hidden = _hidden(problem)
    gates = Gates(weights, problem.settings, x, with_gradients=False)
    scores = torch.empty(tiles, len(gates.w), dtype=gates.sums, device=x.device)
    kept_h = x.new_empty(tiles if keeps_h else 0, features)
    kept_gates = x.new_empty(tiles if keeps_gates else 0, len(gates.weight))
    merged: FourTensors | None = None
    # One round even without tiles: it gives the empty bags their values.
    for start in range(0, max(tiles, 1), CHUNK_TILES):
        here = slice(start, min(start + CHUNK_TILES, tiles))
        h = x[here]
        if hidden is not None:
            h = hidden.finish(hidden.project(h, kept_h[here] if keeps_h else None), start)
        if len(h):
            gates.forward(h, start, scores[here], kept_gates[here] if keeps_gates else None)
        mask = None if problem.mask is None else problem.mask[here]
        part = segment_softmax_pool_triton(scores[here], h, _borders(problem, here), mask)
        merged = part if merged is None else _merged(merged, part)
    assert merged is not None
    pooled, lse, entropy, _ = merged
    return Outputs(pooled, scores, lse, entropy, kept_h, kept_gates)


def gated_attention_pool_backward_triton(
    problem: Problem, outputs: Outputs, grads: OutputGradients, *, needs_x: bool
) -> list[Tensor | None]:
    """Return the gradients of x, the projection's two and the gates' six parameters."""
    x, weights = problem.x, problem.weights
    hidden = _hidden(problem)
    gates = Gates(weights, problem.settings, x, with_gradients=True)
    grad_x = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    pooled = (outputs.pooled, outputs.lse, outputs.entropy)
    for start in range(0, len(x), CHUNK_TILES):
        here = slice(start, min(start + CHUNK_TILES, len(x)))
        seen = before = h = x[here]
        if hidden is not None:
            kept = outputs.kept_h[here]
            before = kept if len(kept) else hidden.project(seen, None)
            h = hidden.finish(before, start)
        grad_e, grad_h = segment_softmax_pool_backward_triton(
            outputs.scores[here],
            h,
            _borders(problem, here),
            None if problem.mask is None else problem.mask[here],
            pooled,
            (grads.pooled, grads.lse, grads.entropy),
        )
        if grads.scores is not None:
            grad_e += grads.scores[here]
        kept_gates = outputs.kept_gates[here]
        gates.backward(h, start, grad_e, kept_gates if len(kept_gates) else None, grad_h)
        if hidden is None:
            if needs_x:
                grad_x[here] = grad_h
        else:
            hidden.backward(seen, before, grad_h, grad_x[here] if needs_x else None)
    own: list[Tensor | None] = [grad_x if needs_x else None]
    own += [None, None] if hidden is None else hidden.gradients(problem)
    return [*own, *gates.gradients(weights)]


def _hidden(problem: Problem) -> Hidden | None:
    if problem.projection_weight is None:
        return None
    return Hidden(problem, problem.x.new_empty(0), min(len(problem.x), CHUNK_TILES))


def _borders(problem: Problem, here: slice) -> Tensor:
    """Return the bags' borders within a chunk; bags that lie outside are empty there."""
    inside: Tensor = problem.cu_seqlens.clamp(here.start, here.stop) - here.start
    return inside.int()


def _merged(a: FourTensors, b: FourTensors) -> FourTensors:
    """Return what two runs of tiles give together; the largest weight is not followed."""
    lse = torch.logaddexp(a[1], b[1])
    safe = torch.where(lse > -torch.inf, lse, 0.0)
    shares = [(part[1] - safe).exp() for part in (a, b)]
    pooled = shares[0][..., None] * a[0] + shares[1][..., None] * b[0]
    # An entropy is lse - Σ a e, and the sums are what adds up.
    means = [torch.where(part[1] > -torch.inf, part[1] - part[2], 0.0) for part in (a, b)]
    entropy = safe - shares[0] * means[0] - shares[1] * means[1]
    entropy = torch.where(lse > -torch.inf, entropy, 0.0).clamp_min(0.0)
    return pooled, lse, entropy, a[3]
