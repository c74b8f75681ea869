"""Nyström attention in chunks of rows, bag by bag: S₁ and S₃ exist a chunk at a time.

Plain products, on a processor as on a GPU; the loop over bags is there because bags differ in their
numbers of rows and landmarks. Letters as in `__init__`; arrays of a bag are (H, ·, d).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bagscope.kernels.nystrom_attention.landmarks import Run, means_of, runs, spread
from bagscope.kernels.nystrom_attention.pseudo_inverse import IteratedInverse
from bagscope.kernels.nystrom_attention.spectral_inverse import SpectralInverse

_CHUNK_ROWS = {"cpu": 256}
"""Weights of that many rows, and their gradient, stay in a core's cache."""
_CHUNK_ROWS_ON_DEVICE = 16_384


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operations are told beside their tensors."""

    landmarks: int
    iterations: int
    zero_pads: bool
    shared_start: bool
    scale: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What the way back gets beside inputs and outputs, of M landmarks of all bags.

    Attributes:
        told: (M, H, d) S₃ V; nothing where only first rows are asked for.
        lse: (M, H) of S₃.
        inverses: (M, ·, H, m) or empty; a bag's matrices lie in the room of its landmarks.
    """

    told: Tensor
    lse: Tensor
    inverses: Tensor

    def inverse(
        self, run: Run, queries: Tensor, keys: Tensor, settings: Settings, *, is_known: bool
    ) -> IteratedInverse | SpectralInverse:
        """Return a bag's pseudo-inverse, as it was kept or made anew."""
        s = (queries @ keys.mT).softmax(-1)
        kind = inverse_of(s.device)
        shape = (kind.matrices(settings.iterations), *s.shape)
        if len(self.inverses):
            room = self.inverses[run.own].view(-1)[: math.prod(shape)].view(shape)
        else:
            room, is_known = s.new_empty(shape), False
        return kind(s, settings.iterations, settings.shared_start, room, is_filled=is_known)


def inverse_of(device: torch.device) -> type[IteratedInverse | SpectralInverse]:
    """Return how a device finds pseudo-inverses: a GPU is slow at eigenvectors."""
    return SpectralInverse if device.type == "cpu" else IteratedInverse


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, kept: Kept, settings: Settings,
    with_row: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (T, H, d) and the first rows (T, H); fill what is kept."""
    exact = kept.told.dtype
    out = q.new_empty(q.shape)
    row = kept.told.new_zeros(q.shape[:2] if with_row else (0, q.shape[1]))
    for run in runs(cu_seqlens, settings.landmarks, settings.zero_pads):
        bag = [x[run.rows] for x in (q, k, v)]
        if not run.count:
            keys, values = _heads(bag[1], exact), _heads(bag[2], exact)
            _ask(bag[0], settings.scale * keys, values, out[run.rows])
            if with_row:
                first = settings.scale * _heads(bag[0][:1], exact) @ keys.mT
                row[run.rows] = first.softmax(-1)[:, 0].T
            continue
        queries, keys = _landmarks(bag[0], bag[1], run, settings.scale, exact)
        found, found_lse = _tell(queries, bag[1], bag[2], run.pads)
        kept.told[run.own], kept.lse[run.own] = found.transpose(0, 1), found_lse[..., 0].T
        inverse = kept.inverse(run, queries, keys, settings, is_known=False)
        asked = settings.scale * keys
        _ask(bag[0], asked, inverse.times(found), out[run.rows])
        if with_row:
            first = (_heads(bag[0][:1], exact) @ asked.mT).softmax(-1)
            _write_row(queries, bag[1], found_lse, inverse.asked(first), row[run.rows])
    return out, row


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, kept: Kept, settings: Settings,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    exact, scale = kept.told.dtype, settings.scale
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    for run in runs(cu_seqlens, settings.landmarks, settings.zero_pads):
        bag_q, bag_k, bag_v, bag_grad = (x[run.rows] for x in (q, k, v, grad))
        grad_q, grad_k, grad_v = (x[run.rows] for x in grads)
        mine = (bag_grad, grad_q)
        if not run.count:
            keys, values = _heads(bag_k, exact), _heads(bag_v, exact)
            of_keys, of_values = _ask_backward(bag_q, scale * keys, values, *mine)
            grad_k.copy_(scale * of_keys.transpose(0, 1))
            grad_v.copy_(of_values.transpose(0, 1))
            continue
        queries, keys = _landmarks(bag_q, bag_k, run, scale, exact)
        found, found_lse = kept.told[run.own].transpose(0, 1), kept.lse[run.own].T[..., None]
        inverse = kept.inverse(run, queries, keys, settings, is_known=True)
        of_asked, of_told = _ask_backward(bag_q, scale * keys, inverse.times(found), *mine)
        of_found, of_s = inverse.times_backward(found, of_told)
        delta = (of_found * found).sum(-1, keepdim=True)
        of_queries = _tell_backward(
            queries, bag_k, bag_v, found_lse, of_found, delta, grad_k, grad_v
        )
        of_keys = _add_of_s(inverse.s, of_s, queries, keys, of_queries).add_(of_asked, alpha=scale)
        spread(scale * of_queries.transpose(0, 1), grad_q, run)
        spread(of_keys.transpose(0, 1), grad_k, run)
    return grads


def first_rows(
    first: Tensor, means: Tensor, k: Tensor, cu_seqlens: Tensor, kept: Kept, settings: Settings
) -> Tensor:
    """Return each bag's first row (T, H); fill what is kept."""
    exact = means.dtype
    row = k.new_zeros(k.shape[:2], dtype=exact)
    for bag, run in _numbered(cu_seqlens, settings):
        keys = k[run.rows]
        asking = settings.scale * first[bag, :, None].to(exact)
        if not run.count:
            row[run.rows] = (asking @ _heads(keys, exact).mT).softmax(-1)[:, 0].T
            continue
        queries, key_means = _of_row(means, keys, run, settings.scale)
        found = _mass(queries, keys, run.pads)
        kept.lse[run.own] = found[..., 0].T
        inverse = kept.inverse(run, queries, key_means, settings, is_known=False)
        u = inverse.asked((asking @ key_means.mT).softmax(-1))
        _write_row(queries, keys, found, u, row[run.rows])
    return row


