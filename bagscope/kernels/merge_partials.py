"""Combine what was pooled from pieces of a bag into what the whole bag would give.

    lse    = log Σ_p exp(lse_p)
    pooled = Σ_p exp(lse_p − lse) · pooled_p

Shapes: P pieces, any shape N between, D features: pooled (P, N, D), lse (P, N). A piece without
tiles has lse −inf and is left out, whatever its pooled says; if all are empty, pooled is 0 and lse
−inf, and no gradient flows. Exact: pieces of any size, in any order, give the whole bag's result.

Backward, with w_p = exp(lse_p − lse) and the gradients g of pooled and l of lse:

    grad pooled_p = w_p · g
    grad lse_p    = w_p · (l + g · pooled_p − Σ_q w_q g · pooled_q)

Memory: one buffer of the pooled's size in float32; nothing of the bag's size.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bagscope.kernels.dispatch import choose, has_triton, own_arithmetic

if has_triton():
    import triton
    import triton.language as tl

_NONE = float("-inf")
_WIDEST = 8192


def merge_partials_reference(pooled: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the merged (N, D) and (N,), in plain torch."""
    total = torch.logsumexp(lse, 0)
    weights = torch.where(lse == _NONE, 0, torch.exp(lse - total.nan_to_num(neginf=0.0)))
    known = pooled.masked_fill((lse == _NONE)[..., None], 0.0)
    return (weights[..., None] * known).sum(0).to(pooled.dtype), total


