"""`varlen_self_attention` on the CPU: torch's flash attention per bag, or blocks of neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from bagscope.kernels.varlen_self_attention.neighbours import Neighbours

_KEYS_AT_ONCE = 4096
_LEAST = -80.0
_aten = torch.ops.aten


def forward_full(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (T, H, d) and lse (T, H); q, k and v have equally wide heads."""
    out = q.new_empty(q.shape)
    exact = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty(q.shape[:2], dtype=exact, device=q.device)
    for rows in _bags(cu_seqlens):
        parts = (_heads_first(x[rows]) for x in (q, k, v))
        found, found_lse = _aten._scaled_dot_product_flash_attention_for_cpu(*parts, scale=scale)
        out[rows] = found[0].transpose(0, 1)
        lse[rows] = found_lse[0].T
    return out, lse


def backward_full(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    for rows in _bags(cu_seqlens):
        parts = (_heads_first(x[rows]) for x in (grad, q, k, v, out))
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, lse[rows].T[None], 0.0, False, scale=scale
        )
        for whole, part in zip(grads, found, strict=True):
            whole[rows] = part[0].transpose(0, 1)
    return grads


def forward_near(
    q: Tensor, k: Tensor, v: Tensor, scale: float, near: Neighbours
) -> tuple[Tensor, Tensor]:
    """Return sorted rows (T, H, dv) and lse (T, H) of sorted q, k and v."""
    exact = torch.promote_types(q.dtype, torch.float32)
    out = v.new_empty(v.shape)
    lse = torch.empty(q.shape[:2], dtype=exact, device=q.device)
    for rows, groups in _blocks(near):
        queries = q[rows].to(exact).transpose(0, 1) * scale
        peak = queries.new_full((*queries.shape[:2], 1), float("-inf"))
        mass = torch.zeros_like(peak)
        mixed = queries.new_zeros(*queries.shape[:2], v.shape[-1])
        for runs in groups:
            keys, values = _gather(k, runs, exact), _gather(v, runs, exact)
            scores, far = _scores(queries, keys, near, rows, runs)
            top = torch.maximum(peak, scores.amax(-1, keepdim=True))
            shift = top.masked_fill(top.isinf(), 0.0)
            shrink = torch.exp(peak - shift)
            _exponentiate(scores, shift, far)
            mass.mul_(shrink).add_(scores.sum(-1, keepdim=True))
            mixed.mul_(shrink).add_(scores @ values)
            peak = top
        out[rows] = (mixed / mass).transpose(0, 1).to(out.dtype)
        lse[rows] = (mass.log() + peak).squeeze(-1).T
    return out, lse


def backward_near(
    q: Tensor, k: Tensor, v: Tensor, scale: float, near: Neighbours,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of sorted q, k and v."""
    exact = lse.dtype
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
    for rows, groups in _blocks(near):
        queries = q[rows].to(exact).transpose(0, 1) * scale
        grads = grad[rows].to(exact).transpose(0, 1)
        delta = (grads * out[rows].to(exact).transpose(0, 1)).sum(-1, keepdim=True)
        grad_queries = torch.zeros_like(queries)
        for runs in groups:
            keys, values = _gather(k, runs, exact), _gather(v, runs, exact)
            weights, far = _scores(queries, keys, near, rows, runs)
            _exponentiate(weights, lse[rows].T[..., None], far)
            along = (grads @ values.mT).sub_(delta).mul_(weights)
            grad_queries += along @ keys
            _scatter(grad_k, runs, along.mT @ queries)
            _scatter(grad_v, runs, weights.mT @ grads)
        grad_q[rows] = (scale * grad_queries).transpose(0, 1).to(q.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _bags(cu_seqlens: Tensor) -> Iterator[slice]:
    for a, b in pairwise(cu_seqlens.tolist()):
        if b > a:
            yield slice(a, b)


def _heads_first(x: Tensor) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.transpose(0, 1)[None]


Runs = list[slice]


def _blocks(near: Neighbours) -> Iterator[tuple[slice, list[Runs]]]:
    """Yield the rows of each block, and the rows near it in groups of bounded size."""
    start, stop = near.start.tolist(), near.stop.tolist()
    first, others = near.first.tolist(), near.near.tolist()
    for block, (a, b) in enumerate(zip(start, stop, strict=True)):
        if a == b:
            continue
        groups: list[Runs] = []
        size = _KEYS_AT_ONCE
        for other in others[first[block] : first[block + 1]]:
            low, high = start[other], stop[other]
            if size + high - low > _KEYS_AT_ONCE:
                groups.append([])
                size = 0
            runs = groups[-1]
            if runs and runs[-1].stop == low:
                runs[-1] = slice(runs[-1].start, high)
            else:
                runs.append(slice(low, high))
            size += high - low
        yield slice(a, b), groups


def _gather(x: Tensor, runs: Runs, dtype: torch.dtype) -> Tensor:
    """Return the rows of the runs, heads first: (H, rows, d)."""
    return torch.cat([x[run] for run in runs]).to(dtype).transpose(0, 1)


def _scatter(total: Tensor, runs: Runs, part: Tensor) -> None:
    at = 0
    for run in runs:
        size = run.stop - run.start
        total[run] += part[:, at : at + size].transpose(0, 1)
        at += size


def _scores(
    queries: Tensor, keys: Tensor, near: Neighbours, rows: slice, runs: Runs
) -> tuple[Tensor, Tensor]:
    """Return the scores (H, queries, keys), −inf for the far, and which are far."""
    places = torch.cat([near.places[run] for run in runs])
    far = (near.places[rows, None] - places[None]).abs().amax(-1) > near.r
    return (queries @ keys.mT).masked_fill_(far, float("-inf")), far


def _exponentiate(scores: Tensor, shift: Tensor, far: Tensor) -> None:
    """Make the scores weights, exactly 0 for the far."""
    # exp(−inf) is thirty times as slow as exp of a number.
    scores.sub_(shift).clamp_(min=_LEAST).exp_().masked_fill_(far, 0.0)
