"""Nyström attention on bags (Xiong et al. 2021): softmax attention through m landmarks.

    S₁ = softmax(s Q K̃ᵀ)     S₂ = softmax(s Q̃ K̃ᵀ)     S₃ = softmax(s Q̃ Kᵀ)
    out = S₁ Z S₃ V,          Z the pseudo-inverse of S₂ after a few iterations (`pseudo_inverse`)

Q̃ and K̃ are the means of runs of consecutive rows (`landmarks`). A bag of n ≤ m rows gets the
softmax itself. Two flags restore what was published: `zero_pads` (zeros in front, which weigh
exp(0) and are averaged into landmarks; no softmax for small bags) and `shared_start` (the start of
the pseudo-inverse scaled by the largest sums of all heads, in place of each head's own).

Shapes: T rows of all bags, H heads, d features per head: q, k, v and out (T, H, d). The bag is
read in chunks; S₁ and S₃ exist for a chunk of rows alone. Kept for backward: q, k, v, the
landmarks' answers S₃ V, and per bag 4·m²·H bytes for the pseudo-inverse on a processor, which
finds it from eigenvectors (`spectral_inverse`), 44·m²·H on a GPU, which iterates; it is made anew
where all bags' don't fit `dispatch.kept_bytes()`. Weights are computed again. Operations: 8·n·m·H·d
forward, 2.5 times as many backward, and 42·m³·H and 74·m³·H for the iteration.

There is no Triton kernel: every piece is a product that torch's own batched products do, at a
size that suits them, and softmax in place.

`nystrom_first_rows` gives the first row of S₁ Z S₃ alone, which is all that a class token's last
layer needs: it takes the queries' landmarks in place of the queries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bagscope.kernels.dispatch import choose, kept_bytes, own_arithmetic
from bagscope.kernels.nystrom_attention import cpu
from bagscope.kernels.nystrom_attention.head_conv import (
    add_conv,
    add_conv_backward,
    head_conv,
    require_taps,
)
from bagscope.kernels.nystrom_attention.landmarks import landmark_means, table_rows
from bagscope.kernels.nystrom_attention.reference import nystrom_attention_reference
from bagscope.kernels.segments import require_borders

__all__ = [
    "head_conv",
    "landmark_means",
    "nystrom_attention",
    "nystrom_attention_reference",
    "nystrom_first_rows",
]

_OP = "nystrom_attention"


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    landmarks: int = 256,
    iterations: int = 6,
    zero_pads: bool = False,
    shared_start: bool = False,
    scale: float | None = None,
    taps: Tensor | None = None,
    with_first_rows: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return out (T, H, d), and the weights (T, H) of each bag's first row where asked for.

    Args:
        q: queries, (T, H, d).
        k: keys, (T, H, d).
        v: values, (T, H, d).
        cu_seqlens: (B + 1,) int32.
        landmarks: m.
        iterations: of the pseudo-inverse.
        zero_pads: fill bags up with zeros in front, as published.
        shared_start: scale the pseudo-inverse's start over all heads of a bag, as published.
        scale: s, 1/√d by default.
        taps: (H, W), W odd: the kernels of `head_conv`, whose convolution of v is added.
        with_first_rows: these weights carry no gradient.

    Raises:
        ValueError: shapes or borders do not belong together.
    """
    if q.ndim != 3 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v are {shapes}; pass (T, H, d) each")
    _require_counts(landmarks, iterations)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    how = (landmarks, iterations, zero_pads, shared_start, scale)
    plain = not torch.compiler.is_compiling() and choose(_OP, q) == "reference"
    if plain and not with_first_rows:
        out = nystrom_attention_reference(
            q, k, v, cu_seqlens, landmarks=landmarks, iterations=iterations,
            zero_pads=zero_pads, shared_start=shared_start, scale=scale,
        )  # fmt: skip
        return out if taps is None else out + head_conv(v, taps, cu_seqlens), None
    if taps is None:
        taps = q.new_zeros(q.shape[1], 0, dtype=_exact(q))
    else:
        require_taps(q, taps)
    out, row, *_ = _attend(q, k, v, taps, cu_seqlens, *how, with_first_rows)
    return out, row if with_first_rows else None