def first_rows_backward(
    first: Tensor, means: Tensor, k: Tensor, cu_seqlens: Tensor, kept: Kept, settings: Settings,
    row: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the first queries, of the queries' landmarks and of k."""
    exact, scale = means.dtype, settings.scale
    grad_first, grad_means = torch.zeros_like(first), torch.zeros_like(means)
    grad_k = k.new_empty(k.shape)
    for bag, run in _numbered(cu_seqlens, settings):
        keys, of_k, of_row = k[run.rows], grad_k[run.rows], grad[run.rows]
        asking = scale * first[bag, :, None].to(exact)
        if not run.count:
            wide = _heads(keys, exact)
            weights = row[run.rows].T[:, None]
            along = _through_softmax(weights, of_row.T[:, None])
            of_k.copy_((along.mT @ asking).transpose(0, 1))
            grad_first[bag] = (scale * along @ wide)[:, 0]
            continue
        queries, key_means = _of_row(means, keys, run, scale)
        found = kept.lse[run.own].T[..., None]
        inverse = kept.inverse(run, queries, key_means, settings, is_known=True)
        near = (asking @ key_means.mT).softmax(-1)
        u = inverse.asked(near)
        # Each head's together: numbers that lie apart are slow to spread over weights.
        of_row = of_row.T.contiguous()
        of_u = _row_mass(queries, keys, found, of_row)
        # The inverse first: what it needs on its way is gone before the keys' gradient is there.
        of_near, of_s = inverse.asked_backward(near, of_u)
        of_queries = _row_backward(queries, keys, found, u, of_u, of_row, of_k)
        along = _through_softmax(near, of_near)
        of_keys = _add_of_s(inverse.s, of_s, queries, key_means, of_queries)
        of_keys += along.mT @ asking
        grad_first[bag] = (scale * along @ key_means)[:, 0]
        grad_means[run.own] = scale * of_queries.transpose(0, 1)
        spread(of_keys.transpose(0, 1), of_k, run)
    return grad_first, grad_means, grad_k


# --- a bag's pieces ------------------------------------------------------------------------------


def _landmarks(
    q: Tensor, k: Tensor, run: Run, scale: float, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the landmarks of the queries, scaled, and of the keys: (H, m, d)."""
    queries = scale * means_of(q.to(exact), run).transpose(0, 1).contiguous()
    return queries, means_of(k.to(exact), run).transpose(0, 1).contiguous()


def _of_row(means: Tensor, keys: Tensor, run: Run, scale: float) -> tuple[Tensor, Tensor]:
    """Return the same from the means of the queries."""
    key_means = means_of(keys.to(means.dtype), run).transpose(0, 1).contiguous()
    return scale * means[run.own].transpose(0, 1).contiguous(), key_means


def _ask(q: Tensor, asked: Tensor, values: Tensor, out: Tensor) -> None:
    """Write softmax(q · asked) values of rows (n, H, d)."""
    for rows in _chunks(q):
        weights = _heads(q[rows], asked.dtype) @ asked.mT
        _write(torch.softmax(weights, -1, out=weights), values, out[rows])


def _ask_backward(
    q: Tensor, asked: Tensor, values: Tensor, grad: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the gradient of q; return those of `asked` and of the values."""
    of_asked, of_values = torch.zeros_like(asked), torch.zeros_like(values)
    for rows in _chunks(q):
        queries, grads = _heads(q[rows], asked.dtype), _heads(grad[rows], asked.dtype)
        weights = queries @ asked.mT
        torch.softmax(weights, -1, out=weights)
        of_values.baddbmm_(weights.mT, grads)
        along = _through_softmax(weights, grads @ values.mT)
        _write(along, asked, grad_q[rows])
        of_asked.baddbmm_(along.mT, queries)
    return of_asked, of_values


def _tell(queries: Tensor, k: Tensor, v: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """Return softmax(queries · k) v, `pads` zeros among the keys, and its lse (H, m, 1)."""
    peak, mass = _start(queries, pads)
    mixed = torch.zeros_like(queries)
    for rows in _chunks(k):
        scores = queries @ _heads(k[rows], queries.dtype).mT
        peak, shrink = _rescale(peak, mass, scores)
        mixed.mul_(shrink).baddbmm_(scores, _heads(v[rows], queries.dtype))
    return mixed.div_(mass), mass.log_().add_(peak)


def _mass(queries: Tensor, k: Tensor, pads: int) -> Tensor:
    """Return the lse alone."""
    peak, mass = _start(queries, pads)
    for rows in _chunks(k):
        peak, _ = _rescale(peak, mass, queries @ _heads(k[rows], queries.dtype).mT)
    return mass.log_().add_(peak)


def _start(queries: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """Return peak and mass (H, m, 1) before the first key: those of zeros, where there are any."""
    shape = (*queries.shape[:2], 1)
    peak = queries.new_full(shape, 0.0 if pads else float("-inf"))
    return peak, queries.new_full(shape, float(pads))


def _rescale(peak: Tensor, mass: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Make scores weights below a new peak, add them up; return it and by what old ones shrink."""
    top = torch.maximum(peak, scores.amax(-1, keepdim=True))
    shrink = torch.exp(peak - top)
    mass.mul_(shrink).add_(scores.sub_(top).exp_().sum(-1, keepdim=True))
    return top, shrink


def _tell_backward(
    queries: Tensor, k: Tensor, v: Tensor, lse: Tensor, grad: Tensor, delta: Tensor,
    grad_k: Tensor, grad_v: Tensor,
) -> Tensor:  # fmt: skip
    """Write the gradients of k and v; return that of the queries."""
    of_queries = torch.zeros_like(queries)
    for rows in _chunks(k):
        keys, values = _heads(k[rows], queries.dtype), _heads(v[rows], queries.dtype)
        weights = _weights(queries, keys, lse)
        _write(weights.mT, grad, grad_v[rows])
        along = (grad @ values.mT).sub_(delta).mul_(weights)
        _write(along.mT, queries, grad_k[rows])
        of_queries.baddbmm_(along, keys)
    return of_queries


def _write_row(queries: Tensor, k: Tensor, lse: Tensor, u: Tensor, row: Tensor) -> None:
    """Write u S₃ (n, H), where u is (H, 1, m)."""
    for rows in _chunks(k):
        weights = _weights(queries, _heads(k[rows], queries.dtype), lse)
        row[rows] = (u @ weights)[:, 0].T


def _row_mass(queries: Tensor, k: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of u, (H, 1, m), given that of the row, (H, n)."""
    found = torch.zeros_like(lse)
    for rows in _chunks(k):
        weights = _weights(queries, _heads(k[rows], queries.dtype), lse)
        found.baddbmm_(weights, grad[:, rows, None])
    return found.mT


def _row_backward(
    queries: Tensor, k: Tensor, lse: Tensor, u: Tensor, of_u: Tensor, grad: Tensor, grad_k: Tensor
) -> Tensor:
    """Write the gradient of k; return that of the queries; `grad` is that of the row, (H, n)."""
    of_queries, share, share_of_queries = torch.zeros_like(queries), of_u.mT, u.mT * queries
    for rows in _chunks(k):
        keys = _heads(k[rows], queries.dtype)
        along = _weights(queries, keys, lse)
        along.mul_(grad[:, None, rows] - share)
        of_queries.baddbmm_(along, keys)
        _write(along.mT, share_of_queries, grad_k[rows])
    return of_queries.mul_(u.mT)


def _add_of_s(s: Tensor, of_s: Tensor, queries: Tensor, keys: Tensor, of_queries: Tensor) -> Tensor:
    """Add what S₂ = softmax(queries · keys) passes on to the queries; return that of the keys."""
    along = _through_softmax(s, of_s)
    of_queries.baddbmm_(along, keys)
    return along.mT @ queries


def _through_softmax(weights: Tensor, grad: Tensor) -> Tensor:
    """Return weights (grad − Σ grad weights), each row's sum."""
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype)


def _weights(queries: Tensor, keys: Tensor, lse: Tensor) -> Tensor:
    """Return exp(queries · keys − lse), (H, m, n)."""
    return (queries @ keys.mT).sub_(lse).exp_()


def _write(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """Write weights values, (H, n, d), into rows (n, H, d)."""
    out.copy_((weights @ values).transpose(0, 1))


def _heads(x: Tensor, exact: torch.dtype) -> Tensor:
    """Return rows (n, H, d) as (H, n, d)."""
    return x.to(exact).transpose(0, 1)


def _chunks(x: Tensor) -> Iterator[slice]:
    size = _CHUNK_ROWS.get(x.device.type, _CHUNK_ROWS_ON_DEVICE)
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


def _numbered(cu_seqlens: Tensor, settings: Settings) -> Iterator[tuple[int, Run]]:
    """Yield every bag that has rows, with its number."""
    cut = iter(runs(cu_seqlens, settings.landmarks, settings.zero_pads))
    for bag, rows in enumerate(cu_seqlens.diff().tolist()):
        if rows:
            yield bag, next(cut)
