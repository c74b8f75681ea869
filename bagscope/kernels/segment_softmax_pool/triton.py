"""Softmax pooling per bag in Triton: bags are split, so that one long bag fills the device.

A split is a run of rows of one bag. The first kernel pools each split for itself, the second merges
the splits of each bag, in their order: the same input gives the same bits.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagscope.kernels.segment_softmax_pool.cpu import FourTensors, PoolGradient, accumulator

SPLIT_ROWS = 256
_LOWEST = tl.constexpr(-3.0e38)
"""Stands for minus infinity in maxima, where a difference of infinities would be NaN."""


class Splits(NamedTuple):
    """The rows of each split, and each bag's splits; made without asking the device anything.

    There are as many splits as there could be at most; the last ones may be empty.
    """

    bag: Tensor
    start: Tensor
    stop: Tensor
    first_of_bag: Tensor


def split_bags(cu_seqlens: Tensor, tiles: int, rows: int = SPLIT_ROWS) -> Splits:
    """Return splits of at most `rows` rows, none of which crosses a border."""
    borders = cu_seqlens.long()
    counts = (borders.diff() + rows - 1) // rows
    first = torch.cat((borders.new_zeros(1), counts.cumsum(0)))
    bags = len(counts)
    index = torch.arange((tiles + rows - 1) // rows + bags, device=borders.device)
    bag = torch.searchsorted(first[1:], index, right=True)
    is_real = bag < bags
    bag = bag.clamp_max(max(bags - 1, 0))
    start = borders[bag] + (index - first[bag]) * rows
    stop = torch.minimum(start + rows, borders[bag + 1])
    return Splits(bag, torch.where(is_real, start, 0), torch.where(is_real, stop, 0), first)


def split_rows(tiles: int) -> int:
    """Return the rows of a split: about 512 splits fill a device, and more only delay the merge."""
    wanted = (tiles + 511) // 512
    return max(SPLIT_ROWS, 1 << max(wanted - 1, 0).bit_length())


def blocks(features: int, columns: int) -> tuple[int, int, int]:
    """Return the blocks of rows, features and columns."""
    block_d = min(128, max(16, triton.next_power_of_2(features)))
    return 32, block_d, max(16, triton.next_power_of_2(columns))


def precision(dtype: torch.dtype) -> str:
    """Return how float32 products are done: as the user lets torch do them."""
    is_free = torch.backends.cuda.matmul.allow_tf32 and dtype == torch.float32
    return "tf32" if is_free else "ieee"


@triton.jit
def segment_softmax_pool_fwd_kernel(
    scores_ptr,
    h_ptr,
    mask_ptr,
    start_ptr,
    stop_ptr,
    top_ptr,
    total_ptr,
    mean_ptr,
    pooled_ptr,
    K,
    D,
    stride_s,
    stride_h,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Pool one split: its maximum, sum and weighted sums, not yet divided."""
    split = tl.program_id(0).to(tl.int64)
    start = tl.load(start_ptr + split)
    stop = tl.load(stop_ptr + split)
    k = tl.arange(0, BK)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    top = tl.full((BK,), _LOWEST, tl.float32)
    total = tl.zeros((BK,), tl.float32)
    mean = tl.zeros((BK,), tl.float32)
    acc = tl.zeros((BK, BD), tl.float32)
    for begin in range(start, stop, BM):
        rows = begin + tl.arange(0, BM).to(tl.int64)
        inside = (rows < stop)[:, None] & (k < K)[None, :]
        at = rows[:, None] * stride_s + k[None, :]
        if HAS_MASK:
            inside = inside & (tl.load(mask_ptr + rows[:, None] * K + k[None, :], inside, 1) == 0)
        e = tl.load(scores_ptr + at, inside, 0.0).to(tl.float32)
        higher = tl.maximum(top, tl.max(tl.where(inside, e, _LOWEST), 0))
        p = tl.exp(tl.where(inside, e - higher[None, :], _LOWEST))
        decay = tl.exp(top - higher)
        total = total * decay + tl.sum(p, 0)
        mean = mean * decay + tl.sum(p * e, 0)
        wanted = (rows < stop)[:, None] & (d < D)[None, :]
        h = tl.load(h_ptr + rows[:, None] * stride_h + d[None, :], wanted, 0.0)
        acc = acc * decay[:, None] + tl.dot(tl.trans(p).to(h.dtype), h, input_precision=PRECISION)
        top = higher
    where = split * K + k
    tl.store(top_ptr + where, top, k < K)
    tl.store(total_ptr + where, total, k < K)
    tl.store(mean_ptr + where, mean, k < K)
    tl.store(pooled_ptr + where[:, None] * D + d[None, :], acc, (k < K)[:, None] & (d < D)[None, :])


