"""Flow and InLine attention on bags: sums over each bag, and questions to them.

Neither needs a kernel of its own: each step is a gather or an ask. They keep a few tensors of the
size of q for backward, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagscope.kernels.linear_attention.halves import ask, bag_mean, gather, lengths
from bagscope.kernels.segments import bag_of_tile


def flow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Return flow attention (Wu et al. 2022, non-causal), (T, H, dv).

        I_i = q_i·Σk      O_j = k_j·Σq      Î_i = q_i·Σ_j k_j/O_j      Ô_j = k_j·Σ_i q_i/I_i
        out_i = σ(Î_i L/S) (q_i/I_i)ᵀ Σ_j k_j (S softmax_j(Ô)_j v_j)ᵀ

    with q and k after a sigmoid, ε added to both sides of the first four products, Ô clamped to
    [−1, 1], L queries and S keys of the bag.

    Args:
        q: queries, (T, H, d), before the sigmoid.
        k: keys, (T, H, d) or, with `cu_seqlens_k`, (T', H, d).
        v: values, as many as keys.
        cu_seqlens: (B + 1,) int32.
        cu_seqlens_k: borders of the keys, where they are not those of the queries.
        eps: ε.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    cu_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    queries, keys = torch.sigmoid(q.to(exact)), torch.sigmoid(k.to(exact))
    of_query, of_key = bag_of_tile(cu_seqlens, len(q)), bag_of_tile(cu_k, len(k))
    asked, stored = queries + eps, keys + eps

    def total(x: Tensor, weights: Tensor, cu: Tensor) -> Tensor:
        return gather(weights, x, cu)[0].mT

    ones = queries.new_ones(1, 1, 1)
    ones_q, ones_k = (ones.expand(*x.shape[:2], 1) for x in (queries, keys))
    incoming = ask(asked, total(keys, ones_k, cu_k) + eps, cu_seqlens)
    outgoing = ask(stored, total(queries, ones_q, cu_seqlens) + eps, cu_k)
    conserved_in = ask(asked, total(keys, 1 / outgoing, cu_k) + eps, cu_seqlens)
    conserved_out = ask(stored, total(queries, 1 / incoming, cu_seqlens) + eps, cu_k)
    many_q, many_k = lengths(cu_seqlens, queries), lengths(cu_k, keys)
    allocation = torch.sigmoid(conserved_in * (many_q / many_k)[of_query])
    # Between −1 and 1: no maximum has to be taken off before the exponential.
    strength = torch.exp(conserved_out.clamp(-1.0, 1.0))
    competition = strength * (many_k / gather(ones_k, strength, cu_k)[0].squeeze(2))[of_key]
    kv, _ = gather(keys, competition * v.to(exact), cu_k)
    return (allocation * ask(queries / incoming, kv, cu_seqlens)).to(v.dtype)


def inline_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float | None = None
) -> Tensor:
    """Return InLine attention (Han et al. 2024) without its local residual, (T, H, dv).

        out_i = (s/N) q_iᵀ Σ_j k_j v_jᵀ + (1 − s q_i·k̄) v̄

    Its weights sum to one and may be negative. N, k̄ and v̄ are the bag's.

    Args:
        q: queries, (T, H, d).
        k: keys, (T, H, d).
        v: values, (T, H, dv).
        cu_seqlens: (B + 1,) int32.
        scale: s, 1/√d by default.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kv, keys = gather(k, v, cu_seqlens)
    many, value = lengths(cu_seqlens, kv), bag_mean(v, cu_seqlens)
    # Both terms are linear in q: one matrix per bag says it all.
    matrix = scale * (kv / many[..., None] - (keys / many)[..., None] * value[:, :, None])
    mixed = ask(q.to(matrix.dtype), matrix, cu_seqlens)
    return (mixed + value[bag_of_tile(cu_seqlens, len(q))]).to(v.dtype)