def nystrom_first_rows(
    first: Tensor,
    means: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    *,
    landmarks: int = 256,
    iterations: int = 6,
    zero_pads: bool = False,
    shared_start: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return the weights (T, H) that each bag's first row has for the others; float32.

    Args:
        first: query of each bag's first row, (B, H, d).
        means: landmarks of the queries as `landmark_means` lays them, (M, H, d), float32.
        k: keys, (T, H, d).
        cu_seqlens: (B + 1,) int32.
        landmarks: m; this and the rest as for `nystrom_attention`.
        iterations: of the pseudo-inverse.
        zero_pads: as published.
        shared_start: as published.
        scale: s, 1/√d by default.

    Raises:
        ValueError: shapes or borders do not belong together.
    """
    bags = cu_seqlens.shape[0] - 1
    rows = table_rows(bags, k.shape[0], landmarks, zero_pads)
    wanted = [(bags, *k.shape[1:]), (rows, *k.shape[1:])]
    if k.ndim != 3 or [tuple(first.shape), tuple(means.shape)] != wanted:
        raise ValueError(
            f"first, means, k are {tuple(first.shape)}, {tuple(means.shape)}, {tuple(k.shape)}; "
            f"pass (B, H, d), (M, H, d), (T, H, d) with {bags} bags and {rows} landmarks"
        )
    _require_counts(landmarks, iterations)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = _first_rows(
        first, means, k, cu_seqlens, landmarks, iterations, zero_pads, shared_start, scale
    )[0]
    return found


def _require_counts(landmarks: int, iterations: int) -> None:
    if landmarks < 1 or iterations < 1:
        raise ValueError(
            f"landmarks is {landmarks} and iterations {iterations}; both must be at least 1"
        )


@torch.library.custom_op("bagscope::nystrom_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, taps: Tensor, cu_seqlens: Tensor, landmarks: int,
    iterations: int, zero_pads: bool, shared_start: bool, scale: float, with_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    require_borders(cu_seqlens, q.shape[0])
    choose(_OP, q)
    settings = cpu.Settings(landmarks, iterations, zero_pads, shared_start, scale)
    told, told_lse, inverses = _tables(q, cu_seqlens, landmarks, iterations, zero_pads)
    kept = cpu.Kept(told, told_lse, inverses)
    with own_arithmetic():
        found = cpu.attend(q, k, v, cu_seqlens, kept, settings, with_row)
        if taps.shape[1]:
            add_conv(found[0], v, taps, cu_seqlens)
    return *found, told, told_lse, inverses


@torch.library.custom_op("bagscope::nystrom_attention_backward", mutates_args=())
def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, taps: Tensor, cu_seqlens: Tensor, landmarks: int,
    iterations: int, zero_pads: bool, shared_start: bool, scale: float,
    told: Tensor, told_lse: Tensor, inverses: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    settings = cpu.Settings(landmarks, iterations, zero_pads, shared_start, scale)
    kept = cpu.Kept(told, told_lse, inverses)
    with own_arithmetic():
        grads = cpu.attend_backward(q, k, v, cu_seqlens, kept, settings, grad)
        if not taps.shape[1]:
            return *grads, torch.zeros_like(taps)
        return *grads, add_conv_backward(grads[2], v, taps, cu_seqlens, grad)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, taps: Tensor, cu_seqlens: Tensor, landmarks: int,
    iterations: int, zero_pads: bool, shared_start: bool, scale: float, with_row: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    row = q.new_empty(q.shape[:2] if with_row else (0, q.shape[1]), dtype=_exact(q))
    tables = _tables(q, cu_seqlens, landmarks, iterations, zero_pads)
    return q.new_empty(q.shape), row, *tables


@_attend_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, taps: Tensor, cu_seqlens: Tensor, landmarks: int,
    iterations: int, zero_pads: bool, shared_start: bool, scale: float,
    told: Tensor, told_lse: Tensor, inverses: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (*(x.new_empty(x.shape) for x in (q, k, v)), torch.empty_like(taps))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, taps, cu_seqlens, *ctx.settings, _ = inputs
    _, row, *kept = output
    ctx.mark_non_differentiable(row, *kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, taps, cu_seqlens, *kept)


def _differentiate(ctx: Any, grad: Tensor, *_unused: Tensor) -> Any:
    q, k, v, taps, cu_seqlens, *kept = ctx.saved_tensors
    grads = _attend_backward(q, k, v, taps, cu_seqlens, *ctx.settings, *kept, grad)
    return *grads, *[None] * 7


_attend.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("bagscope::nystrom_first_rows", mutates_args=())
def _first_rows(
    first: Tensor, means: Tensor, k: Tensor, cu_seqlens: Tensor, landmarks: int,
    iterations: int, zero_pads: bool, shared_start: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    require_borders(cu_seqlens, k.shape[0])
    choose(_OP, k)
    settings = cpu.Settings(landmarks, iterations, zero_pads, shared_start, scale)
    _, lse, inverses = _tables(k, cu_seqlens, landmarks, iterations, zero_pads)
    kept = cpu.Kept(means, lse, inverses)
    with own_arithmetic():
        row = cpu.first_rows(first, means, k, cu_seqlens, kept, settings)
    return row, lse, inverses


@torch.library.custom_op("bagscope::nystrom_first_rows_backward", mutates_args=())
def _first_rows_backward(
    first: Tensor, means: Tensor, k: Tensor, cu_seqlens: Tensor, landmarks: int,
    iterations: int, zero_pads: bool, shared_start: bool, scale: float,
    row: Tensor, lse: Tensor, inverses: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    settings = cpu.Settings(landmarks, iterations, zero_pads, shared_start, scale)
    kept = cpu.Kept(means, lse, inverses)
    with own_arithmetic():
        return cpu.first_rows_backward(first, means, k, cu_seqlens, kept, settings, row, grad)


@_first_rows.register_fake
def _(
    first: Tensor, means: Tensor, k: Tensor, cu_seqlens: Tensor, landmarks: int,
    iterations: int, zero_pads: bool, shared_start: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, lse, inverses = _tables(k, cu_seqlens, landmarks, iterations, zero_pads)
    return k.new_empty(k.shape[:2], dtype=means.dtype), lse, inverses


@_first_rows_backward.register_fake
def _(
    first: Tensor, means: Tensor, k: Tensor, cu_seqlens: Tensor, landmarks: int,
    iterations: int, zero_pads: bool, shared_start: bool, scale: float,
    row: Tensor, lse: Tensor, inverses: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(first), torch.empty_like(means), k.new_empty(k.shape)


def _keep_first(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    first, means, k, cu_seqlens, *ctx.settings = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(first, means, k, cu_seqlens, *output)


def _differentiate_first(ctx: Any, grad: Tensor, *_unused: Tensor) -> Any:
    first, means, k, cu_seqlens, *kept = ctx.saved_tensors
    grads = _first_rows_backward(first, means, k, cu_seqlens, *ctx.settings, *kept, grad)
    return *grads, *[None] * 6


_first_rows.register_autograd(_differentiate_first, setup_context=_keep_first)


def _tables(
    q: Tensor, cu_seqlens: Tensor, landmarks: int, iterations: int, zero_pads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for what is kept (see `cpu.Kept`)."""
    heads, width = q.shape[1:]
    rows = table_rows(cu_seqlens.shape[0] - 1, q.shape[0], landmarks, zero_pads)
    told = q.new_empty(rows, heads, width, dtype=_exact(q))
    each = (cpu.inverse_of(q.device).matrices(iterations), heads, landmarks)
    fits = rows * math.prod(each) * told.element_size() <= kept_bytes()
    return told, told.new_empty(rows, heads), told.new_empty(rows if fits else 0, *each)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