@triton.jit
def segment_softmax_pool_merge_kernel(
    first_ptr,
    top_ptr,
    total_ptr,
    mean_ptr,
    pooled_ptr,
    out_ptr,
    lse_ptr,
    entropy_ptr,
    largest_ptr,
    K,
    D,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Merge the splits of one bag."""
    bag = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = k < K
    both = inside[:, None] & (d < D)[None, :]
    top = tl.full((BK,), _LOWEST, tl.float32)
    total = tl.zeros((BK,), tl.float32)
    mean = tl.zeros((BK,), tl.float32)
    acc = tl.zeros((BK, BD), tl.float32)
    for split in range(tl.load(first_ptr + bag), tl.load(first_ptr + bag + 1)):
        where = split * K + k
        part = tl.load(top_ptr + where, inside, _LOWEST)
        higher = tl.maximum(top, part)
        decay = tl.exp(top - higher)
        share = tl.exp(part - higher)
        total = total * decay + tl.load(total_ptr + where, inside, 0.0) * share
        mean = mean * decay + tl.load(mean_ptr + where, inside, 0.0) * share
        pooled = tl.load(pooled_ptr + where[:, None] * D + d[None, :], both, 0.0)
        acc = acc * decay[:, None] + pooled * share[:, None]
        top = higher
    filled = total > 0.0
    divisor = tl.where(filled, total, 1.0)
    lse = top + tl.log(divisor)
    entropy = tl.maximum(lse - mean / divisor, 0.0)
    where = bag * K + k
    tl.store(lse_ptr + where, tl.where(filled, lse, float("-inf")), inside)
    tl.store(entropy_ptr + where, tl.where(filled, entropy, 0.0), inside)
    tl.store(largest_ptr + where, tl.where(filled, 1.0 / divisor, 0.0), inside)
    tl.store(out_ptr + where[:, None] * D + d[None, :], acc / divisor[:, None], both)


@triton.jit
def segment_softmax_pool_bwd_kernel(
    scores_ptr,
    h_ptr,
    mask_ptr,
    bag_ptr,
    start_ptr,
    stop_ptr,
    lse_ptr,
    constant_ptr,
    slope_ptr,
    g_ptr,
    grad_scores_ptr,
    grad_h_ptr,
    K,
    D,
    stride_s,
    stride_h,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """Write the gradients of the scores and of h for the rows of one split."""
    split = tl.program_id(0).to(tl.int64)
    bag = tl.load(bag_ptr + split)
    start = tl.load(start_ptr + split)
    stop = tl.load(stop_ptr + split)
    k = tl.arange(0, BK)
    of_bag = bag * K + k
    lse = tl.load(lse_ptr + of_bag, k < K, 0.0)
    constant = tl.load(constant_ptr + of_bag, k < K, 0.0)
    slope = tl.load(slope_ptr + of_bag, k < K, 0.0)
    for begin in range(start, stop, BM):
        rows = begin + tl.arange(0, BM).to(tl.int64)
        column = (rows < stop)[:, None] & (k < K)[None, :]
        at = rows[:, None] * stride_s + k[None, :]
        inside = column
        if HAS_MASK:
            inside = inside & (tl.load(mask_ptr + rows[:, None] * K + k[None, :], inside, 1) == 0)
        e = tl.load(scores_ptr + at, inside, 0.0).to(tl.float32)
        a = tl.exp(tl.where(inside, e - lse[None, :], _LOWEST))
        t = tl.zeros((BM, BK), tl.float32)
        for feature in range(0, D, BD):
            d = feature + tl.arange(0, BD)
            wanted = (rows < stop)[:, None] & (d < D)[None, :]
            h = tl.load(h_ptr + rows[:, None] * stride_h + d[None, :], wanted, 0.0)
            both = (k < K)[:, None] & (d < D)[None, :]
            g = tl.load(g_ptr + of_bag[:, None] * D + d[None, :], both, 0.0)
            t += tl.dot(h, tl.trans(g).to(h.dtype), input_precision=PRECISION)
            grad_h = tl.dot(a.to(h.dtype), g.to(h.dtype), input_precision=PRECISION)
            out = grad_h_ptr + rows[:, None] * D + d[None, :]
            tl.store(out, grad_h.to(grad_h_ptr.dtype.element_ty), wanted)
        grad = a * (t + constant[None, :] - slope[None, :] * e)
        out = grad_scores_ptr + rows[:, None] * K + k[None, :]
        tl.store(out, grad.to(grad_scores_ptr.dtype.element_ty), column)


def rowwise(tensor: Tensor) -> Tensor:
    """Return the tensor with neighbouring columns next to each other; copied where they are not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_bytes(mask: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return the mask as bytes; any tensor where there is none."""
    return stand_in if mask is None else mask.contiguous().view(torch.uint8)


def segment_softmax_pool_triton(
    scores: Tensor, h: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None
) -> FourTensors:
    """Return pooled, lse, entropy and the largest weight."""
    scores, h = rowwise(scores), rowwise(h)
    tiles, features = h.shape
    bags, columns = len(cu_seqlens) - 1, scores.shape[1]
    splits = split_bags(cu_seqlens, tiles, split_rows(tiles))
    options: dict[str, Any] = {"dtype": accumulator(h.dtype), "device": h.device}
    top, total, mean = (torch.empty(len(splits.bag), columns, **options) for _ in range(3))
    partial = torch.empty(len(splits.bag), columns, features, **options)
    pooled = torch.empty(bags, columns, features, **options)
    lse, entropy, largest = (torch.empty(bags, columns, **options) for _ in range(3))
    if not bags:
        return pooled, lse, entropy, largest
    rows, block_d, block_k = blocks(features, columns)
    wide = triton.cdiv(features, block_d)
    segment_softmax_pool_fwd_kernel[(len(splits.bag), wide)](
        scores,
        h,
        as_bytes(mask, scores),
        splits.start,
        splits.stop,
        top,
        total,
        mean,
        partial,
        columns,
        features,
        scores.stride(0),
        h.stride(0),
        HAS_MASK=mask is not None,
        PRECISION=precision(h.dtype),
        BM=rows,
        BD=block_d,
        BK=block_k,
    )
    segment_softmax_pool_merge_kernel[(bags, wide)](
        splits.first_of_bag,
        top,
        total,
        mean,
        partial,
        pooled,
        lse,
        entropy,
        largest,
        columns,
        features,
        BD=block_d,
        BK=block_k,
    )
    return pooled, lse, entropy, largest


def segment_softmax_pool_backward_triton(
    scores: Tensor,
    h: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of scores and h."""
    scores, h = rowwise(scores), rowwise(h)
    tiles, features = h.shape
    columns = scores.shape[1]
    gradient = PoolGradient(*outputs, grads)
    slope = torch.zeros_like(gradient.lse) if gradient.slope is None else gradient.slope
    g = torch.zeros_like(outputs[0]) if gradient.g is None else gradient.g
    splits = split_bags(cu_seqlens, tiles)
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not len(splits.bag):
        return grad_scores, grad_h
    rows, block_d, block_k = blocks(features, columns)
    segment_softmax_pool_bwd_kernel[(len(splits.bag),)](
        scores,
        h,
        as_bytes(mask, scores),
        splits.bag,
        splits.start,
        splits.stop,
        gradient.lse,
        gradient.constant,
        slope.contiguous(),
        g,
        grad_scores,
        grad_h,
        columns,
        features,
        scores.stride(0),
        h.stride(0),
        HAS_MASK=mask is not None,
        PRECISION=precision(h.dtype),
        BM=rows,
        BD=block_d,
        BK=block_k,
    )
    return grad_scores, grad_h