def _merge(pooled: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the reference does, one piece at a time."""
    peak = lse.amax(0)
    shift = peak.masked_fill(peak == _NONE, 0.0)
    mass = torch.zeros_like(peak)
    mixed = torch.zeros(pooled.shape[1:], dtype=lse.dtype, device=pooled.device)
    for piece, piece_lse in zip(pooled, lse, strict=True):
        weight = torch.exp(piece_lse - shift)
        mass += weight
        mixed += weight[..., None] * piece.masked_fill((weight == 0)[..., None], 0.0)
    mixed /= mass.masked_fill(mass == 0, 1.0)[..., None]
    return mixed.to(pooled.dtype), mass.log() + shift


def _merge_backward(
    pooled: Tensor, lse: Tensor, total: Tensor, grad: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor]:
    along = torch.stack(
        [_along(piece, part, grad) for piece, part in zip(pooled, lse, strict=True)]
    )
    weights = torch.exp(lse - total.masked_fill(total == _NONE, 0.0))
    rest = grad_lse - (weights * along).sum(0)
    grad_pooled = torch.empty_like(pooled)
    for p, weight in enumerate(weights):
        grad_pooled[p] = weight[..., None] * grad
    return grad_pooled, weights * (rest + along)


def _along(pooled: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """Return grad · pooled, 0 where the piece is empty."""
    known = pooled.to(lse.dtype).masked_fill((lse == _NONE)[..., None], 0.0)
    return (grad.to(lse.dtype) * known).sum(-1)


if has_triton():

    @triton.jit
    def merge_partials_fwd_kernel(
        pooled_ptr, lse_ptr, merged_ptr, total_ptr, P, N, D, BLOCK_D: tl.constexpr
    ):
        """Merge one row of N and BLOCK_D features: grid (N, D / BLOCK_D)."""
        n = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        peak = float("-inf")
        row = n
        for _ in range(P):
            peak = tl.maximum(peak, tl.load(lse_ptr + row))
            row += N
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        mass = 0.0
        mixed = tl.zeros((BLOCK_D,), tl.float32)
        row = n
        for _ in range(P):
            weight = tl.exp(tl.load(lse_ptr + row) - shift)
            piece = tl.load(pooled_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            piece = tl.where(weight > 0, piece, 0.0)
            mass += weight
            mixed += weight * piece
            row += N
        mixed = mixed / tl.where(mass == 0, 1.0, mass)
        tl.store(merged_ptr + n * D + d, mixed.to(merged_ptr.dtype.element_ty), mask=d < D)
        if tl.program_id(1) == 0:
            known = tl.log(tl.where(mass == 0, 1.0, mass)) + shift
            tl.store(total_ptr + n, tl.where(mass == 0, float("-inf"), known))

    @triton.jit
    def merge_partials_bwd_kernel(
        pooled_ptr, lse_ptr, total_ptr, grad_ptr, grad_lse_ptr,
        grad_pooled_ptr, grad_lses_ptr, P, N, D, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Spread the gradients of one row of N over its pieces: grid (N,)."""
        n = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        total = tl.load(total_ptr + n)
        shift = tl.where(total == float("-inf"), 0.0, total)
        grad = tl.load(grad_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        rest = tl.load(grad_lse_ptr + n)
        row = n
        for _ in range(P):
            weight = tl.exp(tl.load(lse_ptr + row) - shift)
            piece = tl.load(pooled_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            rest -= weight * tl.sum(grad * tl.where(weight > 0, piece, 0.0), 0)
            row += N
        row = n
        for _ in range(P):
            weight = tl.exp(tl.load(lse_ptr + row) - shift)
            piece = tl.load(pooled_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            along = tl.sum(grad * tl.where(weight > 0, piece, 0.0), 0)
            out = (weight * grad).to(grad_pooled_ptr.dtype.element_ty)
            tl.store(grad_pooled_ptr + row * D + d, out, mask=d < D)
            tl.store(grad_lses_ptr + row, weight * (rest + along))
            row += N


def _refuses(pooled: Tensor, lse: Tensor) -> str:
    if lse.dtype != torch.float32:
        return f"lse is {lse.dtype}, the kernel takes float32"
    return f"{pooled.shape[-1]} features are too wide" if pooled.shape[-1] > _WIDEST else ""


@torch.library.custom_op("bagscope::merge_partials", mutates_args=())
def _forward(pooled: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    way = choose("merge_partials", pooled, refuses=_refuses(pooled, lse))
    with own_arithmetic():
        if way == "reference":
            return merge_partials_reference(pooled, lse)
        if way == "cpu" or not pooled.numel():
            return _merge(pooled, lse)
    merged, total = torch.empty_like(pooled[0]), torch.empty_like(lse[0])
    n, d = total.numel(), pooled.shape[-1]
    block = min(1024, triton.next_power_of_2(d))
    merge_partials_fwd_kernel[(n, triton.cdiv(d, block))](
        pooled, lse, merged, total, len(lse), n, d, BLOCK_D=block
    )
    return merged, total


@torch.library.custom_op("bagscope::merge_partials_backward", mutates_args=())
def _backward(
    pooled: Tensor, lse: Tensor, total: Tensor, grad: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor]:
    way = choose("merge_partials", pooled, refuses=_refuses(pooled, lse))
    if way in ("reference", "cpu") or not pooled.numel():
        return _merge_backward(pooled, lse, total, grad, grad_lse)
    grad_pooled, grad_lses = torch.empty_like(pooled), torch.empty_like(lse)
    n, d = total.numel(), pooled.shape[-1]
    merge_partials_bwd_kernel[(n,)](
        pooled, lse, total, grad.contiguous(), grad_lse.contiguous(),
        grad_pooled, grad_lses, len(lse), n, d, BLOCK_D=triton.next_power_of_2(d),
    )  # fmt: skip
    return grad_pooled, grad_lses


@_forward.register_fake
def _(pooled: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pooled[0]), torch.empty_like(lse[0])


@_backward.register_fake
def _(
    pooled: Tensor, lse: Tensor, total: Tensor, grad: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pooled), torch.empty_like(lse)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = _backward(*ctx.saved_tensors, grad, grad_lse)
    return grads


_forward.register_autograd(_differentiate, setup_context=_keep)


def merge_partials(pooled: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge pieces of bags: pooled (P, ..., D), lse (P, ...) float32 → (..., D), (...).

    Raises:
        ValueError: the shapes do not belong together.
    """
    _require_match(pooled, lse)
    if not len(lse):
        raise ValueError("merge_partials got no pieces; pass at least one, empty or not")
    merged, total = _forward(pooled.contiguous(), lse.contiguous())
    return merged, total


def merge_partials_across(
    pooled: Tensor,
    lse: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    loss: Literal["same", "summed"] = "same",
) -> tuple[Tensor, Tensor]:
    """Merge the pieces that the processes of a group hold; each gets the whole bag's result.

    Args:
        pooled: this process's piece, (..., D).
        lse: its log-sum-exp, (...), −inf where it has no tiles.
        group: the processes; all of them by default.
        loss: "same" if every process computes the same loss from the result: its gradient is
            then already whole, and backward sends nothing. "summed" if the loss is the sum of
            what the processes compute: their gradients are added up first.

    Raises:
        ValueError: the shapes do not belong together, or `loss` is neither word.
    """
    _require_match(pooled[None], lse[None])
    if loss not in ("same", "summed"):
        raise ValueError(f"loss is {loss!r}; choose same or summed")
    merged: tuple[Tensor, Tensor] = _Across.apply(pooled, lse, group, loss == "summed")
    return merged


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pooled: Tensor, lse: Tensor, group: dist.ProcessGroup | None, summed: bool
    ) -> tuple[Tensor, Tensor]:
        peak = lse.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        shift = peak.masked_fill(peak == _NONE, 0.0)
        weight = torch.exp(lse - shift)[..., None]
        # One message: the weighted features, and their weight as one more column.
        mixed = torch.cat([weight * pooled.masked_fill(weight == 0, 0.0), weight], -1)
        dist.all_reduce(mixed, dist.ReduceOp.SUM, group)
        mass = mixed[..., -1]
        merged = mixed[..., :-1] / mass.masked_fill(mass == 0, 1.0)[..., None]
        total = mass.log() + shift
        ctx.save_for_backward(pooled, lse, merged, total)
        ctx.group, ctx.summed = group, summed
        return merged.to(pooled.dtype), total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pooled, lse, merged, total = ctx.saved_tensors
        if ctx.summed:
            both = torch.cat([grad.to(lse.dtype), grad_lse[..., None]], -1)
            dist.all_reduce(both, dist.ReduceOp.SUM, ctx.group)
            grad, grad_lse = both[..., :-1], both[..., -1]
        weight = torch.exp(lse - total.masked_fill(total == _NONE, 0.0))
        rest = grad_lse - (grad * merged).sum(-1)
        grad_pooled = (weight[..., None] * grad).to(pooled.dtype)
        return grad_pooled, weight * (rest + _along(pooled, lse, grad)), None, None


def _require_match(pooled: Tensor, lse: Tensor) -> None:
    if pooled.shape[:-1] != lse.shape or pooled.ndim < 2:
        raise ValueError(
            f"pooled is {tuple(pooled.shape)} and lse {tuple(lse.shape)}; "
            "pass (pieces, ..., features) and (pieces, ...)"
        )
