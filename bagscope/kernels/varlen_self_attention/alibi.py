"""Exact attention inside each bag that pays for distance on the slide: ALiBi in two dimensions.

    out_i = Σ_j softmax_j(scale · q_i · k_j − slope_h · |p_i − p_j|) v_j        j: tiles of i's bag

Shapes: T tiles, B bags, H heads: q and k (T, H, d), v (T, H, dv), places p (T, n) in the unit that
the slopes (H,) are per. A row whose place is NaN (a class token) is at no distance from any other.
Places and slopes have no gradient.

Kept for backward: the inputs, out and lse (T, H); weights are computed again. Memory beyond that is
a block of `_QUERIES` by `_KEYS` scores of every head. 2·T·N·H·(d + dv) operations forward, 2.5
times as many backward. One path for every device, in torch alone: flash attention takes no such
bias without a matrix of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bagscope.kernels.dispatch import choose, own_arithmetic
from bagscope.kernels.segments import require_borders

_OP = "alibi_attention"
_QUERIES, _KEYS = 128, 1024
_LEAST = -80.0


def alibi_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, places: Tensor, slopes: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """Return (T, H, dv), every score of a bag at once."""
    out = [v.new_zeros(0, *v.shape[1:])]
    for a, b in pairwise(cu_seqlens.tolist()):
        apart = (places[a:b, None] - places[None, a:b]).norm(dim=-1).nan_to_num(0.0)
        scores = scale * torch.einsum("ihd,jhd->hij", q[a:b], k[a:b])
        scores = scores - slopes.to(scores)[:, None, None] * apart.to(scores)
        out.append(torch.einsum("hij,jhe->ihe", torch.softmax(scores, -1), v[a:b]))
    return torch.cat(out)


def alibi_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    places: Tensor,
    slopes: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Return (T, H, dv).

    Args:
        q: queries, (T, H, d).
        k: keys, (T, H, d).
        v: values, (T, H, dv).
        cu_seqlens: (B + 1,) int32.
        places: (T, n), NaN for rows that are nowhere.
        slopes: (H,) what a unit of distance costs.
        scale: of the products, 1/√d by default.

    Raises:
        ValueError: shapes or borders do not belong together.
    """
    fits = q.ndim == 3 and v.ndim == 3 and q.shape == k.shape and v.shape[:2] == k.shape[:2]
    if not fits or places.ndim != 2 or len(places) != len(q) or slopes.shape != q.shape[1:2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, places, slopes))
        raise ValueError(
            f"q, k, v, places, slopes are {shapes}; pass (T, H, d) twice, (T, H, dv), (T, n), (H,)"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not torch.compiler.is_compiling() and choose(_OP, q) == "reference":
        return alibi_attention_reference(q, k, v, cu_seqlens, places, slopes, scale)
    out: Tensor = _forward(q, k, v, cu_seqlens, places, slopes, scale)[0]
    return out


@torch.library.custom_op("bagscope::alibi_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, places: Tensor, slopes: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    require_borders(cu_seqlens, len(q))
    exact = torch.promote_types(q.dtype, torch.float32)
    places, slopes = places.to(exact), slopes.to(exact)[:, None, None]
    out = v.new_empty(v.shape)
    lse = torch.empty(q.shape[:2], dtype=exact, device=q.device)
    with own_arithmetic():
        for rows, others in _blocks(cu_seqlens):
            queries = q[rows].to(exact).transpose(0, 1) * scale
            peak = queries.new_full((*queries.shape[:2], 1), float("-inf"))
            mass = torch.zeros_like(peak)
            mixed = queries.new_zeros(*queries.shape[:2], v.shape[-1])
            for keys in others:
                scores = _scores(queries, k[keys], places[rows], places[keys], slopes)
                top = torch.maximum(peak, scores.amax(-1, keepdim=True))
                shrink = torch.exp(peak - top)
                weights = _exponentiated(scores, top)
                mass.mul_(shrink).add_(weights.sum(-1, keepdim=True))
                mixed.mul_(shrink).add_(weights @ v[keys].to(exact).transpose(0, 1))
                peak = top
            out[rows] = (mixed / mass).transpose(0, 1).to(out.dtype)
            lse[rows] = (mass.log() + peak).squeeze(-1).T
    return out, lse


@torch.library.custom_op("bagscope::alibi_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, places: Tensor, slopes: Tensor,
    scale: float, out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    exact = lse.dtype
    places, slopes = places.to(exact), slopes.to(exact)[:, None, None]
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
    with own_arithmetic():
        for rows, others in _blocks(cu_seqlens):
            queries = q[rows].to(exact).transpose(0, 1) * scale
            grads = grad[rows].to(exact).transpose(0, 1)
            delta = (grads * out[rows].to(exact).transpose(0, 1)).sum(-1, keepdim=True)
            total = torch.zeros_like(queries)
            for keys in others:
                scores = _scores(queries, k[keys], places[rows], places[keys], slopes)
                weights = _exponentiated(scores, lse[rows].T[..., None])
                grad_v[keys] += (weights.mT @ grads).transpose(0, 1)
                along = grads @ v[keys].to(exact).transpose(0, 1).mT
                along.sub_(delta).mul_(weights)
                total += along @ k[keys].to(exact).transpose(0, 1)
                grad_k[keys] += (along.mT @ queries).transpose(0, 1)
            grad_q[rows] = (scale * total).transpose(0, 1).to(q.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _blocks(cu_seqlens: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Yield blocks of each bag's rows, and the blocks of all rows of that bag."""
    for a, b in pairwise(cu_seqlens.tolist()):
        keys = [slice(at, min(at + _KEYS, b)) for at in range(a, b, _KEYS)]
        for at in range(a, b, _QUERIES):
            yield slice(at, min(at + _QUERIES, b)), keys


def _scores(queries: Tensor, keys: Tensor, here: Tensor, there: Tensor, slopes: Tensor) -> Tensor:
    """Return scores (H, queries, keys), less what the distance costs."""
    # By differences: products of coordinates would cancel to metres where micrometres matter.
    apart = torch.cdist(here, there, compute_mode="donot_use_mm_for_euclid_dist").nan_to_num_(0.0)
    return torch.baddbmm(slopes * apart, queries, keys.to(queries.dtype).permute(1, 2, 0), beta=-1)


def _exponentiated(scores: Tensor, shift: Tensor) -> Tensor:
    """Return exp(scores − shift), in place."""
    # The exp of far less, a denormal number or zero, takes many times as long.
    return scores.sub_(shift).clamp_(min=_LEAST).exp_()


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, places: Tensor, slopes: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    exact = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(v.shape), q.new_empty(q.shape[:2], dtype=exact)


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, places: Tensor, slopes: Tensor,
    scale: float, out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> Any:
    *tensors, out, lse = ctx.saved_tensors
    return *_backward(*tensors, ctx.scale, out, lse, grad), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
